"""Staging: what reaches the device is the tiles, padded; the next ones are on their way before these are done."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.checkpoint import load_model
from wsi_mmm.model.identity import RUNTIMES
from wsi_mmm.model.runner import Runner
from wsi_mmm.types import U8

cuda = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def parts(*counts: int) -> list[U8]:
    """Seeded tiles of 8 px in parts of these lengths."""
    numbers = np.random.default_rng(0)
    return [numbers.integers(0, 256, (count, 8, 8, 3), np.uint8) for count in counts]


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_each_part_arrives_whole_and_padded_with_zeros(small_model: Path, device: str) -> None:
    """However short the parts are."""
    runner = Runner(load_model(small_model), device, 1)
    for part in parts(4, 2, 4, 1, 3):
        tiles = runner._await_copy(runner._stage_batch([part], 4)).cpu().numpy()
        assert np.array_equal(tiles[: len(part)], part)
        assert tiles.shape == (4, 8, 8, 3)
        assert not tiles[len(part) :].any()


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_several_parts_share_a_batch(small_model: Path, device: str) -> None:
    """One after another, zeros after them."""
    one, two = parts(1, 2)
    runner = Runner(load_model(small_model), device, 1)
    found = runner._await_copy(runner._stage_batch([one, two], 4)).cpu().numpy()
    assert np.array_equal(found[:3], np.concatenate([one, two]))
    assert not found[3:].any()


@pytest.mark.parametrize(
    ("kind", "wanted"), [("cuda", "stage stage compute stage compute compute"), ("cpu", "stage compute " * 3)]
)
def test_on_a_gpu_the_next_batch_is_staged_before_this_one_is_computed(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wanted: str
) -> None:
    """One ahead, never more; on a CPU none, since another thread may take it."""
    runner, steps = Runner(load_model(small_model), "cpu", 1), []
    queue = runner._find_queue(64, ())
    stage, forward = runner._stage_batch, runner._forward_batch
    monkeypatch.setattr(runner, "_stage_batch", lambda *args: steps.append("stage") or stage(*args))
    monkeypatch.setattr(runner, "_forward_batch", lambda *args: steps.append("compute") or forward(*args))
    monkeypatch.setattr(runner, "device", types.SimpleNamespace(type=kind))
    queue.add(np.zeros((3 * queue.size, 64, 64, 3), np.uint8))
    runner._run_batches(queue)
    assert steps == wanted.split()


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_a_batch_in_flight_is_not_touched_by_later_ones(small_model: Path, device: str) -> None:
    """The pinned memory of a copy that is under way is not given to another batch."""
    runner = Runner(load_model(small_model), device, 1)
    given = parts(1, 2, 3, 1, 2, 3)
    staged = [runner._stage_batch([part], 4) for part in given]
    for part, tiles in zip(given, staged, strict=True):
        assert np.array_equal(runner._await_copy(tiles)[: len(part)].cpu().numpy(), part)


@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 5e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("device", ["cpu", cuda])
def test_less_precision_differs_and_stays_within_its_tolerance(
    small_model: Path, device: str, name: str, tolerance: float
) -> None:
    """Other numbers than eager's, no further away than stated; reports say how far, eager's say nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    model = load_model(small_model)
    exact, reduced = Runner(model, device, 1), Runner(model, device, 1, runtime=name)
    assert "difference" not in reduced.describe()
    eager, short = exact.run(pixels).features, reduced.run(pixels).features
    assert not np.array_equal(eager, short)
    assert np.abs(eager - short).max() <= tolerance * np.abs(eager).max()
    assert f"{tolerance:.0e}".replace("e-0", "e-") in RUNTIMES[name]
    facts = reduced.describe()
    assert (facts["precision"], exact.describe()["precision"]) == (name, "fp32")
    assert "difference" not in exact.describe()
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (eager, short)]
    stated = facts["difference"]
    assert stated["tiles"] == 3
    assert stated["cosine"] == pytest.approx((unit[0] * unit[1]).sum(axis=1).min(), abs=1e-5)
    assert stated["largest"] == pytest.approx(np.abs(eager - short).max() / np.abs(eager).max(), rel=0.2)
    reduced.run(pixels[:1] // 2)
    assert reduced.describe()["difference"] == stated  # of the first batch, once


@pytest.mark.slow
def test_compile_stays_within_its_tolerance(small_model: Path) -> None:
    """Several threads may use it, and a grouping changes nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), np.uint8)
    model = load_model(small_model)
    fast = Runner(model, "cpu", 2, runtime="compile")
    eager, compiled = Runner(model, "cpu", 2).run(pixels).features, fast.run(pixels).features
    assert np.abs(eager - compiled).max() <= 1e-3 * np.abs(eager).max()
    assert np.array_equal(fast.run(pixels[5:9]).features, compiled[5:9])


def test_an_unknown_runtime_is_refused(small_model: Path) -> None:
    """In one line that names those there are."""
    with pytest.raises(ModelError, match="no runtime 'magic'; choose one of: eager, compile, bf16"):
        Runner(load_model(small_model), "cpu", runtime="magic")
