"""Plans over made-up grids, and results of units that nobody ran, for tests of the engine."""

from __future__ import annotations

import numpy as np

from wsi_mmm.engine.events import SlideStatus
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import (
    Box,
    ExtractResult,
    ForwardResult,
    InterpretResult,
    PlanResult,
    PublishResult,
    SlidePlan,
    SlideSummary,
    SlideTask,
    UnitFacts,
    UnitResult,
    WorkUnit,
)
from wsi_mmm.timing import StepTime
from wsi_mmm.types import Grid, SlideInfo


def plan_of(width: int, height: int, block: int, overlap: int, keep: float, seed: int) -> SlidePlan:
    """A plan over a random choice of 64 px tiles."""
    tile = 64
    stride = tile - overlap
    columns, rows = max(1, -(-(width - overlap) // stride)), max(1, -(-(height - overlap) // stride))
    grid = Grid(tile, overlap, columns, rows, width, height, 1.0, 1.0, 0.5)
    chosen = np.argwhere(np.random.default_rng(seed).random((rows, columns)) < keep).astype(np.int64)
    recipe = Recipe("m", "h", ("t",), 0.5, tile, overlap, block_tiles=block)
    info = SlideInfo("s", width, height, 0.5, 0.5, (), "v", "r", "f")
    task = SlideTask("s", "s", "/out/s", recipe, reader=info.reader)
    return SlidePlan(task, info, grid, chosen, np.ones(len(chosen), np.float32), "/e", 20, 2, 0.5)


def facts_of(unit: WorkUnit, *times: StepTime, worker: str = "a:1", bytes_read: int = 0) -> UnitFacts:
    """The facts of a result of ``unit``."""
    return UnitFacts(unit.kind, unit.slide.id, unit.block, 1, worker, bytes_read, 0.0, times)


def result_of(
    unit: WorkUnit, *times: StepTime, plan: SlidePlan | None = None, failed: tuple[Box, ...] = (), objects: int = 7
) -> UnitResult:
    """The result of a unit that went well; ``plan``: that of a "plan" unit."""
    facts = facts_of(unit, *times)
    if unit.kind == "plan":
        return PlanResult(facts, plan)
    if unit.kind == "extract":
        return ExtractResult(facts)
    if unit.kind == "forward":
        return ForwardResult(facts, len(unit.index()), failed)
    if unit.kind == "interpret":
        return InterpretResult(facts, objects)
    return PublishResult(facts, SlideSummary(SlideStatus.DONE, objects={"t": objects}))
