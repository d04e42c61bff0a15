"""Extract: CPU workers read tiles into the shared cache, from which the workers that run models take them.

The cache keeps shards of pixels. Each unit brings in a group of `SIDE` x `SIDE` neighbouring shards, and each group is
brought in once; a block's forward begins when the groups under its tiles are in.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from wsi_mmm.cache import CachedReader
from wsi_mmm.cache.shard import SHARD
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.units import BlockIndex, SlidePlan, WorkUnit, pack_tiles
from wsi_mmm.types import I64, Grid, Tiles

SIDE = 4  # shards along a group: 4,096 px of the target grid


def through_pool(plan: SlidePlan) -> SlidePlan | None:
    """The plan with tiles that go through the cache; None where there is no cache, or no tile."""
    recipe = plan.slide.recipe
    if recipe.options.cache is None or not len(plan.index):
        return None
    recipe = replace(recipe, options=replace(recipe.options, cache_tiles="on"))
    return replace(plan, slide=replace(plan.slide, recipe=recipe))


def extract_units(plan: SlidePlan) -> list[WorkUnit]:
    """One unit per group of shards that holds some tile; ``tiles`` are its shards (row, column)."""
    if not len(plan.index):
        return []
    shards = _shards_under(plan.grid, plan.index)
    corners, number = np.unique(shards // SIDE, axis=0, return_inverse=True)
    groups = np.split(shards[np.argsort(number.ravel(), kind="stable")], np.cumsum(np.bincount(number.ravel()))[:-1])
    return [
        WorkUnit("extract", plan.slide, (int(row), int(column)), pack_tiles(group), plan.grid, plan.entry)
        for (row, column), group in zip(corners, groups, strict=True)
    ]


def shard_groups_under(unit: WorkUnit) -> set[BlockIndex]:
    """The groups of shards that hold the pixels of a forward unit: the ``block`` of their extract units."""
    return set(map(tuple, (_shards_under(unit.planned_grid, unit.index()) // SIDE).tolist()))


def _shards_under(grid: Grid, index: I64) -> I64:
    """Shards int64[n, 2] (row, column) that tiles touch within the slide, each once, row-major."""
    steps = np.unique(np.append(np.arange(0, grid.tile, SHARD), grid.tile - 1))
    offsets = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    corners = (index[:, None] * grid.stride + offsets).reshape(-1, 2)
    inside = np.minimum(corners, np.array([grid.height, grid.width]) - 1)  # the last tiles reach beyond the slide
    return np.unique(inside // SHARD, axis=0)


def extract(ctx: UnitContext) -> None:
    """Read the shards of a unit that the cache does not hold; the cache knows what cannot be read of them."""
    grid, index = ctx.grid, ctx.unit.index()
    cached = ctx.reader(Tiles(index[:, ::-1] * grid.stride, grid.tile, grid.scale_x, grid.scale_y))
    assert isinstance(cached, CachedReader)  # see `through_pool`
    cached.fill([(row, column) for row, column in index.tolist()])
