"""Interpret a block: blend the maps round it, find the objects in its core, write one part file per task."""

from __future__ import annotations

import numpy as np

from wsi_mmm.cache import ArraySpec, CacheEntry
from wsi_mmm.engine.plan import Span, core_of, window_of
from wsi_mmm.engine.stages import workdir
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.units import WorkUnit
from wsi_mmm.outputs import polygons
from wsi_mmm.tasks.base import Task
from wsi_mmm.tasks.window import View, blend, window_weights
from wsi_mmm.timing import timed
from wsi_mmm.types import I64, U8, Objects

SIMPLIFY = 0.35  # target px an outline may move: a third of what the map resolves, and half the corners


def interpret(ctx: UnitContext) -> int:
    """Write the part of each pixel task; gives the number of objects."""
    count = 0
    for task in ctx.tasks:
        if task.scope == "pixel":
            objects = _find_objects(ctx, task)
            workdir.check_kept(ctx.task)
            workdir.save_part(ctx.task, task.info.name, ctx.unit.block, objects)
            count += len(objects)
    return count


def _find_objects(ctx: UnitContext, task: Task) -> Objects:
    grid = ctx.grid
    core, window = _core_and_window(task, ctx.unit)
    # Regions stay in whole target px until those that seams cut are merged.
    scale_x, scale_y = (1.0, 1.0) if task.info.dissolves else (grid.scale_x, grid.scale_y)
    view = View(
        y0=window.y0, x0=window.x0, core=(core.y0, core.x0, core.y1, core.x1),
        scale_y=scale_y, scale_x=scale_x, height=grid.height, width=grid.width,
    )  # fmt: skip
    objects = task.interpret(_blend_window(task, ctx.unit, ctx.cache, window), view)
    # Regions are simplified once they are whole; single objects here, where blocks run side by side.
    return objects if task.info.dissolves else polygons.simplify(objects, SIMPLIFY * grid.scale_x)


def blended_core(task: Task, unit: WorkUnit, cache: CacheEntry) -> tuple[tuple[int, int], U8]:
    """The blended map of a block's core alone: its corner (y, x) in map px and uint8[C, h, w]."""
    core, window = _core_and_window(task, unit)
    y0, x0 = -(-core.y0 // task.stride), -(-core.x0 // task.stride)
    y1, x1 = -(-core.y1 // task.stride), -(-core.x1 // task.stride)
    top, left = window.y0 // task.stride, window.x0 // task.stride
    return (y0, x0), _blend_window(task, unit, cache, window)[:, y0 - top : y1 - top, x0 - left : x1 - left]


def _core_and_window(task: Task, unit: WorkUnit) -> tuple[Span, Span]:
    core = core_of(unit.planned_grid, unit.slide.recipe.block_tiles, unit.block, task.stride)
    return core, window_of(unit.planned_grid, core, task.halo, task.stride)


def _blend_window(task: Task, unit: WorkUnit, cache: CacheEntry, window: Span) -> U8:
    grid = unit.planned_grid
    shape = ((window.y1 - window.y0) // task.stride, (window.x1 - window.x0) // task.stride)
    tiles, corners = _tiles_in(task, unit, cache, window)
    return blend(
        tiles, corners, shape=shape, weights=window_weights(grid.tile // task.stride, grid.overlap // task.stride)
    )


def _tiles_in(task: Task, unit: WorkUnit, cache: CacheEntry, window: Span) -> tuple[U8, I64]:
    """Maps uint8[k, C, h, h] of the tiles that touch the window and their corners int64[k, 2] in window map px."""
    grid, index = unit.planned_grid, unit.index()
    y, x = index[:, 0] * grid.stride, index[:, 1] * grid.stride
    keep = (y < window.y1) & (y + grid.tile > window.y0) & (x < window.x1) & (x + grid.tile > window.x0)
    index = index[keep]
    side = grid.tile // task.stride
    if not len(index):
        return np.zeros((0, task.channels, side, side), np.uint8), np.zeros((0, 2), np.int64)
    low, high = index.min(axis=0), index.max(axis=0) + 1
    spec = ArraySpec(f"maps/{task.info.name}", (task.channels, side, side), "uint8")
    with timed("fetch"):
        dense = cache.read(spec, slice(low[0], high[0]), slice(low[1], high[1]))
    corners = (index * grid.stride - np.array([window.y0, window.x0])) // task.stride
    return dense[index[:, 0] - low[0], index[:, 1] - low[1]], corners
