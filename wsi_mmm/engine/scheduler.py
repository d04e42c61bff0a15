"""The scheduler: which units of which slides may begin, and which slides have ended.

A slide goes through plan -> forward of its blocks -> interpret of its blocks, each as soon as the blocks round it are
in -> publish. No I/O and no threads, so it can be driven by any executor and by tests.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from wsi_mmm.engine.events import Event, Listener, SlideStatus, silent
from wsi_mmm.engine.plan import (
    extract_units,
    forward_units,
    interpret_units,
    needed_blocks,
    shard_groups_under,
    through_pool,
)
from wsi_mmm.engine.recipe import OFF_SCALE
from wsi_mmm.engine.units import (
    BlockIndex,
    Box,
    Executor,
    ExtractResult,
    Failure,
    ForwardResult,
    InterpretResult,
    Kind,
    PlanResult,
    PublishResult,
    SlidePlan,
    SlideSummary,
    SlideTask,
    UnitResult,
    Watch,
    WorkUnit,
)
from wsi_mmm.errors import Cancelled, ModelNotLoaded
from wsi_mmm.options import Placement

# Later stages first: a slide that is nearly done frees memory and disk.
PRIORITY: tuple[Kind, ...] = ("publish", "interpret", "forward", "extract", "plan")
POLL = 0.5  # seconds between looks at whether the user wants to stop
AHEAD = 2  # slides planned at once beyond those that keep the executor full
GUESS = 4.0  # forwards of a slide, until some are known


@dataclass(slots=True)
class Blocked:
    """Units that wait for blocks (or groups of shards): each becomes ready when all that it needs are in."""

    units: dict[BlockIndex, tuple[WorkUnit, set[BlockIndex]]] = field(default_factory=dict)
    needed_by: dict[BlockIndex, list[BlockIndex]] = field(default_factory=dict)

    def add(self, unit: WorkUnit, needs: set[BlockIndex]) -> None:
        """Hold a unit until all of ``needs`` are in."""
        self.units[unit.block] = (unit, needs)
        for block in needs:
            self.needed_by.setdefault(block, []).append(unit.block)

    def release(self, block: BlockIndex) -> Iterator[WorkUnit]:
        """The units that became ready because ``block`` is in."""
        for waiting in self.needed_by.pop(block, ()):
            unit, needs = self.units[waiting]
            needs.discard(block)
            if not needs:
                del self.units[waiting]
                yield unit


@dataclass(slots=True)
class SlideState:
    """A slide under way, and in the end how it ended.

    ``status``: None until it has ended; ``resumed``: an earlier run had published it; ``failed``: tiles with pixels
    that cannot be read; ``tile_cache``: what was measured and chosen for its tiles, for people. ``started``,
    ``ended``: epoch seconds, 0 before.
    """

    task: SlideTask
    status: SlideStatus | None = None
    resumed: bool = False
    error: str = ""
    traceback: str = ""
    plan: SlidePlan | None = None
    summary: SlideSummary | None = None
    tiles: int = 0
    failed: dict[Box, None] = field(default_factory=dict)
    tile_cache: str = ""
    started: float = 0.0
    ended: float = 0.0
    running: int = 0
    blocks_left: int = 0  # to forward and to interpret
    interprets: Blocked = field(default_factory=Blocked)  # by the forwards of the blocks round them
    forwards: Blocked = field(default_factory=Blocked)  # by the extracts under their tiles

    @property
    def seconds(self) -> float:
        """Seconds from its first unit to its end."""
        return max(0.0, self.ended - self.started)


def enlarged_text(plan: SlidePlan) -> str:
    """The warning for a slide that is coarser than the resolution asked for; empty for others."""
    if min(plan.grid.scale_x, plan.grid.scale_y) * OFF_SCALE >= 1:
        return ""
    scanned = max(plan.info.mpp_x or 0.0, plan.info.mpp_y or 0.0)
    asked = f"{plan.slide.recipe.mpp:g} mpp"
    return (
        f"{plan.slide.id} was scanned at {scanned:g} mpp, coarser than the {asked} asked for: its pixels are enlarged"
    )


def listed_text(plan: SlidePlan) -> str:
    """The warning for listed tiles of a resolution that the model did not learn at; empty for others, and where the
    recipe's own resolution is off, which is said of the run."""
    learnt = plan.slide.recipe.model_mpp
    if not plan.grid.listed or learnt is None or plan.slide.recipe.warns_of_scale():
        return ""
    if 1 / OFF_SCALE <= plan.grid.mpp / learnt <= OFF_SCALE:
        return ""
    return f"{plan.slide.id}: its listed tiles are of {plan.grid.mpp:.4g} mpp, and the encoder learnt at {learnt:g} mpp"


