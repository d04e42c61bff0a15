"""Cut a slide into work units: pure arithmetic on arrays of tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsi_mmm.engine.units import BlockIndex, Kind, SlidePlan, WorkUnit, pack_tiles
from wsi_mmm.tiles.grid import blocks
from wsi_mmm.types import I64, Grid


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
    units, block_row = [], _BlockRow(plan)
    for row, column in _reached_blocks(plan).tolist():
        units.append(_make_unit("interpret", plan, (row, column), block_row.tiles(row, column)))
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


class _BlockRow:
    """Tiles of one row of blocks, by column, so that a block need not search all tiles of a slide."""

    def __init__(self, plan: SlidePlan) -> None:
        self._plan, self._row = plan, -1
        self._rows = plan.index[:, 0]  # in order: the index is row-major
        self._index = self._columns = np.zeros((0, 2), np.int64)

    def tiles(self, row: int, column: int) -> I64:
        """The tiles that share area with the window of a block, row-major."""
        grid, block = self._plan.grid, self._plan.slide.recipe.block_tiles
        window = window_of(
            grid, core_of(grid, block, (row, column), self._plan.stride), self._plan.halo, self._plan.stride
        )
        if row != self._row:
            self._load_row(row, window)
        first, last = _tiles_meeting(grid, window.x0, window.x1)
        low, high = np.searchsorted(self._columns, [first, last])
        return self._index[np.sort(self._places[low:high])]

    def _load_row(self, row: int, window: Span) -> None:
        low, high = np.searchsorted(self._rows, _tiles_meeting(self._plan.grid, window.y0, window.y1))
        self._row, self._index = row, self._plan.index[low:high]
        self._places = np.argsort(self._index[:, 1], kind="stable")
        self._columns = self._index[self._places, 1]


def _tiles_meeting(grid: Grid, start: int, stop: int) -> tuple[int, int]:
    """Rows (or columns) of tiles that share px with [start, stop): the first, and one past the last.

    Row k covers [k * stride, k * stride + tile).
    """
    return max(0, (start - grid.tile) // grid.stride + 1), -(-stop // grid.stride)


def _make_unit(kind: Kind, plan: SlidePlan, block: BlockIndex, tiles: I64) -> WorkUnit:
    return WorkUnit(kind, plan.slide, block, pack_tiles(tiles), plan.grid, plan.entry)
