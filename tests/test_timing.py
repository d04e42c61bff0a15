"""Timers and their stages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wsi_mmm import timing
from wsi_mmm.storage import store
from wsi_mmm.storage.ranges import MergeRule, fetch_merged
from wsi_mmm.timing import StageTimer, count_waiting, sum_stages, timed


def nap(seconds: float) -> None:
    """Time that passes without work."""
    time.sleep(seconds)


def test_stages_of_a_lap_add_up_to_its_length() -> None:
    """What is nested counts for the innermost stage alone, and what nobody claims for the lap's own."""
    with StageTimer("read") as whole:
        nap(0.02)
        with timed("fetch"):
            nap(0.04)
            with timed("waiting"):
                nap(0.03)
        with timed("fetch"):
            nap(0.01)
    taken = whole.result
    assert sum(taken.seconds.values()) == pytest.approx(taken.end - taken.start, abs=1e-6)
    assert set(taken.seconds) == {"decode", "fetch", "waiting"}
    for stage, least in (("decode", 0.02), ("fetch", 0.05), ("waiting", 0.03)):
        assert taken.seconds[stage] >= least


def test_waiting_that_is_known_afterwards_is_taken_from_the_stage() -> None:
    """The total stays; a wait of no length, or one that never began, changes nothing."""
    with StageTimer("model") as whole:
        nap(0.05)
        count_waiting(0.03)
        count_waiting(-5.0)
    assert whole.result.seconds["waiting"] == pytest.approx(0.03)
    assert whole.result.seconds["model"] >= 0.02
    assert sum(whole.result.seconds.values()) == pytest.approx(whole.result.end - whole.result.start, abs=1e-6)


def test_outside_a_lap_nothing_is_kept() -> None:
    """Whoever reads a slide without an engine pays nothing and leaves nothing behind."""
    with timed("fetch"):
        assert timing.current_unit() == ""
    count_waiting(1.0)
    with StageTimer("read", "s/forward/0-0") as whole:
        assert timing.current_unit() == "s/forward/0-0"
    assert set(whole.result.seconds) == {"decode"}
    assert timing.current_unit() == ""


def test_a_lap_ends_when_its_work_raises() -> None:
    """The next lap of the thread begins afresh, whatever was open."""
    with pytest.raises(ZeroDivisionError), StageTimer("read", "first"), timed("fetch"):
        raise ZeroDivisionError
    assert timing.current_unit() == ""
    with StageTimer("write") as whole:
        pass
    assert set(whole.result.seconds) == {"write"}


def test_threads_run_laps_of_their_own() -> None:
    """Two threads at once: each lap knows its thread and holds only what that thread did."""

    def run(stage: timing.Stage) -> timing.StepTime:
        with StageTimer("read") as whole, timed(stage):
            nap(0.05)
        return whole.result

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(run, ("fetch", "write"))
    assert one.thread != two.thread
    assert set(one.seconds) == {"decode", "fetch"} and set(two.seconds) == {"decode", "write"}
    total = sum_stages([one, two])
    assert set(total) == {"decode", "fetch", "write"}
    assert sum(total.values()) == pytest.approx(sum(x.end - x.start for x in (one, two)), abs=1e-6)


def test_bytes_of_a_slide_are_fetched_and_files_written(tmp_path: Path) -> None:
    """Whoever reads ranges or whole objects, or writes one, need not say so: the storage does."""

    def slow(spans: Sequence[tuple[int, int]]) -> list[bytes]:
        nap(0.05)
        return [bytes(length) for _, length in spans]

    with StageTimer("read") as whole:
        assert [len(part) for part in fetch_merged([(0, 4), (90, 20)], 100, rule=MergeRule(gap=0), get=slow)] == [4, 10]
    assert whole.result.seconds["fetch"] >= 0.05
    with StageTimer("read") as whole:
        store.write_bytes(str(tmp_path / "x"), b"x")
    assert whole.result.seconds["write"] > 0 and "fetch" not in whole.result.seconds
    with StageTimer("read") as whole:
        store.read_bytes(str(tmp_path / "x"))
    assert whole.result.seconds["fetch"] > 0 and "write" not in whole.result.seconds