class Scheduler:
    """The units of a run that are ready, by kind, and the slides under way; a slide that has ended is forgotten.

    Neither the cost of a result nor the memory grows with the number of slides, except for the tasks still to come.
    ``placement``: tiles are read by the workers that run the model ("beside"), or by others into the cache ("pool").
    Without a cache they are read beside the model.
    """

    def __init__(
        self, tasks: Iterable[SlideTask], listener: Listener = silent, placement: Placement = "beside"
    ) -> None:
        self.upcoming = deque(tasks)
        self.listener, self.placement = listener, placement
        self.total, self.ended = len(self.upcoming), 0
        self.slides: dict[str, SlideState] = {}  # under way, the one that began first at the front
        self.ready: dict[Kind, deque[WorkUnit]] = {kind: deque() for kind in PRIORITY}
        self.running: Counter[Kind] = Counter()
        self.planning = 0  # slides whose plan is not in yet
        self.planned, self.planned_forwards = 0, 0  # plans ever, and forwards of all of them
        self.computed = False  # some tile has gone through the model
        self.warnings: list[str] = []  # what was said of slides, once per run

    def run(
        self, executor: Executor, stop: threading.Event | None = None, watch: Watch = lambda unit_or_result: None
    ) -> Iterator[SlideState]:
        """Drive the executor until every slide has ended; yields each slide's state as it ends.

        Raises Cancelled soon after ``stop`` is set; ModelNotLoaded when the model cannot be used and no tile went
        through it yet: then the fault is not one worker's.
        """
        while True:
            self._open_slides(executor)
            for unit in self._next_units(executor):
                watch(unit)
                executor.start(unit)
            if not self.running.total():
                return
            result = executor.wait(POLL)
            if stop is not None and stop.is_set():
                raise Cancelled("cancelled; run the same again to resume")
            if result is None:
                continue
            watch(result)
            if isinstance(result, Failure) and result.of_model and not self.computed:
                raise ModelNotLoaded(result.error)
            state = self.receive(result)
            if state.status is not None and not state.running:
                state.ended = time.time()
                del self.slides[state.task.id]
                self.ended += 1
                yield state

    # ------------------------------------------------------------ starting units

    def _open_slides(self, executor: Executor) -> None:
        """Plan as many slides as keep the executor full, by what the plans so far came to, and no more."""
        forwards = self.running["forward"]
        full = forwards + executor.room("forward")
        most = AHEAD + self.running.total() - forwards + executor.room("plan")
        each = max(1.0, self.planned_forwards / self.planned) if self.planned else GUESS
        while self.upcoming and len(self.slides) < most:
            waiting = len(self.ready["forward"])
            if waiting >= AHEAD * full or (self.planning >= AHEAD and waiting + self.planning * each >= full):
                return
            task = self.upcoming.popleft()
            self.slides[task.id] = SlideState(task)
            self.planning += 1
            self.ready["plan"].append(WorkUnit("plan", task))

    def _next_units(self, executor: Executor) -> Iterator[WorkUnit]:
        """Units to start now, as long as the executor has room."""
        for kind in PRIORITY:
            queue = self.ready[kind]
            while queue and executor.room(kind) > 0 and not (kind == "extract" and self._enough_extracted(executor)):
                unit = queue.popleft()
                state = self.slides.get(unit.slide.id)
                if state is None or state.status is not None:
                    continue  # of a slide that has failed meanwhile
                state.running += 1
                state.started = state.started or time.time()
                self.running[kind] += 1
                yield unit

    def _enough_extracted(self, executor: Executor) -> bool:
        """The models have enough to do: what is extracted too early may be evicted from the cache."""
        return len(self.ready["forward"]) > 2 * AHEAD * (self.running["forward"] + executor.room("forward"))

    # ------------------------------------------------------------ taking in results

    def receive(self, result: UnitResult) -> SlideState:
        """Take in a result and make ready the units that it allows; gives the state of its slide."""
        state = self.slides[result.facts.slide]
        state.running -= 1
        self.running[result.facts.kind] -= 1
        if result.facts.kind == "plan":
            self.planning, self.planned = self.planning - 1, self.planned + 1
        if state.status is not None:
            return state  # it has failed; other units of it were still running
        match result:
            case Failure():
                state.status, state.error, state.traceback = SlideStatus.FAILED, result.error, result.traceback
            case PlanResult():
                self._take_plan(state, result)
            case ExtractResult():
                self.ready["forward"].extend(state.forwards.release(result.facts.block))
            case ForwardResult():
                self._take_forward(state, result)
            case InterpretResult():
                state.blocks_left -= 1
                self._publish_when_ready(state)
            case PublishResult():
                state.summary = result.summary
                done = SlideStatus.DONE if state.tiles else SlideStatus.EMPTY
                state.status = SlideStatus.PARTIAL if state.failed else done
        return state

    def _take_plan(self, state: SlideState, result: PlanResult) -> None:
        if result.plan is None:
            assert result.published is not None
            state.status, state.resumed, state.summary = result.published.status, True, result.published
            return
        pooled = through_pool(result.plan) if self.placement == "pool" else None
        plan = state.plan = pooled or result.plan
        units = forward_units(plan)
        self.planned_forwards += len(units)
        if pooled:  # the forwards wait until the shards under their tiles are in
            self.ready["extract"].extend(extract_units(plan))
            for unit in units:
                state.forwards.add(unit, shard_groups_under(unit))
        else:
            self.ready["forward"].extend(units)
        if plan.maps:
            for unit in interpret_units(plan):
                state.interprets.add(unit, needed_blocks(unit))
        state.blocks_left = len(units) + len(state.interprets.units)
        if not self.warnings and (text := enlarged_text(plan) or listed_text(plan)):
            self.warnings.append(f"{text}; report.json lists every such slide")
            self.listener(Event("warning", "", message=self.warnings[0]))
        self.listener(Event("plan", state.task.id, 0, len(plan.index), f"{len(plan.index)} tiles"))
        self._publish_when_ready(state)

    def _take_forward(self, state: SlideState, result: ForwardResult) -> None:
        state.tiles += result.tiles
        self.computed = self.computed or not result.cached
        state.failed |= dict.fromkeys(result.failed)
        if result.tile_cache and not state.tile_cache:
            state.tile_cache = result.tile_cache
            self.listener(Event("stage", state.task.id, message=state.tile_cache))
        state.blocks_left -= 1
        self.ready["interpret"].extend(state.interprets.release(result.facts.block))
        total = len(state.plan.index) if state.plan else 0
        self.listener(Event("tile", state.task.id, state.tiles, total))
        self._publish_when_ready(state)

    def _publish_when_ready(self, state: SlideState) -> None:
        if state.plan is not None and not state.blocks_left:
            self.listener(Event("stage", state.task.id, message="publishing"))
            plan = state.plan
            self.ready["publish"].append(WorkUnit("publish", plan.slide, grid=plan.grid, entry=plan.entry))
