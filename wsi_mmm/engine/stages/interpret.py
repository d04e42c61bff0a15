"""Interpret a block: blend the maps round it, find the objects in its core, write one part file per task."""

from __future__ import annotations

import numpy as np

from wsi_mmm.cache import ArraySpec
from wsi_mmm.engine.plan import Span, core_of, window_of
from wsi_mmm.engine.stages import workdir
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.units import WorkUnit
from wsi_mmm.outputs import polygons
from wsi_mmm.tasks.base import Task
from wsi_mmm.tasks.window import View, blend, window_weights
from wsi_mmm.timing import timed
from wsi_mmm.types import U8, Objects

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
    grid, whole = ctx.grid, task.info.dissolves
    core, window, blended = _blend_window(ctx, task, ctx.unit)
    # Regions stay in whole target px until those that seams cut are merged, and are simplified then.
    scale_x, scale_y = (1.0, 1.0) if whole else (grid.scale_x, grid.scale_y)
    view = View(
        y0=window.y0, x0=window.x0, core=(core.y0, core.x0, core.y1, core.x1),
        scale_y=scale_y, scale_x=scale_x, height=grid.height, width=grid.width,
    )  # fmt: skip
    objects = task.interpret(blended, view)
    return objects if whole else polygons.simplify(objects, SIMPLIFY * grid.scale_x)


def blended_core(ctx: UnitContext, task: Task, unit: WorkUnit) -> tuple[tuple[int, int], U8]:
    """The blended map of a block's core alone: its corner (y, x) in map px and uint8[C, h, w]."""
    core, window, blended = _blend_window(ctx, task, unit)
    y0, x0, y1, x1 = (-(-side // task.stride) for side in (core.y0, core.x0, core.y1, core.x1))
    top, left = window.y0 // task.stride, window.x0 // task.stride
    return (y0, x0), blended[:, y0 - top : y1 - top, x0 - left : x1 - left]


def _blend_window(ctx: UnitContext, task: Task, unit: WorkUnit) -> tuple[Span, Span, U8]:
    """The core of a block, its window, and the blended map uint8[C, h, w] of that window."""
    grid, index, stride = ctx.grid, unit.index(), task.stride
    core = core_of(grid, ctx.recipe.block_tiles, unit.block, stride)
    window = window_of(grid, core, task.halo, stride)
    y, x = index[:, 0] * grid.stride, index[:, 1] * grid.stride
    index = index[(y < window.y1) & (y + grid.tile > window.y0) & (x < window.x1) & (x + grid.tile > window.x0)]
    spec = ArraySpec(f"maps/{task.info.name}", (task.channels, grid.tile // stride, grid.tile // stride), "uint8")
    tiles = np.zeros((0, *spec.item), np.uint8)
    if len(index):
        low, high = index.min(axis=0), index.max(axis=0) + 1
        with timed("fetch"):
            dense = ctx.cache.read(spec, slice(low[0], high[0]), slice(low[1], high[1]))
        tiles = dense[index[:, 0] - low[0], index[:, 1] - low[1]]
    corners = (index * grid.stride - np.array([window.y0, window.x0])) // stride
    shape = (window.y1 - window.y0) // stride, (window.x1 - window.x0) // stride
    weights = window_weights(grid.tile // stride, grid.overlap // stride)
    return core, window, blend(tiles, corners, shape=shape, weights=weights)
