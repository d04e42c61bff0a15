"""The target grid of a slide: pure, exact arithmetic on integers and arrays.

The grid is anchored at level-0 (0, 0). Tile (row, column) starts at target px (column * stride, row * stride);
edge tiles are kept and may reach beyond the slide, where they are white.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from wsi_mmm.errors import OptionError
from wsi_mmm.slides.base import require_mpp
from wsi_mmm.types import F64, I64, Grid, Mask, SlideInfo, Tiles

MAX_TILES = 100_000_000
"""More tiles than this in one grid is a slip of the recipe (a gigapixel slide has some 10,000), not a wish."""

MIN_SCALE = 0.5
"""Level-0 px per target px below which pixels would be mostly invented by interpolation."""


@dataclass(frozen=True, slots=True)
class BlockTiles:
    """The selected tiles of one aligned block of B x B grid tiles.

    ``row``/``col``: block coordinates (tile coordinates // B); ``index`` int64[k, 2]: its tiles (row, column).
    """

    row: int
    col: int
    index: I64


def make_grid(info: SlideInfo, mpp: float, *, tile: int = 512, overlap: int = 64) -> Grid:
    """The grid of square tiles of ``tile`` px at ``mpp``, neighbours sharing ``overlap`` px.

    Every level-0 pixel lies in a tile. Raises MppUnknown when the slide has no resolution and OptionError when
    the numbers make no sense, when the grid would be finer than twice the slide, or have more than MAX_TILES tiles.
    """
    _check_recipe(mpp, tile, overlap)
    scale_x, scale_y = _target_scale(info, mpp)
    if min(scale_x, scale_y) < MIN_SCALE:
        raise OptionError(
            f"mpp {mpp:g} is more than twice as fine as the slide ({info.mpp_x:g}): "
            f"ask for {MIN_SCALE * mpp / min(scale_x, scale_y):g} or more"
        )
    width, height = _target_size(info.width, scale_x), _target_size(info.height, scale_y)
    columns, rows = _count_tiles(width, tile, overlap), _count_tiles(height, tile, overlap)
    if columns * rows > MAX_TILES:
        raise OptionError(
            f"{columns} x {rows} tiles are too many for one slide: raise the tile size or mpp, or lower the overlap"
        )
    return Grid(tile, overlap, columns, rows, width, height, scale_x, scale_y, float(mpp))


def tile_xy(grid: Grid, index: I64) -> I64:
    """Level-0 (x, y) of the top-left corner of tiles ``index`` int64[n, 2] (row, column): floor(k * scale + 0.5)."""
    start = index.astype(np.int64) * grid.stride
    x = np.floor(start[:, 1] * grid.scale_x + 0.5)
    y = np.floor(start[:, 0] * grid.scale_y + 0.5)
    return np.stack([x, y], axis=1).astype(np.int64)


def tile_size_level0(grid: Grid) -> tuple[int, int]:
    """(width, height) of a tile in level-0 px, rounded as its position is."""
    return math.floor(grid.tile * grid.scale_x + 0.5), math.floor(grid.tile * grid.scale_y + 0.5)


def tiles_at(grid: Grid, index: I64) -> Tiles:
    """Return the tiles ``index`` int64[n, 2] (row, column) of a grid, as a Reader is asked for them."""
    return Tiles(index[:, ::-1] * grid.stride, grid.tile, grid.scale_x, grid.scale_y, grid.overlap)


def level0_boxes(tiles: Tiles) -> F64:
    """Return the exact level-0 rectangles float64[n, 4] (x0, y0, x1, y1) that the pixels of tiles cover."""
    low, scale = tiles.xy.astype(np.float64), (tiles.scale_x, tiles.scale_y)
    return np.concatenate([low * scale, (low + tiles.size) * scale], axis=1)


def tile_boxes(grid: Grid, index: I64) -> F64:
    """Return the `level0_boxes` of tiles ``index`` int64[n, 2] (row, column)."""
    return level0_boxes(tiles_at(grid, index))


def any_overlap(boxes: F64, rects: I64) -> Mask:
    """Return bool[n]: the ``boxes`` [n, 4] that share area with one of ``rects`` int64[m, 4] (x0, y0, x1, y1)."""
    hit = (boxes[:, None, :2] < rects[None, :, 2:]) & (boxes[:, None, 2:] > rects[None, :, :2])
    return np.asarray(hit.all(axis=-1).any(axis=-1), bool)


def blocks(grid: Grid, index: I64, block_tiles: int, rows: int | None = None) -> list[BlockTiles]:
    """Group tiles ``index`` int64[n, 2] into aligned blocks of ``block_tiles`` x ``block_tiles``, row-major.

    ``rows``: rows of tiles in a block, when other than its columns. The order of ``index`` does not matter; a tile
    given twice counts once. Raises OptionError for a tile outside the grid or ``block_tiles`` < 1.
    """
    if block_tiles < 1:
        raise OptionError(f"block_tiles is {block_tiles}: give 1 or more")
    if len(index) == 0:
        return []
    index = np.unique(index.astype(np.int64), axis=0)
    if index.min() < 0 or index[:, 0].max() >= grid.rows or index[:, 1].max() >= grid.columns:
        raise OptionError(
            f"a tile is outside the grid of {grid.rows} rows x {grid.columns} columns: select tiles again"
        )
    block = index // np.array([rows or block_tiles, block_tiles])
    ranking = np.lexsort((index[:, 1], index[:, 0], block[:, 1], block[:, 0]))
    index, block = index[ranking], block[ranking]
    cuts = np.flatnonzero(np.any(block[1:] != block[:-1], axis=1)) + 1
    starts = np.concatenate([[0], cuts])
    return [
        BlockTiles(int(block[start, 0]), int(block[start, 1]), part)
        for start, part in zip(starts, np.split(index, cuts), strict=True)
    ]


def _check_recipe(mpp: float, tile: int, overlap: int) -> None:
    if not (math.isfinite(mpp) and mpp > 0):
        raise OptionError(f"mpp is {mpp}: give micrometres per pixel above 0, such as 0.5")
    if tile < 1:
        raise OptionError(f"tile size is {tile}: give 1 px or more, such as 512")
    if not 0 <= overlap < tile:
        raise OptionError(f"overlap is {overlap} px: give 0 or more and less than the tile size of {tile} px")


def _target_scale(info: SlideInfo, mpp: float) -> tuple[float, float]:
    """Level-0 px per target px (x, y)."""
    mpp_x, mpp_y = require_mpp(info)
    return mpp / mpp_x, mpp / mpp_y


def _target_size(pixels: int, scale: float) -> int:
    """Target px that cover ``pixels`` level-0 px; none is added for what is only float rounding."""
    return max(1, math.ceil(pixels / scale - 1e-6))


def _count_tiles(size: int, tile: int, overlap: int) -> int:
    """Fewest tiles, from 0 and ``tile - overlap`` apart, that cover ``size`` px."""
    return max(1, -(-(size - overlap) // (tile - overlap)))
