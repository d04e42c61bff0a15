"""Tiles at any places of a slide, read together: what training draws. As `stream` reads, but without its order."""

from __future__ import annotations

import numpy as np

from wsi_mmm.host_tuning import keep_memory
from wsi_mmm.slides.base import Reader, TileReader
from wsi_mmm.slides.resample.cut import cut_tiles
from wsi_mmm.types import F64, I64, U8, Mask, Tiles


def read_places(reader: Reader, tiles: Tiles) -> tuple[U8, Mask]:
    """uint8[n, size, size, 3] of n tiles of one scale, white beyond the slide, and bool[n]: some px of the tile could
    not be decoded. Native tiles that several of them need are fetched and decoded once. Raises StorageError."""
    keep_memory()
    pixels = np.empty((len(tiles.xy), tiles.size, tiles.size, 3), np.uint8)
    out = list(pixels)
    failed = reader.read_tiles(tiles, out) if isinstance(reader, TileReader) else cut_tiles(reader.read, tiles, out)
    return pixels, touched_by(boxes_of(tiles), failed)


def boxes_of(tiles: Tiles) -> F64:
    """The level-0 rectangles float64[n, 4] (x0, y0, x1, y1) of tiles."""
    low = tiles.xy.astype(np.float64)
    scale = (tiles.scale_x, tiles.scale_y)
    return np.concatenate([low * scale, (low + tiles.size) * scale], axis=1)


def touched_by(boxes: F64, rects: I64) -> Mask:
    """Which boxes [n, 4] share area with one of ``rects`` int64[m, 4], level-0 px."""
    hit = (boxes[:, None, :2] < rects[None, :, 2:]) & (boxes[:, None, 2:] > rects[None, :, :2])
    return np.asarray(hit.all(axis=-1).any(axis=-1), bool)
