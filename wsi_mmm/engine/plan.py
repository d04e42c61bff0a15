"""Cut a slide into work units: pure arithmetic on arrays of tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from wsi_mmm.cache.shard import SHARD
from wsi_mmm.engine.units import BlockIndex, Kind, SlidePlan, WorkUnit, pack_tiles
from wsi_mmm.tiles.grid import blocks
from wsi_mmm.types import I64, Grid

SIDE = 4  # shards of the cache of pixels along a group that one unit brings in: 4,096 px of the target grid


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open rectangle in target px."""

    y0: int
    x0: int
    y1: int
    x1: int


def forward_units(plan: SlidePlan) -> list[WorkUnit]:
    """One unit per block that holds tiles, row-major."""
    found = blocks(plan.grid, plan.index, plan.slide.recipe.block_tiles)
    return [_make_unit("forward", plan, (block.row, block.col), block.index) for block in found]


def interpret_units(plan: SlidePlan) -> list[WorkUnit]:
    """One unit per block whose core some tile reaches, with the tiles that its window needs; row-major."""
    grid, units = plan.grid, []
    for row, blocks_of_row in groupby(_reached_blocks(plan).tolist(), lambda block: int(block[0])):
        columns = [column for _, column in blocks_of_row]
        cores = [core_of(grid, plan.slide.recipe.block_tiles, (row, column), plan.stride) for column in columns]
        windows = [window_of(grid, core, plan.halo, plan.stride) for core in cores]
        # The tiles of a row of blocks by column, so that a block need not search all tiles of a slide.
        low, high = np.searchsorted(plan.index[:, 0], _tiles_meeting(grid, windows[0].y0, windows[0].y1))
        tiles = plan.index[low:high]
        by_column = np.argsort(tiles[:, 1], kind="stable")
        for column, window in zip(columns, windows, strict=True):
            low, high = np.searchsorted(tiles[:, 1], _tiles_meeting(grid, window.x0, window.x1), sorter=by_column)
            units.append(_make_unit("interpret", plan, (row, column), tiles[np.sort(by_column[low:high])]))
    return units


def core_of(grid: Grid, block_tiles: int, block: BlockIndex, stride: int = 1) -> Span:
    """The rectangle of the slide whose objects a block owns; cores tile the slide without gap or overlap.

    The slide's far edges are rounded up to whole map pixels of ``stride`` px.
    """
    step = block_tiles * grid.stride
    rows, columns = -(-grid.rows // block_tiles), -(-grid.columns // block_tiles)
    height, width = -(-grid.height // stride) * stride, -(-grid.width // stride) * stride
    y0, x0 = min(height, block[0] * step), min(width, block[1] * step)
    y1 = height if block[0] == rows - 1 else min(height, y0 + step)
    x1 = width if block[1] == columns - 1 else min(width, x0 + step)
    return Span(y0, x0, y1, x1)


def window_of(grid: Grid, core: Span, halo: int, stride: int) -> Span:
    """The core with ``halo`` px of context, clipped to the slide and aligned to whole map pixels of ``stride`` px."""
    y0 = max(0, core.y0 - halo) // stride * stride
    x0 = max(0, core.x0 - halo) // stride * stride
    y1 = -(-min(grid.height, core.y1 + halo) // stride) * stride
    x1 = -(-min(grid.width, core.x1 + halo) // stride) * stride
    return Span(y0, x0, y1, x1)


def needed_blocks(unit: WorkUnit) -> set[BlockIndex]:
    """The blocks whose forward must be in before this work can be interpreted."""
    block = unit.slide.recipe.block_tiles
    return set(map(tuple, (unit.index() // block).tolist()))


def _reached_blocks(plan: SlidePlan) -> I64:
    """Blocks int64[n, 2] whose core overlaps some tile: a tile may reach into the next block by its overlap."""
    grid, block = plan.grid, plan.slide.recipe.block_tiles
    if not len(plan.index):
        return np.zeros((0, 2), np.int64)
    last = np.array([-(-grid.rows // block) - 1, -(-grid.columns // block) - 1])
    size = np.array([grid.height, grid.width])
    end = np.minimum(plan.index * grid.stride + grid.tile, size) - 1
    low = plan.index // block
    high = np.minimum(end // (block * grid.stride), last)
    corners = [np.stack([r, c], 1) for r in (low[:, 0], high[:, 0]) for c in (low[:, 1], high[:, 1])]
    return np.unique(np.concatenate(corners), axis=0)


def _tiles_meeting(grid: Grid, start: int, stop: int) -> tuple[int, int]:
    """Rows (or columns) of tiles that share px with [start, stop): the first, and one past the last.

    Row k covers [k * stride, k * stride + tile).
    """
    return max(0, (start - grid.tile) // grid.stride + 1), -(-stop // grid.stride)


def _make_unit(kind: Kind, plan: SlidePlan, block: BlockIndex, tiles: I64) -> WorkUnit:
    return WorkUnit(kind, plan.slide, block, pack_tiles(tiles), plan.grid, plan.entry)


# ---------------------------------------------------------------- placement "pool": pixels into the shared cache


def through_pool(plan: SlidePlan) -> SlidePlan | None:
    """The plan with tiles that go through the cache; None where there is no cache, or no tile of a grid."""
    recipe = plan.slide.recipe
    if recipe.options.cache is None or not len(plan.index) or plan.grid.listed:
        return None
    recipe = replace(recipe, options=replace(recipe.options, cache_tiles="on"))
    return replace(plan, slide=replace(plan.slide, recipe=recipe))


def extract_units(plan: SlidePlan) -> list[WorkUnit]:
    """One unit per group of `SIDE` x `SIDE` shards that holds some tile; ``tiles`` are its shards (row, column).

    Each group is brought in once; a block's forward begins when the groups under its tiles are in.
    """
    shards = _shards_under(plan.grid, plan.index)
    corners, number = np.unique(shards // SIDE, axis=0, return_inverse=True)
    return [
        _make_unit("extract", plan, (row, column), shards[number.ravel() == group])
        for group, (row, column) in enumerate(corners.tolist())
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
