"""Tiles from native tiles averaged where they were decoded, or cut from canvases: for readers that know blocks only,
where target px are copied, and at the edges of the slide. The pixels are the same.

Native tiles are taken row by row, left to right; each is averaged while it is near the processor, and what its
neighbours need of it is kept: its last rows of pixels, and its last columns of vertical sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy import ndimage

from wsi_mmm.slides.base import Fetched, Reader, TileReader
from wsi_mmm.slides.resample.scaled import WHITE, Window, level0_rect, merge_failed, taps_of
from wsi_mmm.slides.resample.tiled import Key, NativeTiles, Tile, Tiling
from wsi_mmm.slides.resample.weights import U32, Taps
from wsi_mmm.types import I64, U8, Block, Canvas, Tiles

SPARSE = 0.7
"""Tiles are read in groups when these cover less than this share of the rectangle around all of them."""


def fill_tiles(reader: Reader, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
    """Write n tiles to ``out`` with any Reader, by way of canvases where it gives nothing else; see TileReader."""
    if isinstance(reader, TileReader):
        return reader.read_tiles(tiles, out, fetched)
    return cut_tiles(reader.read, tiles, out)


def cut_tiles(
    read: Callable[[Block], Canvas], tiles: Tiles, out: Sequence[U8], natives: NativeTiles | None = None
) -> I64:
    """Write every tile to ``out`` (n arrays uint8[size, size, 3]); return the level-0 rectangles that failed.

    With ``natives`` tiles are averages of these where that can be, else they are cut from what ``read`` gives.
    """
    failed = []
    for group, targets in _connected_groups(tiles, out):
        block = _block_around(group)
        axes = None if natives is None else taps_of(block, natives.tiling.source)
        if natives is not None and axes is not None and _can_average(axes, natives.tiling):
            failed.append(_average_tiles(group, targets, axes, natives))
            continue
        canvas = read(block)
        for (x, y), target in zip((group.xy - [block.x, block.y]).tolist(), targets, strict=True):
            target[...] = canvas.pixels[y : y + tiles.size, x : x + tiles.size]
        failed.append(canvas.failed)
    return merge_failed(failed)


def _block_around(tiles: Tiles) -> Block:
    """The smallest block that holds all of ``tiles``."""
    x, y = tiles.xy.min(axis=0).tolist()
    x1, y1 = (tiles.xy.max(axis=0) + tiles.size).tolist()
    return Block(x, y, x1 - x, y1 - y, tiles.scale_x, tiles.scale_y)


def _connected_groups(tiles: Tiles, out: Sequence[U8]) -> Iterator[tuple[Tiles, Sequence[U8]]]:
    """Yield the tiles to read together, and their places: all, or connected groups where these are much smaller."""
    if not len(tiles.xy):
        return
    cell = tiles.xy // tiles.size
    cell = cell - cell.min(axis=0)
    taken = np.zeros(tuple(cell.max(axis=0) + 1), bool)
    taken[tuple(cell.T)] = True
    if taken.all():
        yield tiles, out
        return
    labels, count = ndimage.label(taken, np.ones((3, 3), bool))
    label = labels[tuple(cell.T)]
    members = [np.flatnonzero(label == n) for n in range(1, count + 1)]
    groups = [replace(tiles, xy=tiles.xy[some]) for some in members]
    whole, *parts = (block.width * block.height for block in map(_block_around, (tiles, *groups)))
    if count < 2 or sum(parts) >= SPARSE * whole:
        yield tiles, out
    else:
        for group, some in zip(groups, members, strict=True):
            yield group, [out[i] for i in some.tolist()]


# ---------------------------------------------------------------- averaging in place


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of native tiles. It completes target columns from ``first`` on, which begin at ``begin``, counted from
    ``taps`` px left of it; ``used``: the px of it that are needed, from and to; ``above`` uint8[taps, width * 3]: the
    last rows of the tile before."""

    number: int
    first: int
    begin: I64
    weight: U32
    used: tuple[int, int]
    above: U8


