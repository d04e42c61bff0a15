"""Checkpoints: whole or not at all, never of another configuration, and resumed to the bit."""

from __future__ import annotations

import errno
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers.moto import moto_server
from helpers.training import tiny
from wsi_mmm.errors import ModelError, OutputError
from wsi_mmm.training import optim, state
from wsi_mmm.training.optim import Optimiser, OptimPlan, Scale
from wsi_mmm.training.state import CheckpointStore, Training

PLAN = OptimPlan(average=0.9)


def training(step: int = 0, seed: int = 0) -> Training:
    """A model after one made-up move of every weight."""
    model, _ = tiny(["classify"], seed=seed)
    learning = optim.learners(model, nn.Module(), PLAN)
    found = Training(model, Optimiser(learning, PLAN), nn.Module(), optim.first_average(model), Scale(8.0, 1, 5), step)
    for learner in learning:
        learner.parameter.grad = torch.ones_like(learner.parameter) * (seed + 1)
    found.optimiser.step(1.0)
    return found


def shelf(folder: Path | str, **options: int) -> CheckpointStore:
    """With a small identity."""
    return CheckpointStore(str(folder), {"rate": 0.1, "tasks": ["a"]}, **options)


def test_everything_comes_back(tmp_path: Path) -> None:
    """Model, average, optimiser, scale, counters and random states are what was written, to the bit."""
    old = training(step=7)
    old.best, old.stale, old.skipped, old.lost = 0.5, 2, 1, 3
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    uri = state.write(shelf(tmp_path), old)
    drawn = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    new = training(seed=1)
    assert state.resume(shelf(tmp_path), new)
    assert uri.endswith("step-00000007.safetensors")
    assert torch.equal(drawn[0], torch.rand(3)) and np.array_equal(drawn[1], np.random.rand(3))  # noqa: NPY002
    assert (new.step, new.best, new.stale, new.skipped, new.lost) == (7, 0.5, 2, 1, 3)
    assert new.scale == Scale(8.0, 1, 5)
    one, two = state.gather(old), state.gather(new)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one if not k.startswith("random."))


def test_there_may_be_nothing_to_resume(tmp_path: Path) -> None:
    """An empty or missing folder begins anew."""
    assert not state.resume(shelf(tmp_path / "none"), training())


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    """ModelError names what differs, there and here."""
    state.write(shelf(tmp_path), training())
    other = CheckpointStore(str(tmp_path), {"rate": 0.2, "tasks": ["a"], "seed": 1})
    with pytest.raises(ModelError, match=r"rate 0\.1 there, 0\.2 here; seed absent there, 1 here"):
        state.resume(other, training())


@pytest.mark.parametrize("damage", ["short", "garbage", "missing", "pointer"])
def test_damage_is_said(tmp_path: Path, damage: str) -> None:
    """A checkpoint cut off, overwritten or removed, and a broken pointer, are a ModelError that names the file."""
    path = Path(state.write(shelf(tmp_path), training(step=3)))
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "garbage":
        path.write_bytes(b"PK\x03\x04 a zip file, or whatever it is")
    elif damage == "missing":
        path.unlink()
    else:
        (tmp_path / "latest.json").write_text("{")
    with pytest.raises(ModelError, match="latest.json" if damage == "pointer" else "step-00000003") as caught:
        state.resume(shelf(tmp_path), training())
    assert "\n" not in str(caught.value)


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    """Of steps 1 to 5 with 2 the best, keeping two leaves 2, 4, 5."""
    for step in range(1, 6):
        state.write(shelf(tmp_path, keep=2), training(step=step), best=step == 2)
    assert state.stored(shelf(tmp_path)) == [2, 4, 5]
    assert state.pointed(shelf(tmp_path), "best") == 2 and state.pointed(shelf(tmp_path), "latest") == 5


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OutputError in one line; nothing half-written is left, and the earlier checkpoint can be resumed."""
    state.write(shelf(tmp_path), training(step=1))
    before = sorted(p.name for p in tmp_path.iterdir())
    real = Path.write_bytes

    def fill_up(path: Path, data: bytes) -> int:
        """Write to a disk that is full after 1000 bytes."""
        real(path, data[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OutputError, match=r"checkpoint of step 2: .*disk is full") as caught:
        state.write(shelf(tmp_path), training(step=2))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    new = training(seed=1)
    assert state.resume(shelf(tmp_path), new) and new.step == 1


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """The file is safetensors: a length, a JSON header with the facts, raw numbers."""
    data = Path(state.write(shelf(tmp_path), training())).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert b'"identity' in data[8 : 8 + length] and data[8:9] == b"{"


def test_weights_of_a_checkpoint_are_the_averaged_ones(tmp_path: Path) -> None:
    """`weights_of` gives the average where there is one, else the model."""
    one = training(step=1)
    tensors, facts = state.read(state.write(shelf(tmp_path), one))
    assert facts["step"] == 1
    found = state.weights_of(tensors)
    assert one.average is not None and all(torch.equal(found[k], v) for k, v in one.average.items())
    bare = {k: v for k, v in tensors.items() if not k.startswith("average.")}
    assert all(torch.equal(state.weights_of(bare)[k], v) for k, v in one.model.state_dict().items())


def test_checkpoints_may_lie_on_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to a bucket, tidied and resumed as in a folder."""
    with moto_server() as endpoint:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        request = urllib.request.Request(f"{endpoint}/checkpoints", method="PUT")
        urllib.request.urlopen(request).close()
        where = shelf("s3://checkpoints/run", keep=1)
        assert not state.resume(where, training())
        for step in (1, 2):
            state.write(where, training(step=step))
        new = training(seed=1)
        assert state.resume(where, new) and new.step == 2
        assert state.stored(where) == [2]
