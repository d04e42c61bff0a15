"""Extracting: CPU workers read tiles into the shared cache, from which the workers that run models take them.

The cache keeps shards of pixels. They are brought in by squares of shards, each by one work and only once; a block's
forward begins when the squares under its tiles are in.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np

from wsi_mmm.cache.shard import SHARD
from wsi_mmm.engine.plan import SlidePlan
from wsi_mmm.engine.stages import context
from wsi_mmm.engine.units import UnitResult, WorkUnit, pack
from wsi_mmm.types import I64, Grid

SIDE = 4  # shards along a square: 4,096 px of the target grid

Square = tuple[int, int]


def through_pool(plan: SlidePlan) -> SlidePlan | None:
    """The plan with tiles that go through the cache; None where there is no cache or no tile."""
    recipe = plan.slide.recipe
    if recipe.options.cache is None or not len(plan.index):
        return None
    recipe = replace(recipe, options=replace(recipe.options, cache_tiles="on"))
    return replace(plan, slide=replace(plan.slide, recipe=recipe))


def extract_units(plan: SlidePlan) -> list[WorkUnit]:
    """One work per square of shards that holds some tile; ``tiles`` are its shards (row, column)."""
    if not len(plan.index):
        return []
    shards = _shards(plan.grid, plan.index)
    squares, number = np.unique(shards // SIDE, axis=0, return_inverse=True)
    groups = np.split(shards[np.argsort(number.ravel(), kind="stable")], np.cumsum(np.bincount(number.ravel()))[:-1])
    return [
        WorkUnit("extract", plan.slide, (int(row), int(column)), pack(group), plan.grid, plan.entry)
        for (row, column), group in zip(squares, groups, strict=True)
    ]


def squares_under(unit: WorkUnit) -> set[Square]:
    """The squares that hold the pixels of a forward work."""
    assert unit.grid is not None
    return set(map(tuple, (_shards(unit.grid, unit.index()) // SIDE).tolist()))


def _shards(grid: Grid, index: I64) -> I64:
    """Shards int64[n, 2] (row, column) that tiles touch within the slide, each once, row-major."""
    steps = np.unique(np.append(np.arange(0, grid.tile, SHARD), grid.tile - 1))
    offsets = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    corners = (index[:, None] * grid.stride + offsets).reshape(-1, 2)
    inside = np.minimum(corners, np.array([grid.height, grid.width]) - 1)  # the last tiles reach beyond the slide
    return np.unique(inside // SHARD, axis=0)


def extract(unit: WorkUnit) -> UnitResult:
    """Bring the shards of a work in that are not; what cannot be read of them is known to the cache."""
    started = time.perf_counter()
    assert unit.grid is not None
    with context.slide_of(unit.slide) as slide:
        cached = context.reader_of(slide, unit.slide, unit.grid, unit.index())
        assert cached is not None  # see `through_pool`
        cached.fill([(row, column) for row, column in unit.index().tolist()])
        spent = {"extract": time.perf_counter() - started}
        return UnitResult(
            "extract", unit.slide.id, unit.block, "ok", pid=os.getpid(), stages=spent,
            bytes_read=slide.reader.stats().bytes_read, peak_rss_mb=context.peak_rss_mb(),
        )  # fmt: skip
