"""Tiles from canvases: for readers that know blocks only, and where tiles do not lie on native ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from wsi_mmm.slides.base import Fetched, Reader, TileReader
from wsi_mmm.slides.resample.scaled import merge_failed
from wsi_mmm.types import I64, U8, Block, Canvas, Tiles

SPARSE = 0.7
"""Tiles are read in pieces when these cover less than this share of the rectangle around all of them."""


def fill_tiles(reader: Reader, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
    """Write n tiles to ``out`` with any Reader, by way of canvases where it gives nothing else; see TileReader."""
    if isinstance(reader, TileReader):
        return reader.read_tiles(tiles, out, fetched)
    return cut_tiles(reader.read, tiles, out)


def cut_tiles(read: Callable[[Block], Canvas], tiles: Tiles, out: Sequence[U8]) -> I64:
    """Write every tile to ``out`` (n arrays uint8[size, size, 3]); return the level-0 rectangles that failed."""
    failed = []
    for piece in pieces(tiles):
        block = rectangle(tiles, piece)
        canvas = read(block)
        for i, (x, y) in zip(piece.tolist(), (tiles.xy[piece] - [block.x, block.y]).tolist(), strict=True):
            out[i][...] = canvas.pixels[y : y + tiles.size, x : x + tiles.size]
        failed.append(canvas.failed)
    return merge_failed(failed)


def rectangle(tiles: Tiles, piece: I64) -> Block:
    """The block around the tiles at positions ``piece``."""
    x, y = tiles.xy[piece].min(axis=0).tolist()
    x1, y1 = (tiles.xy[piece].max(axis=0) + tiles.size).tolist()
    return Block(x, y, x1 - x, y1 - y, tiles.scale_x, tiles.scale_y)


def pieces(tiles: Tiles) -> list[I64]:
    """Positions of the tiles to read together: all of them, or connected groups when that is much less."""
    if not len(tiles.xy):
        return []
    everything = np.arange(len(tiles.xy))
    cell = tiles.xy // tiles.size
    cell = cell - cell.min(axis=0)
    taken = np.zeros(tuple(cell.max(axis=0) + 1), bool)
    taken[tuple(cell.T)] = True
    labels, count = ndimage.label(taken, np.ones((3, 3), bool))
    if count < 2:
        return [everything]
    group = labels[tuple(cell.T)]
    found = [np.flatnonzero(group == label) for label in range(1, count + 1)]
    area = sum(_area(tiles, piece) for piece in found)
    return found if area < SPARSE * _area(tiles, everything) else [everything]


def _area(tiles: Tiles, piece: I64) -> int:
    block = rectangle(tiles, piece)
    return block.width * block.height
