"""Native tiles over a source: the ones that tiles of a target grid need, and windows filled from them.

Native tiles are decoded once and cached, bounded in bytes; one that a thread is decoding is waited for by the others.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from wsi_mmm.slides.resample.scaled import NO_FAILURES, WHITE, Source, Window, copied, level0_rect, merge_failed
from wsi_mmm.slides.resample.weights import reach
from wsi_mmm.types import I64, U8, Mask, Tiles

CACHE_BYTES = 128 << 20
Key = tuple[int, int, int]  # level, shrink, tile number (row-major)
Tile = U8 | None | str  # pixels; None: the file leaves this tile out; str: why it cannot be decoded
_BLANK_SIZE = 64

TileKey = TypeVar("TileKey", bound=Hashable)
Value = TypeVar("Value")


class TileCache(Generic[TileKey, Value]):
    """Least recently used goes first; *cold* values (unlikely to be asked again) go before all others."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._hot: OrderedDict[TileKey, tuple[Value, int]] = OrderedDict()
        self._cold: OrderedDict[TileKey, tuple[Value, int]] = OrderedDict()
        self._loading: set[TileKey] = set()
        self._changed = threading.Condition()

    def visit(
        self,
        keys: Sequence[TileKey],
        load: Callable[[Sequence[TileKey]], Iterator[tuple[TileKey, Value, int]]],
        use: Callable[[TileKey, Value], None],
        cold: Callable[[TileKey], bool],
    ) -> None:
        """Call ``use`` once with every key's value; ``load`` yields (key, value, bytes), and is asked only for what
        nobody has or is loading.

        What ``load`` raises goes to the caller; other threads that waited for those keys then load them themselves.
        """
        left = list(keys)
        while left:
            have, mine, theirs = self._claim_keys(left)
            for key, value in have:
                use(key, value)
            left = theirs
            if not mine:
                continue
            try:
                for key, value, size in load(mine):
                    use(key, value)
                    self._store_value(key, value, size, cold=cold(key))
            finally:
                with self._changed:
                    self._loading.difference_update(mine)
                    self._changed.notify_all()

    def missing(self, keys: Sequence[TileKey]) -> list[TileKey]:
        """Return which of ``keys`` are not here at this moment."""
        with self._changed:
            return [key for key in keys if key not in self._hot and key not in self._cold]

    def clear(self) -> None:
        """Forget everything."""
        with self._changed:
            self._hot.clear()
            self._cold.clear()
            self.used = 0

    def _claim_keys(self, keys: Sequence[TileKey]) -> tuple[list[tuple[TileKey, Value]], list[TileKey], list[TileKey]]:
        """Return what is here, the keys to load here, and those that others load: of these alone, one has come."""
        have: list[tuple[TileKey, Value]] = []
        mine: list[TileKey] = []
        theirs: list[TileKey] = []
        with self._changed:
            while self._loading and self._loading.issuperset(keys):
                self._changed.wait()
            for key in keys:
                values = self._hot if key in self._hot else self._cold
                if key in values:
                    values.move_to_end(key)
                    have.append((key, values[key][0]))
                else:
                    (theirs if key in self._loading else mine).append(key)
            self._loading.update(mine)
        return have, mine, theirs

    def _store_value(self, key: TileKey, value: Value, size: int, *, cold: bool) -> None:
        with self._changed:
            self._loading.discard(key)
            (self._cold if cold else self._hot)[key] = (value, size)
            self.used += size
            while self.used > self.limit and (self._cold or self._hot):
                _, (_, freed) = (self._cold or self._hot).popitem(last=False)
                self.used -= freed
            self._changed.notify_all()


