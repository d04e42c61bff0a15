"""Staging: what reaches the device is the tiles, padded; the next ones are on their way before these are done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.checkpoint import load_model
from wsi_mmm.model.runner import Runner
from wsi_mmm.model.staging import SLOTS, Stager, staged_ahead
from wsi_mmm.types import U8

CPU = torch.device("cpu")
cuda = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def parts(*counts: int) -> list[U8]:
    """Seeded tiles of 8 px in parts of these lengths."""
    numbers = np.random.default_rng(0)
    return [numbers.integers(0, 256, (count, 8, 8, 3), np.uint8) for count in counts]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("device", ["cpu", cuda])
def test_each_part_arrives_whole_and_padded_with_zeros(device: str, ahead: bool) -> None:
    """In order, however short the parts are."""
    given, stager = parts(4, 2, 4, 1, 3), Stager(torch.device(device))
    staged = staged_ahead(given, lambda part: stager.stage([part], 4), stager, ahead=ahead)
    found = [(part, tiles.cpu().clone().numpy()) for part, tiles in staged]
    assert len(found) == len(given)
    for (part, tiles), wanted in zip(found, given, strict=True):
        assert part is wanted
        assert np.array_equal(tiles[: len(part)], wanted)
        assert tiles.shape == (4, 8, 8, 3)
        assert not tiles[len(part) :].any()


def test_several_parts_share_a_batch() -> None:
    """One after another, zeros after them."""
    one, two = parts(1, 2)
    found = Stager(CPU).stage([one, two], 4).numpy()
    assert np.array_equal(found[:3], np.concatenate([one, two]))
    assert not found[3:].any()


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_tiles_that_lie_on_the_device_are_gathered_there(device: str) -> None:
    """With others from memory or without, padded with zeros."""
    one, two, three = parts(1, 2, 3)
    there = torch.from_numpy(two).to(device)
    for given in ([one, there, three], [there], [there, there]):
        stager = Stager(torch.device(device))
        found = stager.ready(stager.stage(given, 8)).cpu().numpy()
        wanted = np.concatenate([two if part is there else part for part in given])
        assert np.array_equal(found[: len(wanted)], wanted)
        assert found.shape == (8, 8, 8, 3)
        assert not found[len(wanted) :].any()


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_the_model_says_the_same_of_tiles_on_the_device(small_model: Path, device: str) -> None:
    """To the bit, whichever way they came."""
    pixels = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), np.uint8)
    runner = Runner(load_model(small_model), device, 2)
    assert np.array_equal(runner.run(torch.from_numpy(pixels).to(device)).features, runner.run(pixels).features)
    with pytest.raises(ModelError, match="tiles must be uint8"):
        runner.run(torch.zeros(1, 64, 64, 3, device=device))
    runner.close()


def test_the_next_part_is_staged_before_this_one_is_worked_on() -> None:
    """One ahead, never more."""
    order, stager = [], Stager(CPU)

    def stage(part: U8) -> torch.Tensor:
        order.append(f"stage {len(part)}")
        return stager.stage([part], 4)

    for part, _ in staged_ahead(parts(1, 2, 3), stage, stager):
        order.append(f"work {len(part)}")
    assert order == ["stage 1", "stage 2", "work 1", "stage 3", "work 2", "work 3"]


def test_buffers_are_used_again() -> None:
    """As many as there are slots, and one that holds a part in flight is not touched."""
    stager = Stager(CPU)
    places = [stager.stage([part], 4).data_ptr() for part in parts(1, 2, 3, 1)]
    assert places[:SLOTS] == places[SLOTS:]
    assert len(set(places)) == SLOTS


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_bf16_differs_and_stays_within_its_tolerance(small_model: Path, device: str) -> None:
    """Other numbers than eager's, no further away than stated."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    model = load_model(small_model)
    eager, short = (Runner(model, device, 1, runtime=name).run(pixels).features for name in ("eager", "bf16"))
    assert not np.array_equal(eager, short)
    assert np.abs(eager - short).max() <= 5e-2 * np.abs(eager).max()


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
