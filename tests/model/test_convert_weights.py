"""Pickled weights become safetensors with the same tensors; nothing in the file is run, nothing half written."""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wsi_mmm.errors import ModelError
from wsi_mmm.model import convert_weights as converting
from wsi_mmm.model.convert_weights import convert_weights, limit_process, read_tensors, write_tensors


class Trap:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def message(call: Any, *arguments: Any) -> str:
    """The text of the ModelError, one line."""
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_keeps_its_tensors(tmp_path: Path) -> None:
    """Through the process with limits: names, dtypes and values are equal; no temporary is left."""
    shared = torch.arange(6.0)
    state = {
        "blocks.0.w": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "one": shared,
        "two": shared[2:],
        "n": torch.tensor(7),
    }
    torch.save({"teacher": state, "optimizer": {"lr": 0.1}, "epoch": 3}, tmp_path / "w.pth")
    done = convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")
    again = load_file(tmp_path / "w.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) and again[key].dtype == state[key].dtype for key in state)
    assert (done.tensors, done.part, done.left_out) == (5, "teacher", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.pth", "w.safetensors"]


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in one line; the old target stays, and nothing is left behind."""
    mark, target = tmp_path / "mark", tmp_path / "old.safetensors"
    torch.save({"w": torch.ones(2), "trap": Trap(mark)}, tmp_path / "bad.bin")
    target.write_bytes(b"old")

    def run(command: list[str], **_: Any) -> Any:
        monkeypatch.setattr(converting, "limit_process", lambda *_: None)  # this is the process of the tests
        answer = converting._convert_here(Path(command[-4]), Path(command[-3]), int(command[-2]), int(command[-1]))
        return type("Done", (), {"stdout": f"{json.dumps(answer)}\n", "returncode": 0})()

    monkeypatch.setattr(converting.subprocess, "run", run)
    text = message(convert_weights, tmp_path / "bad.bin", target)
    assert "holds more than tensors, which could run code" in text
    assert not mark.exists() and target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.bin", "old.safetensors"]


def test_modules_beside_the_weights_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who converts in a folder that was downloaded runs none of its Python files."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    for name in ("torch.py", "json.py", "safetensors.py"):
        (tmp_path / name).write_text("import sys\nsys.exit(7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])  # as in the command
    assert convert_weights(Path("w.bin"), Path("w.safetensors")).tensors == 1


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    ("saved", "names", "left_out"),
    [
        ({"a": torch.ones(2), "b": 3}, ["a"], 1),
        ({"state_dict": {"model": {"a": torch.ones(2)}}}, ["a"], 0),
        ({"model": {"a": torch.ones(2)}, "args": {"x": [1]}}, ["a"], 0),
        ({"deep": {"er": {"a": torch.ones(2)}}}, ["deep.er.a"], 0),
        ({"student": {"a": torch.zeros(1)}, "teacher": {"a": torch.ones(2)}}, ["a"], 0),
    ],
)
def test_wrappers(tmp_path: Path, saved: Any, names: list[str], left_out: int, old_format: bool) -> None:
    """What training runs wrap weights in, in torch's present format and its first."""
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=not old_format)
    tensors, rest, _ = read_tensors(tmp_path / "w.pt")
    assert (sorted(tensors), rest) == (names, left_out)
    assert torch.equal(tensors[names[0]], torch.ones(2))


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    """Plain pickles with code, text, a truncated file, a scripted model, no tensors: refused, never run."""
    mark = tmp_path / "mark"
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(mark)))
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"w": torch.ones(1000)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:900])
    torch.save({"x": [1, 2]}, tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as archive:
        archive.writestr("m/constants.pkl", pickle.dumps(()))
        archive.writestr("m/data.pkl", pickle.dumps(Trap(mark)))
    for name in ("plain", "text", "cut", "scripted"):
        assert message(read_tensors, tmp_path / f"{name}.pt")
    assert message(read_tensors, tmp_path / "none.pt") == "holds no tensors"
    assert not mark.exists()


def test_what_a_file_says_of_its_size_is_bounded(tmp_path: Path) -> None:
    """A tensor of one number stretched over a terabyte is refused before anything is written."""
    torch.save({"w": torch.ones(1).expand(1 << 38)}, tmp_path / "wide.pt")
    tensors, _, _ = read_tensors(tmp_path / "wide.pt")
    assert "which the file cannot hold" in message(write_tensors, tensors, tmp_path / "out.safetensors", 1 << 20)
    assert not (tmp_path / "out.safetensors").exists()


def test_wrong_names(tmp_path: Path) -> None:
    """The target's ending, no such file, safetensors already: said before a process is started."""
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "w.bin")
    assert "must end with .safetensors" in message(convert_weights, tmp_path / "w.bin", tmp_path / "w.pt")
    assert "are missing" in message(convert_weights, tmp_path / "no.bin", tmp_path / "w.safetensors")
    assert "is safetensors already" in message(convert_weights, tmp_path / "a.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize("answer", ["", "not json", "[1]", '{"tensors": 1'])
def test_a_process_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Killed for its memory or its time: the limits are named, and nothing is left."""
    torch.save({"w": torch.ones(1)}, tmp_path / "w.bin")

    def run(command: list[str], **_: Any) -> Any:
        Path(command[-3]).write_bytes(b"half")
        return type("Done", (), {"stdout": answer, "returncode": -9})()

    monkeypatch.setattr(converting.subprocess, "run", run)
    assert "cannot be read within 1800 s and 4 GiB" in message(
        convert_weights, tmp_path / "w.bin", tmp_path / "w.safetensors"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["w.bin"]


def test_limits_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, processor time, size of files; never above what the process was given."""
    asked: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(
        resource, "getrlimit", lambda what: (0, 50 if what == resource.RLIMIT_CPU else resource.RLIM_INFINITY)
    )
    monkeypatch.setattr(resource, "setrlimit", asked.__setitem__)
    limit_process(1 << 30, 100, 1 << 20)
    assert asked == {
        resource.RLIMIT_DATA: (1 << 30, 1 << 30), resource.RLIMIT_AS: (65 << 30, 65 << 30),
        resource.RLIMIT_CPU: (50, 50), resource.RLIMIT_FSIZE: (1 << 20, 1 << 20), resource.RLIMIT_CORE: (0, 0),
    }  # fmt: skip
