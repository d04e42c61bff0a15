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

from wsi_mmm.engine.base import Executor, Kind, Receipt, SlideTask, Work
from wsi_mmm.engine.events import Event, Listener, silent
from wsi_mmm.engine.plan import SlidePlan, forward_works, interpret_works, needed_blocks
from wsi_mmm.errors import Cancelled

# Later stops first: what is nearly done frees memory and disk; new slides are planned while others are on their way.
ORDER: tuple[Kind, ...] = ("publish", "interpret", "forward", "plan")
POLL = 0.5  # seconds between looks at whether the user wants to stop
AHEAD = 2  # slides planned or running at once beyond those that keep the executor full


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
    waiting: dict[tuple[int, int], tuple[Work, set[tuple[int, int]]]] = field(default_factory=dict)
    unlocks: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
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
class Street:
    """All slides of a run and the works that are ready, by kind."""

    slides: dict[str, SlideState]
    listener: Listener = silent
    ready: dict[Kind, deque[Work]] = field(default_factory=lambda: {kind: deque() for kind in ORDER})
    upcoming: deque[SlideState] = field(default_factory=deque)
    active: set[str] = field(default_factory=set)

    def run(self, executor: Executor, stop: threading.Event | None = None) -> Iterator[SlideState]:
        """Drive the executor until every slide is finished; yields each slide's state as it ends.

        Raises Cancelled soon after ``stop`` is set.
        """
        running = 0
        while True:
            running += self._start(executor)
            if not running:
                return
            receipt = executor.wait(POLL)
            if stop is not None and stop.is_set():
                raise Cancelled("cancelled; run the same again to resume")
            if receipt is None:
                continue
            running -= 1
            state = self.slides[receipt.slide]
            self.receive(receipt)
            if state.finished:
                yield state

    def _start(self, executor: Executor) -> int:
        started = 0
        self._open_slides(executor)
        for kind in ORDER:
            while self.ready[kind] and executor.room(kind) > 0:
                work = self.ready[kind].popleft()
                state = self.slides[work.slide.id]
                state.running += 1
                state.started = state.started or time.time()
                if kind == "forward":
                    state.forward_span = (state.forward_span[0] or time.time(), 0.0)
                self.active.add(state.task.id)
                executor.start(work)
                started += 1
        return started

    def _open_slides(self, executor: Executor) -> None:
        active = sum(1 for state in self.slides.values() if state.status == "running")
        while self.upcoming and active < AHEAD + executor.room("plan"):
            state = self.upcoming.popleft()
            state.status = "running"
            self.ready["plan"].append(Work("plan", state.task))
            active += 1

    # ------------------------------------------------------------ receipts

    def receive(self, receipt: Receipt) -> None:
        """Take in what came of a work: count it, and make ready what it allows."""
        state = self.slides[receipt.slide]
        state.running -= 1
        _count(state, receipt)
        for other in self.active:
            self.slides[other].busy += [(receipt.pid, start, end) for start, end in receipt.busy]
        if receipt.status == "failed":
            self._fail(state, receipt)
        elif state.status == "running":
            next_of = {"plan": self._planned, "forward": self._forwarded, "interpret": self._interpreted}
            next_of.get(receipt.kind, self._published)(state, receipt)
        if state.status != "running" and not state.running and not state.finished:
            state.ended = time.time()
            self.active.discard(state.task.id)
            done = sum(1 for s in self.slides.values() if s.finished)
            self.listener(Event("slide", state.task.id, done, len(self.slides), outcome(state)))

    def _planned(self, state: SlideState, receipt: Receipt) -> None:
        if receipt.status == "cached":
            state.status, state.payload = "skipped", receipt.payload
            return
        plan: SlidePlan = receipt.payload
        state.plan = plan
        works = forward_works(plan)
        state.forward_left = {work.block for work in works}
        self.ready["forward"].extend(works)
        if plan.maps:
            for work in interpret_works(plan):
                needs = needed_blocks(work)
                state.waiting[work.block] = (work, needs)
                for block in needs:
                    state.unlocks.setdefault(block, []).append(work.block)
        state.interpret_left = len(state.waiting)
        self.listener(Event("plan", state.task.id, 0, len(plan.index), f"{len(plan.index)} tiles"))
        self._maybe_publish(state)

    def _forwarded(self, state: SlideState, receipt: Receipt) -> None:
        state.tiles += receipt.tiles
        state.cache_hits += receipt.tiles if receipt.status == "cached" else 0
        if receipt.payload and not state.tile_cache:
            state.tile_cache = str(receipt.payload)
            self.listener(Event("stage", state.task.id, message=state.tile_cache))
        state.forward_left.discard(receipt.block)
        state.forward_span = (state.forward_span[0], time.time())
        for block in state.unlocks.pop(receipt.block, ()):
            work, needs = state.waiting[block]
            needs.discard(receipt.block)
            if not needs:
                del state.waiting[block]
                self.ready["interpret"].append(work)
        total = len(state.plan.index) if state.plan else 0
        self.listener(Event("tile", state.task.id, state.tiles, total))
        self._maybe_publish(state)

    def _interpreted(self, state: SlideState, receipt: Receipt) -> None:
        state.interpret_left -= 1
        self._maybe_publish(state)

    def _maybe_publish(self, state: SlideState) -> None:
        if state.plan and not state.forward_left and not state.interpret_left and not state.waiting:
            self.listener(Event("stage", state.task.id, message="publishing"))
            plan = state.plan
            self.ready["publish"].append(Work("publish", state.task, grid=plan.grid, entry=plan.entry))

    def _published(self, state: SlideState, receipt: Receipt) -> None:
        state.objects, state.payload = receipt.objects, receipt.payload
        state.status = "partial" if state.failed else ("done" if state.tiles else "empty")
        if state.failed:
            state.error = unreadable(state)

    def _fail(self, state: SlideState, receipt: Receipt) -> None:
        if state.status == "running":
            state.status, state.error, state.traceback = "failed", receipt.error, str(receipt.payload or "")
        for queue in self.ready.values():
            kept = [work for work in queue if work.slide.id != state.task.id]
            queue.clear()
            queue.extend(kept)


def _count(state: SlideState, receipt: Receipt) -> None:
    state.failed |= dict.fromkeys(receipt.failed)
    state.bytes_read[receipt.pid] = max(state.bytes_read.get(receipt.pid, 0), receipt.bytes_read)
    state.peak_rss_mb[receipt.pid] = max(state.peak_rss_mb.get(receipt.pid, 0.0), receipt.peak_rss_mb)
    state.devices |= {receipt.device} - {""}
    if receipt.encoder:
        state.encoders[receipt.pid] = receipt.encoder
    for stage, seconds in receipt.stages.items():
        state.stages[stage] = state.stages.get(stage, 0.0) + seconds


def open_street(tasks: Iterable[SlideTask], listener: Listener = silent) -> Street:
    """A street on which every slide is still to come, in the order given."""
    slides = {task.id: SlideState(task) for task in tasks}
    return Street(slides, listener, upcoming=deque(slides.values()))


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
