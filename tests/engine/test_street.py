"""The bookkeeping of a run, driven by an executor that only pretends."""

from __future__ import annotations

import random
import threading
from collections import deque
from dataclasses import dataclass, field, replace

import pytest

from helpers.plans import plan_of
from wsi_mmm.engine.base import Kind, Receipt, SlideTask, Work
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.plan import SlidePlan
from wsi_mmm.engine.street import SlideState, busy_share, open_street, outcome
from wsi_mmm.errors import Cancelled


@dataclass
class Pretend:
    """Finishes works in a random order; ``fail`` names a work that fails, ``partial`` one with a bad tile."""

    plans: dict[str, SlidePlan]
    seed: int = 0
    fail: str = ""
    partial: str = ""
    log: list[Work] = field(default_factory=list)
    flying: list[Work] = field(default_factory=list)

    def room(self, kind: Kind) -> int:
        return 4 - len(self.flying)

    def start(self, work: Work) -> None:
        self.flying.append(work)

    def wait(self, timeout: float) -> Receipt | None:
        work = self.flying.pop(random.Random(self.seed + len(self.log)).randrange(len(self.flying)))
        self.log.append(work)
        base = Receipt(work.kind, work.slide.id, work.block, "ok", pid=1)
        if work.name == self.fail:
            return replace(base, status="failed", error="storm")
        if work.kind == "plan":
            return replace(base, payload=self.plans[work.slide.id])
        if work.kind == "forward":
            bad = ((0, 0, 64, 64),) if work.name == self.partial else ()
            return replace(base, tiles=len(work.index()), failed=bad, status="partial" if bad else "ok")
        return replace(base, objects=7)

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
    states = list(open_street(tasks).run(executor))
    assert {s.status for s in states} == {"done"} and len(states) == 4
    names = [work.name for work in executor.log]
    assert len(names) == len(set(names))
    seen: dict[str, set[tuple[int, int]]] = {t.id: set() for t in tasks}
    for work in executor.log:
        if work.kind == "forward":
            seen[work.slide.id].add(work.block)
        if work.kind == "interpret":
            assert {(r // 2, c // 2) for r, c in work.index().tolist()} <= seen[work.slide.id]
    for task in tasks:
        assert [w.kind for w in executor.log if w.slide.id == task.id][-1] == "publish"


def test_a_slide_that_fails_does_not_stop_the_others() -> None:
    """One failed work fails its slide, publishes nothing of it, and the rest goes on."""
    tasks, plans = slides(3)
    block = plans["s1"].index[0] // 2
    executor = Pretend(plans, fail=f"s1/forward/{block[0]}-{block[1]}")
    states = {s.task.id: s for s in open_street(tasks).run(executor)}
    assert {name: s.status for name, s in states.items()} == {"s0": "done", "s1": "failed", "s2": "done"}
    assert states["s1"].error == "storm"
    assert not any(w.kind == "publish" and w.slide.id == "s1" for w in executor.log)


def test_a_bad_tile_makes_the_slide_partial_and_is_listed() -> None:
    """A tile that cannot be read is listed; the slide is published and marked partial."""
    tasks, plans = slides(1)
    block = plans["s0"].index[0] // 2
    [state] = open_street(tasks).run(Pretend(plans, partial=f"s0/forward/{block[0]}-{block[1]}"))
    assert state.status == "partial" and list(state.failed) == [(0, 0, 64, 64)]
    assert "1 of " in state.error and "first at x=0, y=0" in state.error and "copy the slide again" in state.error


def test_empty_glass_is_a_valid_empty_result() -> None:
    """A slide without tissue goes straight to publish and ends as empty."""
    plan = plan_of(300, 300, 2, 8, 0.0, 0)
    executor = Pretend({"s": plan})
    [state] = open_street([plan.slide]).run(executor)
    assert state.status == "empty" and [w.kind for w in executor.log] == ["plan", "publish"]


def test_events_count_tiles_up_to_the_total() -> None:
    """The last tile event of a slide says all tiles are done."""
    tasks, plans = slides(2)
    events: list[Event] = []
    list(open_street(tasks, events.append).run(Pretend(plans)))
    for task in tasks:
        last = [e for e in events if e.kind == "tile" and e.slide == task.id][-1]
        assert last.done == last.total == len(plans[task.id].index)


def test_how_a_slide_ended_is_said_in_numbers() -> None:
    """Objects, tiles and seconds of a slide that is done; the reason of one that is not; what was done before."""
    state = SlideState(slides(1)[0][0], status="done", tiles=26, started=1.0, ended=11.0)
    state.payload = {"objects": {"nuclei": 2431}, "tiles": 26, "status": "done"}
    assert outcome(state) == "done, 2,431 objects in 26 tiles, 10.0 s (2.6 tiles/s)"
    state.status = "skipped"
    assert outcome(state) == "done before, 2,431 objects in 26 tiles; --force redoes"
    state.status, state.error = "failed", "no mpp"
    assert outcome(state) == "failed: no mpp"
    empty = SlideState(state.task, status="empty", started=1.0, ended=2.5)
    assert outcome(empty) == "empty (no tissue found), 0 tiles, 1.5 s"


def test_cancel_is_heard() -> None:
    """Once the stop is set, the next look raises Cancelled."""
    tasks, plans = slides(2)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        deque(open_street(tasks).run(Pretend(plans), stop), maxlen=0)


def test_busy_share_is_the_union_of_model_time_over_wall_time() -> None:
    """Overlapping model threads of one process are not counted twice."""
    tasks, plans = slides(1)
    [state] = open_street(tasks).run(Pretend(plans))
    state.started, state.ended = 100.0, 110.0
    state.busy = [(1, 100.0, 104.0), (1, 102.0, 106.0), (1, 108.0, 110.0)]
    assert busy_share(state) == pytest.approx(0.8)


def test_a_slide_counts_the_model_busy_with_its_neighbours_too() -> None:
    """Two slides under way at once: neither was idle while the model worked on the other; time outside is cut off."""
    tasks, plans = slides(2)
    street = open_street(tasks)
    for name in ("s0", "s1"):
        street.slides[name].started = 100.0
        street.active.add(name)
        street.slides[name].running = 1
        street.slides[name].plan, street.slides[name].status = plans[name], "running"
    for name, span in (("s0", (99.0, 104.0)), ("s1", (104.0, 107.0))):
        street.receive(Receipt("interpret", name, (0, 0), "ok", pid=1, busy=(span,)))
    street.slides["s0"].ended = street.slides["s1"].ended = 110.0
    assert busy_share(street.slides["s0"]) == busy_share(street.slides["s1"]) == pytest.approx(0.7)
