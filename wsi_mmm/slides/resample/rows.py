"""Averaging native tiles where they were decoded: no canvas between the codec and the target pixels.

Native tiles are taken row by row, left to right; each is averaged while it is near the processor, and what its
neighbours need of it is kept: its last rows of pixels, and its last columns of vertical sums. For tiles whose rectangle
lies wholly within the source; others go by way of `scaled.read_scaled`, and the pixels are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat

import numpy as np

from wsi_mmm.slides.resample.scaled import WHITE
from wsi_mmm.slides.resample.tile_cache import TileCache
from wsi_mmm.slides.resample.tiled import Key, Tile, Tiling, Want, size_of
from wsi_mmm.slides.resample.weights import U32, Taps, as_rows
from wsi_mmm.types import I64, U8, Tiles

DecodeInto = Callable[[Sequence[int], Iterator[U8 | None]], Iterator[tuple[int, Tile]]]  # numbers, where to -> tiles


@dataclass(frozen=True, slots=True)
class NativeTiles:
    """The native tiles of ``tiling`` that ``want`` names, got by ``decode`` or from ``cache``."""

    tiling: Tiling
    want: Want
    cache: TileCache[Key, Tile]
    decode: DecodeInto


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of native tiles. It completes target columns ``first`` to ``stop`` - 1, which begin at ``begin``,
    counted from ``taps`` px left of it; ``above`` uint8[taps, width * 3]: the last rows of the tile before."""

    number: int
    first: int
    stop: int
    begin: I64
    weight: U32
    above: U8


def can_average(axes: tuple[Taps, Taps], tiling: Tiling) -> bool:
    """Tell whether `average_tiles` can make a rectangle that lies wholly within the source."""
    y, x = axes
    every_weight_has_its_row = y.stop - y.first >= tiling.height
    return every_weight_has_its_row and y.taps <= tiling.height and x.taps <= tiling.width


def average_tiles(tiles: Tiles, out: Sequence[U8], axes: tuple[Taps, Taps], source: NativeTiles) -> list[int]:
    """Write tiles to ``out``, n arrays uint8[size, size, 3]; ``axes``: y and x of the rectangle around all of them.

    Return the numbers of native tiles that could not be decoded (white).
    """
    from wsi_mmm.slides.resample import kernels  # numba: a third of a second, for those who resample

    (y, x), tiling = axes, source.tiling
    height, width, lead = tiling.height, 3 * tiling.width, 3 * x.taps
    rows = range(y.first // height, -(-y.stop // height))
    stops = [0, *(y.count_complete((row + 1) * height) for row in rows)]
    most = max(np.diff(stops))
    band, edge = np.empty((most, 3 * len(x.begin)), np.uint8), np.empty((most, lead), np.uint16)
    sums = np.empty((kernels.ROWS, lead + width + kernels.PAD), np.uint16)
    scratch = np.empty((height, tiling.width, 3), np.uint8)
    columns, targets = _native_columns(y, x, tiling), _targets_by_row(tiles, out)
    failed: list[int] = []
    for row, (start, stop) in zip(rows, pairwise(stops), strict=True):
        begin, weight, count = y.begin[start:stop] - row * height, y.weight[start:stop], stop - start
        for column, number, tile in _decode_row(source, row, columns, scratch):
            if not isinstance(tile, np.ndarray):
                failed += [number] if isinstance(tile, str) else []
                scratch[...] = WHITE
                tile = scratch
            elif not tile.flags.writeable:  # another type to numba
                scratch[...] = tile
                tile = scratch
            kernels.average_tile(tile.reshape(height, width), column.above, edge[:count], begin, weight, column.begin,
                                 column.weight, band[:count, 3 * column.first : 3 * column.stop], sums)  # fmt: skip
        _copy_rows(band[:count], start, tiles.size, targets)
    return failed


def _native_columns(y: Taps, x: Taps, tiling: Tiling) -> list[_Column]:
    """The columns of native tiles that an axis uses, from left to right."""
    width, even, first = tiling.width, x.even_weight(), 0
    columns = []
    for number in range(x.first // width, -(-x.stop // width)):
        stop = x.count_complete((number + 1) * width)
        begin = x.begin[first:stop] - (number * width - x.taps)
        above = np.empty((y.taps, 3 * width), np.uint8)
        columns.append(_Column(number, first, stop, begin, even[first:stop], above))
        first = stop
    return columns


def _decode_row(
    source: NativeTiles, row: int, columns: Sequence[_Column], scratch: U8
) -> Iterator[tuple[_Column, int, Tile]]:
    """Yield the native tiles of a row that are wanted, each until the next is asked for, from left to right.

    Those that no neighbouring rectangle needs are decoded to ``scratch``; the others come from the cache.
    """
    tiling, want = source.tiling, source.want
    numbers = {row * tiling.columns + column.number: column for column in columns}
    wanted = [number for number in numbers if want.only is None or number in want.only]
    inner = want.inner_range(0, tiling.width) if row in want.inner_range(1, tiling.height) else range(0)
    own = [number for number in wanted if numbers[number].number in inner]
    shared: dict[int, Tile] = {}
    if len(own) < len(wanted):
        _visit_shared(source, [number for number in wanted if numbers[number].number not in inner], shared)
    decoded = source.decode(own, repeat(scratch))
    for number in wanted:
        tile = shared[number] if number in shared else next(decoded)[1]
        yield numbers[number], number, tile


def _visit_shared(source: NativeTiles, numbers: Sequence[int], found: dict[int, Tile]) -> None:
    """Find the tiles that neighbouring rectangles need too, decoding those that none of them has."""
    level, shrink = source.tiling.source.level, source.tiling.source.shrink

    def load(keys: Sequence[Key]) -> Iterator[tuple[Key, Tile, int]]:
        for number, tile in source.decode([key[2] for key in keys], repeat(None)):
            yield (level, shrink, number), tile, size_of(tile)

    def put(key: Key, tile: Tile) -> None:
        found[key[2]] = tile

    source.cache.visit([(level, shrink, number) for number in numbers], load, put, lambda _: False)


def _targets_by_row(tiles: Tiles, out: Sequence[U8]) -> dict[int, list[tuple[int, U8]]]:
    """Tiles by their first row in the rectangle around all of them: the first byte in a row of it, and their rows."""
    found: dict[int, list[tuple[int, U8]]] = {}
    for (x, y), target in zip((tiles.xy - tiles.xy.min(axis=0)).tolist(), out, strict=True):
        found.setdefault(y, []).append((3 * x, as_rows(target)))
    return found


def _copy_rows(band: U8, first: int, size: int, targets: dict[int, list[tuple[int, U8]]]) -> None:
    """Copy ``band``, rows of the rectangle from ``first`` on, to the tiles of ``size`` px that lie there."""
    for y, places in targets.items():
        start, stop = max(y, first), min(y + size, first + len(band))
        if start < stop:
            rows = band[start - first : stop - first]
            for left, target in places:
                target[start - y : stop - y] = rows[:, left : left + 3 * size]
