"""Native tiles over a source: the ones that tiles of a target grid need, and windows filled from them.

Native tiles are decoded once and cached. Shared by all readers of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from wsi_mmm.slides.resample.scaled import NO_FAILURES, WHITE, Source, Window, copied, level0_rect, merge_failed
from wsi_mmm.slides.resample.tile_cache import TileCache
from wsi_mmm.slides.resample.weights import reach
from wsi_mmm.types import I64, U8, Mask, SlideInfo, Tiles

CACHE_BYTES = 128 << 20
Key = tuple[int, int, int]  # level, shrink, tile number (row-major)
Tile = U8 | None | str  # pixels; None: the file leaves this tile out; str: why it cannot be decoded
_BLANK_SIZE = 64


class Load(Protocol):
    """Decode tiles in any order. Without ``keep`` the pixels may lie in memory that the next tile overwrites."""

    def __call__(self, keys: Sequence[Key], /, *, keep: bool = True) -> Iterator[tuple[Key, Tile, int]]: ...


def size_of(tile: Tile) -> int:
    """Return the bytes a tile takes in the cache."""
    return tile.nbytes if isinstance(tile, np.ndarray) else _BLANK_SIZE


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of ``width`` x ``height`` source px over one source."""

    source: Source
    width: int
    height: int

    @property
    def columns(self) -> int:
        """Tiles across."""
        return -(-self.source.width // self.width)

    def keys(self, window: Window) -> list[Key]:
        """List the tiles under a window, row-major."""
        x0, y0, x1, y1 = window
        return [
            (self.source.level, self.source.shrink, row * self.columns + column)
            for row in range(y0 // self.height, -(-y1 // self.height))
            for column in range(x0 // self.width, -(-x1 // self.width))
        ]

    def window(self, key: Key) -> Window:
        """Return where a tile lies in the source; the last ones are clipped to it."""
        row, column = divmod(key[2], self.columns)
        x, y = column * self.width, row * self.height
        return x, y, min(x + self.width, self.source.width), min(y + self.height, self.source.height)


def nested(tiles: Tiles, tiling: Tiling) -> Mask:
    """Return bool[n]: tiles made of whole native tiles, pixel for pixel, that lie wholly on the slide."""
    source = tiling.source
    width, height = tiling.width, tiling.height
    if not copied(source, tiles.scale_x, tiles.scale_y) or tiles.size % width or tiles.size % height:
        return np.zeros(len(tiles.xy), bool)
    x, y = tiles.xy[:, 0], tiles.xy[:, 1]
    right, bottom = min(source.extent_x, source.width) - tiles.size, min(source.extent_y, source.height) - tiles.size
    return np.asarray((x % width == 0) & (y % height == 0) & (x <= right) & (y <= bottom), bool)


def inner_numbers(tiles: Tiles, tiling: Tiling) -> I64:
    """Return the numbers int64[n, k * k] of the native tiles of nested tiles, row-major in each."""
    down, across = tiles.size // tiling.height, tiles.size // tiling.width
    row, column = tiles.xy[:, 1] // tiling.height, tiles.xy[:, 0] // tiling.width
    inner = np.arange(down)[:, None] * tiling.columns + np.arange(across)
    return (row * tiling.columns + column)[:, None] + inner.ravel()


def needed_numbers(tiles: Tiles, tiling: Tiling) -> I64:
    """Return the sorted numbers int64[m] of all native tiles that some tile uses."""
    if nested(tiles, tiling).all():
        return np.sort(inner_numbers(tiles, tiling), axis=None)
    source = tiling.source
    c0, c1 = _tile_span(tiles.xy[:, 0], tiles.size, tiles.scale_x / source.downsample_x, source.width, tiling.width)
    r0, r1 = _tile_span(tiles.xy[:, 1], tiles.size, tiles.scale_y / source.downsample_y, source.height, tiling.height)
    left, top = int(c0.min()), int(r0.min())
    marks = np.zeros((int(r1.max()) - top + 1, int(c1.max()) - left + 1), np.int32)
    for r, c, sign in ((r0, c0, 1), (r0, c1, -1), (r1, c0, -1), (r1, c1, 1)):  # a rectangle is four corners, summed
        np.add.at(marks, (r - top, c - left), sign)
    row, column = np.nonzero(marks.cumsum(axis=0).cumsum(axis=1))
    return np.asarray((row + top) * tiling.columns + column + left, np.int64)


def _tile_span(start: I64, count: int, scale: float, size: int, step: int) -> tuple[I64, I64]:
    """First native tile and one past the last along an axis, for tiles that begin at ``start``."""
    first, stop = reach(start, count, scale)
    first, stop = np.clip(first, 0, size), np.clip(stop, 0, size)
    stop = np.where(stop > first, -(-stop // step), first // step)
    return np.minimum(first // step, stop), stop


@dataclass(frozen=True, slots=True)
class Want:
    """Native tiles that a window is filled from: ``only`` these (None: all under it).

    Those that lie wholly within ``inner`` (x0, y0, x1, y1; source px) are forgotten once they were used: the window's
    neighbours do not ask for them. None: every tile is kept in the cache.
    """

    only: frozenset[int] | None = None
    inner: tuple[float, float, float, float] | None = None

    def inner_range(self, axis: int, side: int) -> range:
        """The native tiles within ``inner`` along axis 0 (x) or 1 (y), which are ``side`` px wide."""
        if self.inner is None:
            return range(0)
        return range(math.ceil(self.inner[axis] / side), math.floor(self.inner[axis + 2] / side))


EVERYTHING = Want()


def fill(
    info: SlideInfo, tiling: Tiling, window: Window, canvas: U8, *, cache: TileCache[Key, Tile], load: Load,
    want: Want = EVERYTHING,
) -> I64:  # fmt: skip
    """Fill uint8[y1 - y0, x1 - x0, 3] with the window; return the level-0 rectangles of tiles that failed (white).

    What ``load`` yields may be overwritten once the next tile is asked for, except for tiles that are kept.
    """
    places, whole, own = _place_tiles(tiling, window, want)
    failed: list[Window] = []

    def place(key: Key, tile: Tile) -> None:
        target, part = places[key]
        canvas[target] = tile[part] if isinstance(tile, np.ndarray) else WHITE
        if isinstance(tile, str):
            failed.append(level0_rect(info, tiling.source, tiling.window(key)))

    for key, tile, _ in load(list(own), keep=False) if own else ():
        place(key, tile)
    if len(own) < len(places):
        cache.visit([key for key in places if key not in own], load, place, whole.__contains__)
    return merge_failed([np.array(failed, np.int64)]) if failed else NO_FAILURES


Part = tuple[slice, slice]


def _place_tiles(
    tiling: Tiling, window: Window, want: Want
) -> tuple[dict[Key, tuple[Part, Part]], set[Key], dict[Key, None]]:
    """Per tile under the window where it goes, and which part of it; those that lie wholly in the window; and those of
    them that are not to be kept, in order."""
    x0, y0, x1, y1 = window
    source, width, height, columns = tiling.source, tiling.width, tiling.height, tiling.columns
    inner_rows, inner_columns = want.inner_range(1, height), want.inner_range(0, width)
    places: dict[Key, tuple[Part, Part]] = {}
    whole: set[Key] = set()
    own: dict[Key, None] = {}
    for row in range(y0 // height, -(-y1 // height)):
        top = row * height
        bottom = min(top + height, source.height)
        b, d = max(top, y0), min(bottom, y1)
        down, rows = slice(b - y0, d - y0), slice(b - top, d - top)
        for column in range(x0 // width, -(-x1 // width)):
            number = row * columns + column
            if want.only is not None and number not in want.only:
                continue
            left = column * width
            right = min(left + width, source.width)
            a, c = max(left, x0), min(right, x1)
            key = (source.level, source.shrink, number)
            places[key] = (down, slice(a - x0, c - x0)), (rows, slice(a - left, c - left))
            if (a, b, c, d) == (left, top, right, bottom):
                whole.add(key)
                if row in inner_rows and column in inner_columns:
                    own[key] = None
    return places, whole, own
