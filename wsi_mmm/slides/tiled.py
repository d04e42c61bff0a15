"""Filling a window of a source from native tiles that are decoded once and cached. Shared by all readers of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from wsi_mmm.slides.scaled import WHITE, Source, Window, level0_rect, merge_failed
from wsi_mmm.slides.tile_cache import TileCache
from wsi_mmm.types import I64, U8, SlideInfo

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


@dataclass(frozen=True, slots=True)
class Want:
    """How a window is filled: from ``only`` these native tiles (None: all under it); ``keep``: remember every tile.

    Without ``keep`` those that lie wholly in the window are forgotten: its neighbours do not ask for them.
    """

    only: frozenset[int] | None = None
    keep: bool = True


EVERYTHING = Want()


def fill(
    info: SlideInfo, tiling: Tiling, window: Window, canvas: U8, *, cache: TileCache[Key, Tile], load: Load,
    want: Want = EVERYTHING,
) -> I64:  # fmt: skip
    """Fill uint8[y1 - y0, x1 - x0, 3] with the window; return the level-0 rectangles of tiles that failed (white).

    What ``load`` yields may be overwritten once the next tile is asked for, except for tiles that are kept.
    """
    x0, y0, x1, y1 = window
    failed: list[Window] = []

    def place(key: Key, tile: Tile) -> None:
        left, top, right, bottom = tiling.window(key)
        a, b, c, d = max(left, x0), max(top, y0), min(right, x1), min(bottom, y1)
        target = canvas[b - y0 : d - y0, a - x0 : c - x0]
        target[...] = tile[b - top : d - top, a - left : c - left] if isinstance(tile, np.ndarray) else WHITE
        if isinstance(tile, str):
            failed.append(level0_rect(info, tiling.source, (left, top, right, bottom)))

    def inside(key: Key) -> bool:
        """Tell whether the window has all of the tile: its neighbours will not ask for it."""
        left, top, right, bottom = tiling.window(key)
        return x0 <= left and right <= x1 and y0 <= top and bottom <= y1

    keys = tiling.keys(window)
    if want.only is not None:
        keys = [key for key in keys if key[2] in want.only]
    own = [] if want.keep else [key for key in keys if inside(key)]
    if own:
        mine = set(own)
        keys = [key for key in keys if key not in mine]
        for key, tile, _ in load(own, keep=False):
            place(key, tile)
    cache.visit(keys, load, place, inside)
    return merge_failed([np.array(failed, np.int64).reshape(-1, 4)])