class Load(Protocol):
    """Decode tiles; with ``scratch`` in the order given, and to there, where the next tile overwrites them."""

    def __call__(self, keys: Sequence[Key], /, scratch: U8 | None = None) -> Iterator[tuple[Key, Tile, int]]: ...


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

    def window(self, number: int) -> Window:
        """Return where a tile lies in the source; the last ones are clipped to it."""
        row, column = divmod(number, self.columns)
        x, y = column * self.width, row * self.height
        return x, y, min(x + self.width, self.source.width), min(y + self.height, self.source.height)


@dataclass(frozen=True, slots=True)
class NativeTiles:
    """The native tiles of ``tiling``, from ``cache`` or got by ``load``: those numbered in ``only`` (None: all).

    Those in ``own`` are forgotten once they were used: what is read next to this does not ask for them.
    """

    tiling: Tiling
    cache: TileCache[Key, Tile]
    load: Load
    only: frozenset[int] | None = None
    own: frozenset[int] = frozenset()


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


def own_numbers(tiles: Tiles, tiling: Tiling, numbers: I64) -> I64:
    """Return those of ``numbers`` that no neighbour of the rectangle around ``tiles`` needs: wholly within it, less
    what it shares with its neighbours."""
    source, own = tiling.source, np.ones(len(numbers), bool)
    places = zip(divmod(numbers, tiling.columns), (tiling.height, tiling.width), strict=True)
    scales = tiles.scale_y / source.downsample_y, tiles.scale_x / source.downsample_x
    for (place, side), scale, start in zip(places, scales, (tiles.xy[:, 1], tiles.xy[:, 0]), strict=True):
        first, stop = int(start.min()) + tiles.overlap, int(start.max()) + tiles.size - tiles.overlap
        own &= (place >= math.ceil(first * scale / side)) & (place < math.floor(stop * scale / side))
    return numbers[own]


def fill(natives: NativeTiles, window: Window, canvas: U8) -> I64:
    """Fill uint8[y1 - y0, x1 - x0, 3] with the window; return the level-0 rectangles of tiles that failed (white)."""
    tiling = natives.tiling
    places, whole = _place_tiles(natives, window)
    failed: list[Window] = []

    def place(key: Key, tile: Tile) -> None:
        target, part = places[key]
        canvas[target] = tile[part] if isinstance(tile, np.ndarray) else WHITE
        if isinstance(tile, str):
            failed.append(level0_rect(tiling.source, tiling.window(key[2])))

    own = [key for key in whole if key[2] in natives.own]
    scratch = np.empty((tiling.height, tiling.width, 3), np.uint8) if own else None
    for key, tile, _ in natives.load(own, scratch):
        place(key, tile)
    shared = [key for key in places if key not in whole or key[2] not in natives.own]
    natives.cache.visit(shared, natives.load, place, whole.__contains__)
    return merge_failed([np.array(failed, np.int64)]) if failed else NO_FAILURES


Part = tuple[slice, slice]


def _place_tiles(natives: NativeTiles, window: Window) -> tuple[dict[Key, tuple[Part, Part]], dict[Key, None]]:
    """Per tile under the window where it goes, and which part of it; and those that lie wholly in the window."""
    x0, y0, x1, y1 = window
    source, width, height = natives.tiling.source, natives.tiling.width, natives.tiling.height
    places: dict[Key, tuple[Part, Part]] = {}
    whole: dict[Key, None] = {}
    for row in range(y0 // height, -(-y1 // height)):
        top = row * height
        bottom = min(top + height, source.height)
        b, d = max(top, y0), min(bottom, y1)
        down, rows = slice(b - y0, d - y0), slice(b - top, d - top)
        for column in range(x0 // width, -(-x1 // width)):
            number = row * natives.tiling.columns + column
            if natives.only is not None and number not in natives.only:
                continue
            left = column * width
            right = min(left + width, source.width)
            a, c = max(left, x0), min(right, x1)
            key = (source.level, source.shrink, number)
            places[key] = (down, slice(a - x0, c - x0)), (rows, slice(a - left, c - left))
            if (a, b, c, d) == (left, top, right, bottom):
                whole[key] = None
    return places, whole
