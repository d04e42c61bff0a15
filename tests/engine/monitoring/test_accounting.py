"""The time of a run, per slide and per worker."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, field, replace

import pytest

from helpers.plans import facts_of
from wsi_mmm.engine.monitoring.accounting import BusyTimes, RunAccounting, busy_share
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import ForwardResult, InterpretResult, SlideTask, WorkUnit, failure_of
from wsi_mmm.errors import StorageError
from wsi_mmm.timing import STAGES, StageTimer, StepTime, timed

TASK = SlideTask("s", "s.svs", "out/s", Recipe("default", "hash", (), 0.5, 256, 0))


@dataclass
class Clock:
    """A clock that the test winds."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Run:
    """An accounting that is shown units at set times."""

    clock: Clock = field(default_factory=Clock)
    accounting: RunAccounting = field(init=False)

    def __post_init__(self) -> None:
        self.accounting = RunAccounting(self.clock)

    def unit(self, block: int, start: float, end: float, *times: StepTime, worker: str = "a:1") -> None:
        """A forward unit that is started and received at those times."""
        unit = WorkUnit("forward", TASK, (block, 0))
        self.clock.now = start
        self.accounting.watch(unit)
        self.clock.now = end
        self.accounting.watch(ForwardResult(facts_of(unit, *times, worker=worker), 4))


def test_a_workers_stages_add_up_to_its_threads_and_wall_time() -> None:
    """Gaps between laps, and before and after those of a thread that began late or ended early, are waiting."""
    run = Run()
    run.unit(
        0, 0, 4, StepTime("read", 1, 100, 103, {"fetch": 1, "decode": 2}), StepTime("model", 2, 103, 104, {"model": 1})
    )
    run.unit(
        1,
        1,
        9,
        StepTime("read", 1, 104, 105, {"decode": 1}),
        StepTime("model", 2, 105, 110, {"model": 4, "waiting": 1}),
    )
    [row] = run.accounting.worker_rows()
    assert (row["worker"], row["threads"], row["seconds"], row["units"], row["tiles"]) == ("a:1", 2, 10, 2, 8)
    assert row["time"] == {
        "prepare": 0, "fetch": 1, "decode": 3, "model": 5, "interpret": 0, "write": 0, "waiting": 11
    }  # fmt: skip
    assert sum(row["time"].values()) == row["threads"] * row["seconds"]


def test_a_slides_stages_add_up_to_the_time_its_units_were_out() -> None:
    """What a unit was out for and did not spend in laps it waited; a slide that has ended is let go."""
    run = Run()
    run.unit(0, 0, 5, StepTime("read", 1, 100, 103, {"fetch": 1, "decode": 2}))
    run.unit(1, 2, 12, StepTime("read", 1, 103, 109, {"decode": 4, "waiting": 2}), worker="b:2")
    found = run.accounting.close_slide("s", 0.0, 0.0).seconds
    assert {stage: seconds for stage, seconds in found.items() if seconds} == {"fetch": 1, "decode": 6, "waiting": 8}
    assert sum(found.values()) == 5 + 10
    assert run.accounting.slides == {}
    assert [row["worker"] for row in run.accounting.worker_rows()] == ["a:1", "b:2"]


def test_a_unit_that_failed_has_waited() -> None:
    """Its receipt knows no laps and no worker: the time is the slide's, and none of its stages'."""
    run = Run()
    run.clock.now = 1.0
    run.accounting.watch(WorkUnit("plan", TASK))
    run.clock.now = 4.0
    run.accounting.watch(failure_of(WorkUnit("plan", TASK), StorageError("storm")))
    assert run.accounting.close_slide("s", 0.0, 0.0).seconds["waiting"] == 3.0
    assert run.accounting.worker_rows() == []


def test_clocks_that_disagree_give_no_negative_time() -> None:
    """Laps longer than their unit was out for, as a worker's clock may say: waiting is 0, the rest as it was told."""
    run = Run()
    run.unit(0, 0, 1, StepTime("read", 1, 100, 103, {"model": 3}))
    assert run.accounting.close_slide("s", 0.0, 0.0).seconds == {**dict.fromkeys(STAGES, 0.0), "model": 3}


def test_keeping_the_books_costs_microseconds_a_unit() -> None:
    """Under 50 us of processor time for a work and its receipt, and what travels with it is a few hundred bytes."""
    accounting, count = RunAccounting(), 2000
    laps = tuple(StepTime("read", n, 1.0, 2.0, {"fetch": 0.5, "decode": 0.5}) for n in range(3))
    things = [
        (unit, ForwardResult(facts_of(unit, *laps), 4))
        for unit in (WorkUnit("forward", TASK, (n, 0)) for n in range(count))
    ]
    begun = time.thread_time()
    for unit, result in things:
        accounting.watch(unit)
        accounting.watch(result)
    assert (time.thread_time() - begun) / count < 50e-6
    assert len(pickle.dumps(things[0][1])) < 900


def test_a_change_of_stage_costs_a_microsecond_or_two() -> None:
    """Under 10 us of processor time, so that the reads of a unit may say so one by one."""
    begun, times = time.thread_time(), 2000
    with StageTimer("read"):
        for _ in range(times):
            with timed("fetch"):
                pass
    assert (time.thread_time() - begun) / times < 10e-6


def test_busy_share_is_the_union_of_model_time_over_wall_time() -> None:
    """Overlapping model threads of one worker are not counted twice."""
    times = BusyTimes()
    times.add("a:1", [(100.0, 104.0), (102.0, 106.0), (108.0, 110.0)])
    assert busy_share(times.within(100.0, 110.0), 10.0) == pytest.approx(0.8)


def test_a_slide_counts_the_model_busy_with_its_neighbours_too() -> None:
    """Two slides under way at once: neither was idle while the model worked on the other; time outside is cut off.
    Loading the model is no time of it."""
    accounting = RunAccounting()
    for name, start, load, end in (("s0", 9.0, 0.0, 14.0), ("s1", 13.0, 1.0, 17.0)):
        unit = WorkUnit("forward", replace(TASK, id=name))
        accounting.watch(unit)
        accounting.watch(ForwardResult(facts_of(unit, StepTime("model", 1, start, end, {"prepare": load})), 4))
        other = WorkUnit("interpret", replace(TASK, id=name))
        accounting.watch(InterpretResult(facts_of(other, StepTime("interpret", 1, 0.0, 20.0), worker="b:2")))
    for name in ("s0", "s1"):
        assert busy_share(accounting.close_slide(name, 10.0, 20.0).busy, 10.0) == pytest.approx(0.7)
