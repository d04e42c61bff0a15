"""The street: which works of which slides may begin, and what their receipts add up to.

A slide walks plan -> forward of its blocks -> interpret of its blocks, each as soon as the blocks round it are in ->
publish. Pure bookkeeping: no I/O, no threads, so it can be driven by any executor and by tests.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from wsi_mmm.engine.events import Event, Listener, silent
from wsi_mmm.engine.monitoring.busy import BusyTimes
from wsi_mmm.engine.plan import SlidePlan, forward_units, interpret_units, needed_blocks
from wsi_mmm.engine.stages.extract import extract_units, squares_under, through_pool
from wsi_mmm.engine.units import Executor, Kind, Placement, SlideTask, UnitResult, WorkUnit
from wsi_mmm.errors import Cancelled

# Later stops first: what is nearly done frees memory and disk; new slides are planned while others are on their way.
ORDER: tuple[Kind, ...] = ("publish", "interpret", "forward", "extract", "plan")
POLL = 0.5  # seconds between looks at whether the user wants to stop
AHEAD = 2  # slides planned at once beyond those that keep the executor full
GUESS = 4.0  # forwards of a slide, until some are known


@dataclass(slots=True)
class SlideState:
    """What is known of a slide on its way, and in the end what became of it."""

    task: SlideTask
    status: str = "waiting"
    error: str = ""
    traceback: str = ""
    plan: SlidePlan | None = None
    tiles: int = 0
    objects: int = 0
    cache_hits: int = 0
    failed: dict[tuple[int, int, int, int], None] = field(default_factory=dict)
    forward_left: set[tuple[int, int]] = field(default_factory=set)
    waiting: dict[tuple[int, int], tuple[WorkUnit, set[tuple[int, int]]]] = field(default_factory=dict)
    unlocks: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    behind: dict[tuple[int, int], tuple[WorkUnit, set[tuple[int, int]]]] = field(default_factory=dict)  # extracts
    opens: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    interpret_left: int = 0
    running: int = 0
    started: float = 0.0
    ended: float = 0.0
    busy: list[tuple[int, float, float]] = field(default_factory=list)
    bytes_read: dict[int, int] = field(default_factory=dict)
    peak_rss_mb: dict[int, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)
    tile_cache: str = ""
    encoders: dict[int, str] = field(default_factory=dict)
    forward_span: tuple[float, float] = (0.0, 0.0)  # epoch: the first tiles are asked for, the last values are in
    payload: Any = None

    @property
    def finished(self) -> bool:
        """Nothing of this slide is left to do or to wait for."""
        return self.ended > 0


@dataclass(slots=True)
class Scheduler:
    """The works of a run that are ready, by kind, and the slides under way; a slide that has ended is let go.

    What a receipt costs does not grow with the number of slides, and what is held does not either, but for the tasks
    that are still to come.
    """

    upcoming: deque[SlideTask]
    listener: Listener = silent
    total: int = 0
    ended: int = 0
    slides: dict[str, SlideState] = field(default_factory=dict)  # under way, the one that began first at the front
    ready: dict[Kind, deque[WorkUnit]] = field(default_factory=lambda: {kind: deque() for kind in ORDER})
    busy: BusyTimes = field(default_factory=BusyTimes)
    planning: int = 0  # slides whose plan is not in yet
    planned: int = 0  # ever
    forwards: int = 0  # of all those plans
    placement: Placement = "beside"
    flying: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # forward or not

    def run(self, executor: Executor, stop: threading.Event | None = None) -> Iterator[SlideState]:
        """Drive the executor until every slide is finished; yields each slide's state as it ends.

        Raises Cancelled soon after ``stop`` is set.
        """
        while True:
            self._start(executor)
            if not any(self.flying.values()):
                return
            result = executor.wait(POLL)
            if stop is not None and stop.is_set():
                raise Cancelled("cancelled; run the same again to resume")
            if result is None:
                continue
            self.flying[result.kind == "forward"] -= 1
            state = self.slides[result.slide]
            self.receive(result)
            if state.finished:
                yield state

    def _start(self, executor: Executor) -> None:
        self._open_slides(executor)
        for kind in ORDER:
            queue = self.ready[kind]
            while queue and executor.room(kind) > 0 and not (kind == "extract" and self._ahead(executor)):
                unit = queue.popleft()
                state = self.slides.get(unit.slide.id)
                if state is None or state.status != "running":
                    continue  # of a slide that has failed meanwhile
                state.running += 1
                state.started = state.started or time.time()
                if kind == "forward":
                    state.forward_span = (state.forward_span[0] or time.time(), 0.0)
                self.flying[kind == "forward"] += 1
                executor.start(unit)

    def _ahead(self, executor: Executor) -> bool:
        """Whether so much has been extracted that the models have enough to do: what is in a cache may leave it."""
        return len(self.ready["forward"]) > 2 * AHEAD * (self.flying[True] + executor.room("forward"))

    def _open_slides(self, executor: Executor) -> None:
        """Plan as many slides as keep the executor full, by what the plans so far came to, and no more."""
        full = self.flying[True] + executor.room("forward")
        most = AHEAD + self.flying[False] + executor.room("plan")
        each = max(1.0, self.forwards / self.planned) if self.planned else GUESS
        while self.upcoming and len(self.slides) < most:
            waiting = len(self.ready["forward"])
            if waiting >= AHEAD * full or (self.planning >= AHEAD and waiting + self.planning * each >= full):
                return
            self._open(self.upcoming.popleft())

    def _open(self, task: SlideTask) -> None:
        self.slides[task.id] = SlideState(task, status="running")
        self.planning += 1
        self.ready["plan"].append(WorkUnit("plan", task))

    # ------------------------------------------------------------ receipts

    def receive(self, result: UnitResult) -> None:
        """Take in what came of a work: count it, and make ready what it allows."""
        state = self.slides[result.slide]
        state.running -= 1
        _count(state, result)
        self.busy.add(result.pid, result.busy)
        if result.kind == "plan":
            self.planning, self.planned = self.planning - 1, self.planned + 1
        if result.status == "failed":
            _fail(state, result)
        elif state.status == "running":
            next_of = {
                "plan": self._planned, "extract": self._extracted, "forward": self._forwarded,
                "interpret": self._interpreted,
            }  # fmt: skip
            next_of.get(result.kind, self._published)(state, result)
        if state.status != "running" and not state.running:
            self._end(state)

    def _end(self, state: SlideState) -> None:
        """The slide is told of, and let go: its works and its plan with it, but for what a report says of them."""
        state.ended = time.time()
        state.busy = self.busy.within(state.started, state.ended)
        del self.slides[state.task.id]
        for held in (state.forward_left, state.waiting, state.unlocks, state.behind, state.opens):
            held.clear()
        self.busy.forget(next((other.started for other in self.slides.values() if other.started), state.ended))
        self.ended += 1
        self.listener(Event("slide", state.task.id, self.ended, self.total, outcome(state)))

    def _planned(self, state: SlideState, result: UnitResult) -> None:
        if result.status == "cached":
            state.status, state.payload = "skipped", result.payload
            return
        pooled = through_pool(result.payload) if self.placement == "pool" else None
        plan = state.plan = pooled or result.payload
        units = forward_units(plan)
        self.forwards += len(units)
        state.forward_left = {unit.block for unit in units}
        if pooled:
            self._extract_first(state, plan, units)
        else:
            self.ready["forward"].extend(units)
        if plan.maps:
            for unit in interpret_units(plan):
                needs = needed_blocks(unit)
                state.waiting[unit.block] = (unit, needs)
                for block in needs:
                    state.unlocks.setdefault(block, []).append(unit.block)
        state.interpret_left = len(state.waiting)
        self.listener(Event("plan", state.task.id, 0, len(plan.index), f"{len(plan.index)} tiles"))
        self._maybe_publish(state)

    def _extract_first(self, state: SlideState, plan: SlidePlan, units: list[WorkUnit]) -> None:
        """The forwards wait until the shards under their tiles are in."""
        self.ready["extract"].extend(extract_units(plan))
        for unit in units:
            needs = squares_under(unit)
            state.behind[unit.block] = (unit, needs)
            for square in needs:
                state.opens.setdefault(square, []).append(unit.block)

    def _extracted(self, state: SlideState, result: UnitResult) -> None:
        for block in state.opens.pop(result.block, ()):
            unit, needs = state.behind[block]
            needs.discard(result.block)
            if not needs:
                del state.behind[block]
                self.ready["forward"].append(unit)

    def _forwarded(self, state: SlideState, result: UnitResult) -> None:
        state.tiles += result.tiles
        state.cache_hits += result.tiles if result.status == "cached" else 0
        if result.payload and not state.tile_cache:
            state.tile_cache = str(result.payload)
            self.listener(Event("stage", state.task.id, message=state.tile_cache))
        state.forward_left.discard(result.block)
        state.forward_span = (state.forward_span[0], time.time())
        for block in state.unlocks.pop(result.block, ()):
            unit, needs = state.waiting[block]
            needs.discard(result.block)
            if not needs:
                del state.waiting[block]
                self.ready["interpret"].append(unit)
        total = len(state.plan.index) if state.plan else 0
        self.listener(Event("tile", state.task.id, state.tiles, total))
        self._maybe_publish(state)

    def _interpreted(self, state: SlideState, result: UnitResult) -> None:
        state.interpret_left -= 1
        self._maybe_publish(state)

    def _maybe_publish(self, state: SlideState) -> None:
        if state.plan and not state.forward_left and not state.interpret_left and not state.waiting:
            self.listener(Event("stage", state.task.id, message="publishing"))
            plan = state.plan
            self.ready["publish"].append(WorkUnit("publish", plan.slide, grid=plan.grid, entry=plan.entry))

    def _published(self, state: SlideState, result: UnitResult) -> None:
        state.objects, state.payload = result.objects, result.payload
        state.status = "partial" if state.failed else ("done" if state.tiles else "empty")
        if state.failed:
            state.error = unreadable(state)


def _fail(state: SlideState, result: UnitResult) -> None:
    """Its works that wait are passed over when their turn comes."""
    if state.status == "running":
        state.status, state.error, state.traceback = "failed", result.error, str(result.payload or "")


def _count(state: SlideState, result: UnitResult) -> None:
    state.failed |= dict.fromkeys(result.failed)
    state.bytes_read[result.pid] = max(state.bytes_read.get(result.pid, 0), result.bytes_read)
    state.peak_rss_mb[result.pid] = max(state.peak_rss_mb.get(result.pid, 0.0), result.peak_rss_mb)
    state.devices |= {result.device} - {""}
    if result.encoder:
        state.encoders[result.pid] = result.encoder
    for stage, seconds in result.stages.items():
        state.stages[stage] = state.stages.get(stage, 0.0) + seconds


def open_street(tasks: Iterable[SlideTask], listener: Listener = silent, placement: Placement = "beside") -> Scheduler:
    """A street on which every slide is still to come, in the order given.

    ``placement``: tiles are read by the workers that run the model ("beside"), or by others into the cache ("pool").
    """
    upcoming = deque(tasks)
    return Scheduler(upcoming, listener, len(upcoming), placement=placement)


def unreadable(state: SlideState) -> str:
    """What is wrong with a slide that is published in part, and what mends it."""
    x, y, _, _ = min(state.failed, key=lambda tile: (tile[1], tile[0]))
    count = f"{len(state.failed)} of {state.tiles} tiles hold pixels that cannot be read (first at x={x}, y={y}"
    return f"{count}; all are in report.json): copy the slide again, then run again"


def outcome(state: SlideState) -> str:
    """How a slide ended, in words: what was found, in how many tiles, in how many seconds; or why not."""
    if state.status == "failed":
        return f"failed: {state.error}"
    facts = state.payload if isinstance(state.payload, dict) else {}
    found = sum(facts.get("objects", {}).values())
    objects = f"{found:,} object{'s' * (found != 1)} in " if facts.get("objects") else ""
    if state.status == "skipped":
        return f"{facts.get('status', 'done')} before, {objects}{facts.get('tiles', 0):,} tiles; --force redoes"
    seconds = state.ended - state.started
    rate = f" ({state.tiles / seconds:.1f} tiles/s)" if seconds > 0 and state.tiles > state.cache_hits else ""
    reason = {"empty": " (no tissue found)", "partial": f" ({len(state.failed)} tiles cannot be read)"}
    size = f"{objects}{state.tiles:,} tile{'s' * (state.tiles != 1)}"
    return f"{state.status}{reason.get(state.status, '')}, {size}, {seconds:.1f} s{rate}"


def busy_share(state: SlideState) -> float:
    """Share of the slide's wall time in which the model ran, averaged over the processes that ran it.

    The model counts as busy with whatever slide it works on: slides overlap, and what matters is that it never waits.
    """
    wall = state.ended - state.started
    by_pid: dict[int, list[tuple[float, float]]] = {}
    for pid, start, end in state.busy:
        by_pid.setdefault(pid, []).append((max(start, state.started), min(end, state.ended)))
    if wall <= 0 or not by_pid:
        return 0.0
    return min(1.0, sum(_union(spans) for spans in by_pid.values()) / len(by_pid) / wall)


def _union(spans: list[tuple[float, float]]) -> float:
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
