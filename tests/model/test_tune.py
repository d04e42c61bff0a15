"""Choosing the micro-batch: by what it costs, among those that change no bit, remembered where that is possible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from wsi_mmm.model import tune
from wsi_mmm.model.checkpoint import load_model
from wsi_mmm.model.runner import Runner
from wsi_mmm.model.tune import SAMPLES, WORTH, Tuner


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder of this test's own, not made yet."""
    return tmp_path / "cache"


def known(cache: Path | None, key: str = "case") -> Tuner:
    """A new tuner of standard 8."""
    return Tuner(8, key, folder=cache)


def everything(sizes: Sequence[int]) -> Sequence[int]:
    """All sizes give the same bits."""
    return sizes


def tuned(cost: dict[int, float], cache: Path | None = None, agreeing: tune.Check = everything) -> Tuner:
    """A tuner of standard 8 that has seen enough micro-batches of the given seconds per tile."""
    tuner = known(cache)
    tuner.saw(WORTH + 1, agreeing)
    for _ in range(10 * SAMPLES):
        size = tuner.pick()
        tuner.took(size, size * cost[size])
    return tuner


def test_the_cheapest_size_is_chosen_and_remembered(cache: Path) -> None:
    """The next tuner of this case begins with it; another case does not."""
    assert tuned({4: 3.0, 8: 2.0, 16: 1.0}, cache).size == 16
    again = known(cache)
    assert (again.size, again.chosen) == (16, "measured before")
    assert known(cache, "other").size == 8


def test_a_size_that_changes_bits_is_never_used() -> None:
    """However cheap it is."""
    tuner = tuned({4: 1.5, 8: 2.0, 16: 0.1}, None, lambda sizes: [size for size in sizes if size != 16])
    assert tuner.size == 4


def test_when_no_other_size_agrees_the_standard_is_remembered(cache: Path) -> None:
    """The check is not made again."""
    assert tuned({8: 2.0}, cache, lambda sizes: []).chosen == "measured"
    assert known(cache).chosen == "measured before"


def test_a_gain_within_noise_changes_nothing() -> None:
    """Two or three percent are not enough."""
    assert tuned({4: 1.96, 8: 2.0, 16: 1.95}).size == 8


def test_a_short_run_and_a_runner_that_may_not_tune_keep_the_standard() -> None:
    """Nothing is checked or tried before it is worth it."""

    def never(sizes: Sequence[int]) -> Sequence[int]:
        raise AssertionError("not to be asked")

    for key, tiles in (("case", WORTH), ("", 100 * WORTH)):
        tuner = Tuner(8, key)
        tuner.saw(tiles, never)
        assert tuner.pick() == 8


@pytest.mark.parametrize("text", ["", "{", "[]", '{"case": 3}', '{"case": {"micro_batch": "many"}}', "\xff"])
def test_a_broken_file_is_measured_anew(cache: Path, text: str) -> None:
    """And replaced by a good one."""
    cache.mkdir()
    tune.tune_file(cache).write_text(text, encoding="latin-1")
    assert known(cache).size == 8
    assert tuned({4: 1.0, 8: 2.0, 16: 3.0}, cache).size == 4
    assert json.loads(tune.tune_file(cache).read_text())["case"]["micro_batch"] == 4


@pytest.mark.parametrize("place", ["file/below", None])
def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path: Path, place: str | None) -> None:
    """The choice holds for this process; so it does without a folder."""
    (tmp_path / "file").write_text("in the way")
    cache = tmp_path / place if place else None
    assert tuned({4: 1.0, 8: 2.0, 16: 3.0}, cache).size == 4
    assert known(cache).size == 8


def test_a_runner_that_tunes_gives_the_same_bits(small_model: Path, cache: Path) -> None:
    """Before, while and after it tries other sizes; its facts say what it chose."""
    model = load_model(small_model)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 128, 128, 3), np.uint8)
    plain, eager = Runner(model, "cpu", 2), Runner(model, "cpu", 2, tune=True, cache=cache)
    wanted = plain.run(pixels).features
    for _ in range(60):
        assert np.array_equal(eager.run(pixels).features, wanted)
    assert "measured" in eager.facts()["micro_batch"]["128 px"]
    assert "standard" in plain.facts()["micro_batch"]["128 px"]
    assert [choice["tile"] for choice in tune.known_choices(cache).values()] == [128]
