"""A Reader over a library that reads regions of levels (OpenSlide, tiffslide).

Regions are asked for on a fixed grid of chunks per level. Where a level's downsample is no integer such libraries
interpolate by where a region starts; on fixed chunks a pixel's value does not depend on the block it is read in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from wsi_mmm.errors import PluginError
from wsi_mmm.slides.base import ReadStats
from wsi_mmm.slides.resample.scaled import WHITE, Source, Window, read_scaled, sources_of
from wsi_mmm.slides.resample.tiled import CACHE_BYTES, Key, NativeTiles, Tile, TileCache, Tiling, fill, size_of
from wsi_mmm.types import I64, U8, Block, Canvas, SlideInfo

_CHUNK = 512
_EXACT_UNTIL = 4.5  # level-0 px per target px (1 mpp of a 40x scan): here every one of them is decoded in full

ReadChunk = Callable[[int, Window], U8 | str]  # level, window in level px -> uint8[h, w, 3], or why it failed


class RegionReader:
    """Reader on top of ``read_chunk``, which must be thread-safe."""

    def __init__(self, info: SlideInfo, read_chunk: ReadChunk, close: Callable[[], None]) -> None:
        self.info = info
        self._read_chunk = read_chunk
        self._close = close
        self._sources = sources_of(info.levels)
        self._cache: TileCache[Key, Tile] = TileCache(CACHE_BYTES)
        self._chunks = 0
        self._lock = threading.Lock()

    def read(self, block: Block) -> Canvas:
        """Return the block's pixels; what cannot be decoded is white and listed."""
        return read_scaled(block, self._sources, self._fill_window, _EXACT_UNTIL)

    def stats(self) -> ReadStats:
        """Return the chunks decoded; what the library read from the disk is not known."""
        return ReadStats(0, 0, self._chunks)

    def close(self) -> None:
        """Close the slide and forget the chunks."""
        self._close()
        self._cache.clear()

    def _fill_window(self, source: Source, window: Window, out: U8) -> I64:
        level = self.info.levels[source.level]
        # Chunks of whole native tiles: the library decodes each one once.
        width = level.tile_width * max(1, _CHUNK // level.tile_width)
        height = level.tile_height * max(1, _CHUNK // level.tile_height)
        tiling = Tiling(source, width, height)
        return fill(NativeTiles(tiling, self._cache, partial(self._load_chunks, tiling)), window, out)

    def _load_chunks(
        self, tiling: Tiling, keys: Sequence[Key], scratch: U8 | None = None
    ) -> Iterator[tuple[Key, Tile, int]]:
        for key in keys:
            window = tiling.window(key[2])
            tile: Tile = self._read_chunk(tiling.source.level, window)
            if not isinstance(tile, str):
                self._check_pixels(tile, window)
            with self._lock:
                self._chunks += 1
            yield key, tile, size_of(tile)

    def _check_pixels(self, tile: object, window: Window) -> None:
        # numpy would take floats or one channel for RGB without a word.
        x0, y0, x1, y1 = window
        got = f"{tile.dtype}{list(tile.shape)}" if isinstance(tile, np.ndarray) else type(tile).__name__
        wanted = f"uint8[{y1 - y0}, {x1 - x0}, 3]"
        if got != wanted:
            raise PluginError(f"the reader {self.info.reader!r} gave {got} for a region that is {wanted}")


def over_white(rgba: U8) -> U8:
    """Return uint8[h, w, 3] of straight-alpha uint8[h, w, 4] on white."""
    alpha = rgba[..., 3]
    if alpha.min(initial=WHITE) == WHITE:
        return np.ascontiguousarray(rgba[..., :3])
    a = alpha[..., None].astype(np.uint16)
    return ((rgba[..., :3] * a + np.uint16(WHITE) * (WHITE - a) + 127) // WHITE).astype(np.uint8)
