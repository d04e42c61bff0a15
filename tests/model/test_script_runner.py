"""The process of a TorchScript model: what goes wrong in it is one line, and nothing of it is taken for an answer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers.wsinfer_models import write_model
from wsi_mmm.errors import ModelError
from wsi_mmm.model import script_runner
from wsi_mmm.model.script_runner import ScriptLimits, ScriptProcess, ScriptRunner
from wsi_mmm.model.wsinfer import ScriptModel, read_script_model
from wsi_mmm.types import U8

GOOD, NOT_FINITE, WIDE, WRITES, LOOPS, RAISES = range(6)


class Misbehaving(nn.Module):
    """Does what the first pixel of the first tile says."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float[n, 3, h, w] -> logits float[n, 2], or something else."""
        what = int((x[0, 0, 0, 0] * 255).round())
        if what == 1:
            return torch.full((x.shape[0], 2), float("nan"))
        if what == 2:
            return x[:, :, 0, 0]
        if what == 3:
            return torch.from_file(self.path, shared=True, size=16)
        if what == 5:
            raise ValueError("no such tile")
        while what == 4:
            x = x + 1
        return x[:, :2, 1, 1]


def tiles_for(what: int, count: int = 3) -> U8:
    """Tiles that differ, the first pixel of which asks for something."""
    tiles = np.random.default_rng(what).integers(0, 256, (count, 16, 16, 3), np.uint8)
    tiles[:, 0, 0] = what
    return tiles


def refused(runner: ScriptRunner, what: int) -> str:
    """The text of the error, one line."""
    with pytest.raises(ModelError) as caught:
        runner.run(tiles_for(what), ["classify"])
    assert "\n" not in str(caught.value) and "misbehaving" in str(caught.value)
    return str(caught.value)


def test_what_goes_wrong_in_the_process_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults that leave it alive, then one that hangs: the next is not waited for longer than its time, nor started."""
    monkeypatch.setattr(script_runner, "LOSSES", 1)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "made-up")
    mark = tmp_path / "mark"
    steps = [{"name": "ToTensor"}]
    folder = write_model(tmp_path / "misbehaving", Misbehaving(str(mark)), ["a", "b"], transform=steps)
    runner = ScriptRunner(read_script_model(folder), 2, limits=ScriptLimits(batch_seconds=60))
    tiles = tiles_for(GOOD, 11)
    wanted = torch.from_numpy(tiles[:, 1, 1, :2] / np.float32(255)).softmax(1).numpy()
    found = runner.run(tiles, ["classify"])
    assert np.allclose(found.tables["classify"], wanted, atol=1e-6) and found.features.shape == (11, 0)
    assert "answers NaN or infinity" in refused(runner, NOT_FINITE)
    assert "answers [8, 3] for 8 tiles" in refused(runner, WIDE)
    assert "no such tile" in refused(runner, RAISES)
    process = runner._process
    assert process is not None and not process.lost
    if "writing files" in process.prevented:
        refused(runner, WRITES)
        assert not mark.exists()
    environment = Path(f"/proc/{process._process.pid}/environ")
    if environment.exists():
        assert b"made-up" not in environment.read_bytes()
    again = [runner.run(tiles[first : first + 2], ["classify"]).tables["classify"] for first in range(0, 11, 2)]
    assert np.array_equal(np.concatenate(again), found.tables["classify"])  # whatever a batch holds beside
    process.limits = ScriptLimits(batch_seconds=0.3)
    assert "did not answer in time" in refused(runner, LOOPS)
    assert process._process.wait(10) < 0 and process.lost
    text = refused(runner, GOOD)
    assert "did not answer in time" in text and "not started again" in text
    runner.close()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed (out of memory?)"),
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("import sys; sys.exit(7)", "ended with code 7"),
        ("import os, sys; os.write({sink}, bytes([9]) + bytes(4)); os.read(0, 1)", "sends what is no answer"),
        ("import os, sys; os.write({sink}, bytes([1]) + b'\\xff' * 4)", "sends what is no answer"),
        ("import os, sys, time; os.write({sink}, bytes([2, 2, 0])); time.sleep(60)", "did not answer in time"),
        ("import os; os.write({sink}, bytes([1, 5, 0, 0, 0]) + b'a\\x1b[2J')", "model 'm' a[2J"),
    ],
)
def test_nothing_that_a_process_sends_is_trusted(
    program: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends, is killed, answers nonsense, or half an answer."""

    def start(command: list[str], **rest: object) -> object:
        sink = json_facts(command)["channels"][0][1]
        return popen([sys.executable, "-S", "-E", "-c", program.format(sink=sink)], **rest)

    popen = script_runner.subprocess.Popen
    monkeypatch.setattr(script_runner.subprocess, "Popen", start)
    (tmp_path / "m").write_bytes(b"x")
    with pytest.raises(ModelError) as caught:
        ScriptProcess(empty_model(tmp_path / "m"), 1, ScriptLimits(load_seconds=0.4 if "in time" in words else 60))
    assert words in str(caught.value)


def json_facts(command: list[str]) -> dict[str, list[list[int]]]:
    """What a process is started with."""
    import json

    found: dict[str, list[list[int]]] = json.loads(command[-1])
    return found


def empty_model(script: Path) -> ScriptModel:
    """A model that is never opened."""
    from helpers.wsinfer_models import config_of
    from wsi_mmm.model.wsinfer import parse_config

    return ScriptModel(script, "0" * 64, *parse_config(config_of(["a", "b"]), "m", "m"), identity="0")


def test_pipes_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processes that could not be started, too."""
    monkeypatch.setattr(script_runner.sys, "executable", str(tmp_path / "none"))
    (tmp_path / "m").write_bytes(b"x")
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(FileNotFoundError):
        ScriptProcess(empty_model(tmp_path / "m"), 2, ScriptLimits())
    assert len(os.listdir("/dev/fd")) == before
