"""Filling a window of a source from native tiles that are decoded once and cached. Shared by all readers of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.slides.scaled import WHITE, Source, Window, level0_rect, merge_failed
from wsi_mmm.slides.tile_cache import TileCache
from wsi_mmm.types import I64, U8, SlideInfo

CACHE_BYTES = 128 << 20
Key = tuple[int, int, int]  # level, shrink, tile number (row-major)
Tile = U8 | None | str  # pixels; None: the file leaves this tile out; str: why it cannot be decoded
Load = Callable[[Sequence[Key]], Iterator[tuple[Key, Tile, int]]]
_BLANK_SIZE = 64


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


def fill(info: SlideInfo, tiling: Tiling, window: Window, *, cache: TileCache[Key, Tile], load: Load) -> tuple[U8, I64]:
    """Return uint8[y1 - y0, x1 - x0, 3] of the window and the level-0 rectangles of tiles that failed (white)."""
    x0, y0, x1, y1 = window
    canvas = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
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

    cache.visit(tiling.keys(window), load, place, inside)
    return canvas, merge_failed([np.array(failed, np.int64).reshape(-1, 4)])