def _can_average(axes: tuple[Taps, Taps], tiling: Tiling) -> bool:
    y, x = axes
    every_weight_has_its_row = y.stop - y.first >= tiling.height
    return every_weight_has_its_row and y.taps <= tiling.height and x.taps <= tiling.width


def _average_tiles(tiles: Tiles, out: Sequence[U8], axes: tuple[Taps, Taps], natives: NativeTiles) -> I64:
    """Write tiles to ``out``, n arrays uint8[size, size, 3]; ``axes``: y and x of the rectangle around all of them.

    The rectangle lies wholly within the source. Return the level-0 rectangles that could not be decoded (white).
    """
    from wsi_mmm.slides.resample import kernels  # numba: a third of a second, for those who resample

    (y, x), tiling = axes, natives.tiling
    height, width = tiling.height, tiling.width
    rows = range(y.first // height, -(-y.stop // height))
    stops = [0, *(y.count_complete((row + 1) * height) for row in rows)]
    columns = _native_columns(y, x, tiling)
    places = kernels.target_places(tiles.xy - tiles.xy.min(axis=0), out)
    edge = np.empty((max(np.diff(stops)), 3 * x.taps), np.uint16)
    sums = np.empty((kernels.ROWS, 3 * (x.taps + width) + kernels.PAD), np.uint16)
    band = np.empty((kernels.ROWS, 3 * max(len(column.begin) for column in columns) + kernels.PAD), np.uint8)
    scratch = np.empty((height, width, 3), np.uint8)
    failed: list[Window] = []
    for row, (start, stop) in zip(rows, pairwise(stops), strict=True):
        begin, weight = y.begin[start:stop] - row * height, y.weight[start:stop]
        here = places[(places[:, 2] < stop) & (places[:, 2] + places[:, 4] > start)]
        for column, number, tile in _decode_row(natives, row, columns, scratch):
            if not isinstance(tile, np.ndarray):
                failed += [level0_rect(tiling.source, tiling.window(number))] if isinstance(tile, str) else []
                scratch[...] = WHITE
                tile = scratch
            elif not tile.flags.writeable:  # another type to numba
                scratch[...] = tile
                tile = scratch
            kernels.average_tile(tile, column.above, edge[: stop - start], begin, weight, column.begin, column.weight,
                                 here, (start, column.first), column.used, sums, band)  # fmt: skip
    return np.array(failed, np.int64).reshape(-1, 4)


def _native_columns(y: Taps, x: Taps, tiling: Tiling) -> list[_Column]:
    """The columns of native tiles that an axis uses, from left to right."""
    width, even, first = tiling.width, x.even_weight(), 0
    columns = []
    for number in range(x.first // width, -(-x.stop // width)):
        left = number * width
        stop = x.count_complete(left + width)
        begin, used = x.begin[first:stop] - (left - x.taps), (max(0, x.first - left), min(width, x.stop - left))
        columns.append(_Column(number, first, begin, even[first:stop], used, np.empty((y.taps, 3 * width), np.uint8)))
        first = stop
    return columns


def _decode_row(
    natives: NativeTiles, row: int, columns: Sequence[_Column], scratch: U8
) -> Iterator[tuple[_Column, int, Tile]]:
    """Yield the native tiles of a row that are wanted, each until the next is asked for, from left to right."""
    source, first = natives.tiling.source, row * natives.tiling.columns
    keys = {(source.level, source.shrink, first + column.number): column for column in columns}
    wanted = [key for key in keys if natives.only is None or key[2] in natives.only]
    shared: dict[Key, Tile] = {}
    natives.cache.visit(
        [key for key in wanted if key[2] not in natives.own], natives.load, shared.__setitem__, lambda _: False
    )
    own = natives.load([key for key in wanted if key not in shared], scratch)
    for key in wanted:
        yield keys[key], key[2], shared[key] if key in shared else next(own)[1]
