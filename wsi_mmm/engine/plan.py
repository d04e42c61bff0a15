"""Cutting a slide into works: pure arithmetic on arrays of tiles."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from wsi_mmm.engine.base import Kind, SlideTask, Work, pack
from wsi_mmm.engine.decoding import Choice
from wsi_mmm.tiles.grid import blocks
from wsi_mmm.types import F32, I64, Grid, SlideInfo


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """One slide, planned: its grid and the tiles ``index`` int64[n, 2] (row, column) that hold tissue.

    ``tissue`` float32[n]: share of each tile that is tissue. ``entry``: URI of the cache entry its values rest in.
    ``maps``: some task answers per pixel, so blocks are interpreted. ``decode``: where native tiles are decoded.
    """

    slide: SlideTask
    info: SlideInfo
    grid: Grid
    index: I64
    tissue: F32
    entry: str
    halo: int
    stride: int
    mpp_effective: float
    maps: bool = True
    decode: Choice = field(default_factory=Choice)


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open rectangle in target px."""

    y0: int
    x0: int
    y1: int
    x1: int


def forward_works(plan: SlidePlan) -> list[Work]:
    """One work per block that holds tiles, row-major."""
    found = blocks(plan.grid, plan.index, plan.slide.recipe.block_tiles)
    return [_work("forward", plan, (block.row, block.col), block.index) for block in found]


def interpret_works(plan: SlidePlan) -> list[Work]:
    """One work per block whose core some tile reaches, carrying the tiles that its window needs; row-major."""
    cores = _reached(plan)
    return [_work("interpret", plan, (int(r), int(c)), _window_tiles(plan, int(r), int(c))) for r, c in cores]


def core_of(grid: Grid, block_tiles: int, block: tuple[int, int], stride: int = 1) -> Span:
    """The rectangle of the slide that a block alone speaks for; cores tile the slide without gap or overlap.

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


def needed_blocks(work: Work) -> set[tuple[int, int]]:
    """The blocks whose forward must be in before this work can be interpreted."""
    block = work.slide.recipe.block_tiles
    return {(int(r), int(c)) for r, c in np.unique(work.index() // block, axis=0)}


def _reached(plan: SlidePlan) -> I64:
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


def _window_tiles(plan: SlidePlan, row: int, column: int) -> I64:
    grid = plan.grid
    core = core_of(grid, plan.slide.recipe.block_tiles, (row, column), plan.stride)
    window = window_of(grid, core, plan.halo, plan.stride)
    y, x = plan.index[:, 0] * grid.stride, plan.index[:, 1] * grid.stride
    keep = (y < window.y1) & (y + grid.tile > window.y0) & (x < window.x1) & (x + grid.tile > window.x0)
    return plan.index[keep]


def _work(kind: Kind, plan: SlidePlan, block: tuple[int, int], tiles: I64) -> Work:
    return Work(kind, plan.slide, block, pack(tiles), plan.grid, plan.entry, plan.decode.on)
