"""The time of a run, per slide and per worker."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, field

from wsi_mmm.engine.monitoring.accounting import TimeAccounting
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import SlideTask, UnitResult, WorkUnit
from wsi_mmm.timing import STAGES, Lap, lap, spent

TASK = SlideTask("s", "s.svs", "out/s", Recipe("default", "hash", (), 0.5, 256, 0))


@dataclass
class Clock:
    """A clock that the test winds."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Run:
    """A ledger that is told of units at set times."""

    clock: Clock = field(default_factory=Clock)
    ledger: TimeAccounting = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = TimeAccounting(self.clock)

    def unit(self, block: int, start: float, end: float, *laps: Lap, worker: str = "a:1") -> None:
        """A forward work that is started and received at those times."""
        self.clock.now = start
        self.ledger.watch(WorkUnit("forward", TASK, (block, 0)))
        self.clock.now = end
        self.ledger.watch(UnitResult("forward", "s", (block, 0), "ok", tiles=4, laps=laps, worker=worker))


def test_a_workers_stages_add_up_to_its_threads_and_wall_time() -> None:
    """Gaps between laps, and before and after those of a thread that began late or ended early, are waiting."""
    run = Run()
    run.unit(0, 0, 4, Lap(1, 100, 103, {"fetch": 1, "decode": 2}), Lap(2, 103, 104, {"model": 1}))
    run.unit(1, 1, 9, Lap(1, 104, 105, {"decode": 1}), Lap(2, 105, 110, {"model": 4, "waiting": 1}))
    [row] = run.ledger.rows()
    assert (row["worker"], row["threads"], row["seconds"], row["units"], row["tiles"]) == ("a:1", 2, 10, 2, 8)
    assert row["time"] == {
        "prepare": 0, "fetch": 1, "decode": 3, "model": 5, "interpret": 0, "write": 0, "waiting": 11
    }  # fmt: skip
    assert sum(row["time"].values()) == row["threads"] * row["seconds"]


def test_a_slides_stages_add_up_to_the_time_its_units_were_out() -> None:
    """What a unit was out for and did not spend in laps it waited; a slide that has ended is let go."""
    run = Run()
    run.unit(0, 0, 5, Lap(1, 100, 103, {"fetch": 1, "decode": 2}))
    run.unit(1, 2, 12, Lap(1, 103, 109, {"decode": 4, "waiting": 2}), worker="b:2")
    found = run.ledger.slide("s")
    assert {stage: seconds for stage, seconds in found.items() if seconds} == {"fetch": 1, "decode": 6, "waiting": 8}
    assert sum(found.values()) == 5 + 10
    assert run.ledger.slides == {}
    assert [row["worker"] for row in run.ledger.rows()] == ["a:1", "b:2"]


def test_a_unit_that_failed_has_waited() -> None:
    """Its receipt knows no laps and no worker: the time is the slide's, and none of its stages'."""
    run = Run()
    run.clock.now = 1.0
    run.ledger.watch(WorkUnit("plan", TASK))
    run.clock.now = 4.0
    run.ledger.watch(UnitResult("plan", "s", (0, 0), "failed", "storm"))
    assert run.ledger.slide("s")["waiting"] == 3.0
    assert run.ledger.rows() == []


def test_clocks_that_disagree_give_no_negative_time() -> None:
    """Laps longer than their unit was out for, as a worker's clock may say: waiting is 0, the rest as it was told."""
    run = Run()
    run.unit(0, 0, 1, Lap(1, 100, 103, {"model": 3}))
    assert run.ledger.slide("s") == {**dict.fromkeys(STAGES, 0.0), "model": 3}


def test_keeping_the_books_costs_microseconds_a_unit() -> None:
    """Under 50 us of processor time for a work and its receipt, and what travels with it is a few hundred bytes."""
    ledger, count = TimeAccounting(), 2000
    laps = tuple(Lap(n, 1.0, 2.0, {"fetch": 0.5, "decode": 0.5}) for n in range(3))
    things = [
        (WorkUnit("forward", TASK, (n, 0)), UnitResult("forward", "s", (n, 0), "ok", laps=laps, worker="a:1"))
        for n in range(count)
    ]
    begun = time.thread_time()
    for unit, result in things:
        ledger.watch(unit)
        ledger.watch(result)
    assert (time.thread_time() - begun) / count < 50e-6
    assert len(pickle.dumps(things[0][1])) < 900


def test_a_change_of_stage_costs_a_microsecond_or_two() -> None:
    """Under 10 us of processor time, so that the reads of a unit may say so one by one."""
    begun, times = time.thread_time(), 2000
    with lap("decode"):
        for _ in range(times):
            with spent("fetch"):
                pass
    assert (time.thread_time() - begun) / times < 10e-6
