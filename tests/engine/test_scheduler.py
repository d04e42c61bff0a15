"""The bookkeeping of a run, driven by an executor that only pretends."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace

import pytest

from helpers.plans import plan_of, result_of
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.monitoring.run_report import unreadable_text
from wsi_mmm.engine.scheduler import AHEAD, Scheduler
from wsi_mmm.engine.units import Capabilities, Kind, SlidePlan, SlideTask, UnitResult, WorkUnit, failure_of
from wsi_mmm.errors import Cancelled, StorageError


@dataclass
class Pretend:
    """Finishes works in a random order; ``fail`` names a work that fails, ``partial`` one with a bad tile."""

    plans: dict[str, SlidePlan]
    seed: int = 0
    fail: str = ""
    partial: str = ""
    log: list[WorkUnit] = field(default_factory=list)
    flying: list[WorkUnit] = field(default_factory=list)
    capabilities: Capabilities = field(default_factory=Capabilities)

    def room(self, kind: Kind) -> int:
        return 4 - len(self.flying)

    def start(self, unit: WorkUnit) -> None:
        self.flying.append(unit)

    def wait(self, timeout: float) -> UnitResult | None:
        unit = self.flying.pop(random.Random(self.seed + len(self.log)).randrange(len(self.flying)))
        self.log.append(unit)
        if unit.name == self.fail:
            return failure_of(unit, StorageError("storm"))
        bad = ((0, 0, 64, 64),) if unit.name == self.partial else ()
        return result_of(unit, plan=self.plans[unit.slide.id], failed=bad)

    def close(self, *, cancel: bool = False) -> None:
        self.flying.clear()


def slides(count: int) -> tuple[list[SlideTask], dict[str, SlidePlan]]:
    plans = {f"s{i}": plan_of(300 + 50 * i, 400, 2, 8, 0.7, i) for i in range(count)}
    plans = {name: replace(plan, slide=replace(plan.slide, id=name)) for name, plan in plans.items()}
    return [plan.slide for plan in plans.values()], plans


@pytest.mark.parametrize("seed", range(5))
def test_each_work_runs_once_and_after_what_it_needs(seed: int) -> None:
    """Whatever the order of receipts: every work exactly once, interpret after its forwards, publish last."""
    tasks, plans = slides(4)
    executor = Pretend(plans, seed)
    states = list(Scheduler(tasks).run(executor))
    assert {s.status for s in states} == {"done"} and len(states) == 4
    names = [unit.name for unit in executor.log]
    assert len(names) == len(set(names))
    seen: dict[str, set[tuple[int, int]]] = {t.id: set() for t in tasks}
    for unit in executor.log:
        if unit.kind == "forward":
            seen[unit.slide.id].add(unit.block)
        if unit.kind == "interpret":
            assert {(r // 2, c // 2) for r, c in unit.index().tolist()} <= seen[unit.slide.id]
    for task in tasks:
        assert [w.kind for w in executor.log if w.slide.id == task.id][-1] == "publish"


def test_a_slide_that_fails_does_not_stop_the_others() -> None:
    """One failed work fails its slide, publishes nothing of it, and the rest goes on."""
    tasks, plans = slides(3)
    block = plans["s1"].index[0] // 2
    executor = Pretend(plans, fail=f"s1/forward/{block[0]}-{block[1]}")
    states = {s.task.id: s for s in Scheduler(tasks).run(executor)}
    assert {name: s.status for name, s in states.items()} == {"s0": "done", "s1": "failed", "s2": "done"}
    assert states["s1"].error == "storm"
    assert not any(w.kind == "publish" and w.slide.id == "s1" for w in executor.log)


def test_a_bad_tile_makes_the_slide_partial_and_is_listed() -> None:
    """A tile that cannot be read is listed; the slide is published and marked partial."""
    tasks, plans = slides(1)
    block = plans["s0"].index[0] // 2
    [state] = Scheduler(tasks).run(Pretend(plans, partial=f"s0/forward/{block[0]}-{block[1]}"))
    assert state.status == "partial" and list(state.failed) == [(0, 0, 64, 64)]
    text = unreadable_text(state)
    assert "1 of " in text and "first at x=0, y=0" in text and "copy the slide again" in text


def test_empty_glass_is_a_valid_empty_result() -> None:
    """A slide without tissue goes straight to publish and ends as empty."""
    plan = plan_of(300, 300, 2, 8, 0.0, 0)
    executor = Pretend({"s": plan})
    [state] = Scheduler([plan.slide]).run(executor)
    assert state.status == "empty" and [w.kind for w in executor.log] == ["plan", "publish"]


def test_events_count_tiles_up_to_the_total() -> None:
    """The last tile event of a slide says all tiles are done."""
    tasks, plans = slides(2)
    events: list[Event] = []
    list(Scheduler(tasks, events.append).run(Pretend(plans)))
    for task in tasks:
        last = [e for e in events if e.kind == "tile" and e.slide == task.id][-1]
        assert last.done == last.total == len(plans[task.id].index)


def test_cancel_is_heard() -> None:
    """Once the stop is set, the next look raises Cancelled."""
    tasks, plans = slides(2)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        deque(Scheduler(tasks).run(Pretend(plans), stop), maxlen=0)


@dataclass
class Counting:
    """Finishes works in order and keeps nothing; counts how many slides it sees under way at once."""

    plan: SlidePlan
    places: int
    flying: deque[WorkUnit] = field(default_factory=deque)
    units: int = 0
    capabilities: Capabilities = field(default_factory=Capabilities)

    def room(self, kind: Kind) -> int:
        return self.places - len(self.flying)

    def start(self, unit: WorkUnit) -> None:
        self.flying.append(unit)
        self.units += 1

    def wait(self, timeout: float) -> UnitResult | None:
        unit = self.flying.popleft()
        return result_of(unit, plan=replace(self.plan, slide=unit.slide))

    def close(self, *, cancel: bool = False) -> None:
        self.flying.clear()


def many(count: int, places: int) -> tuple[int, int, float]:
    """Most slides under way, most things held, and seconds per work of a run over ``count`` slides."""
    plan = plan_of(300, 300, 2, 8, 1.0, 0)
    scheduler = Scheduler([replace(plan.slide, id=f"s{n}") for n in range(count)])
    executor, open_, held, begun = Counting(plan, places), 0, 0, time.perf_counter()
    for _ in scheduler.run(executor):
        open_ = max(open_, len(scheduler.slides) + 1)
        held = max(held, sum(map(len, scheduler.ready.values())) + len(executor.flying))
    return open_, held, (time.perf_counter() - begun) / executor.units


def test_what_is_held_does_not_grow_with_the_number_of_slides() -> None:
    """A window of slides is under way, whatever their number; what waits beyond it is a task alone."""
    few, much = many(60, 8), many(600, 8)
    assert few[0] == much[0] <= AHEAD + 8
    assert few[1] == much[1]


def test_a_slide_that_has_ended_is_let_go() -> None:
    """The state that a report is made of holds no works any more, and the street has forgotten it."""
    tasks, plans = slides(3)
    scheduler = Scheduler(tasks)
    for state in scheduler.run(Pretend(plans)):
        assert not state.interprets.units and not state.interprets.needed_by and not state.blocks_left
        assert state.task.id not in scheduler.slides
    assert scheduler.ended == scheduler.total == 3
