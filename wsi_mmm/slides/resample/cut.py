"""Tiles from canvases: for readers that know blocks only, and where tiles do not lie on native ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from wsi_mmm.slides.base import Fetched, Reader, TileReader
from wsi_mmm.slides.resample.scaled import merge_failed
from wsi_mmm.types import I64, U8, Block, Canvas, Tiles

SPARSE = 0.7
"""Tiles are read in groups when these cover less than this share of the rectangle around all of them."""


def fill_tiles(reader: Reader, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
    """Write n tiles to ``out`` with any Reader, by way of canvases where it gives nothing else; see TileReader."""
    if isinstance(reader, TileReader):
        return reader.read_tiles(tiles, out, fetched)
    return cut_tiles(reader.read, tiles, out)


def cut_tiles(read: Callable[[Block], Canvas], tiles: Tiles, out: Sequence[U8]) -> I64:
    """Write every tile to ``out`` (n arrays uint8[size, size, 3]); return the level-0 rectangles that failed."""
    failed = []
    for group, targets in connected_groups(tiles, out):
        block = block_around(group)
        canvas = read(block)
        for (x, y), target in zip((group.xy - [block.x, block.y]).tolist(), targets, strict=True):
            target[...] = canvas.pixels[y : y + tiles.size, x : x + tiles.size]
        failed.append(canvas.failed)
    return merge_failed(failed)


def block_around(tiles: Tiles) -> Block:
    """Return the smallest block that holds all of ``tiles``."""
    x, y = tiles.xy.min(axis=0).tolist()
    x1, y1 = (tiles.xy.max(axis=0) + tiles.size).tolist()
    return Block(x, y, x1 - x, y1 - y, tiles.scale_x, tiles.scale_y)


def connected_groups(tiles: Tiles, out: Sequence[U8]) -> Iterator[tuple[Tiles, Sequence[U8]]]:
    """Yield the tiles to read together, and their places: all, or connected groups where these are much smaller."""
    if not len(tiles.xy):
        return
    cell = tiles.xy // tiles.size
    cell = cell - cell.min(axis=0)
    taken = np.zeros(tuple(cell.max(axis=0) + 1), bool)
    taken[tuple(cell.T)] = True
    labels, count = ndimage.label(taken, np.ones((3, 3), bool))
    label = labels[tuple(cell.T)]
    members = [np.flatnonzero(label == n) for n in range(1, count + 1)]
    groups = [replace(tiles, xy=tiles.xy[some]) for some in members]
    if count < 2 or sum(_pixels_around(group) for group in groups) >= SPARSE * _pixels_around(tiles):
        yield tiles, out
    else:
        for group, some in zip(groups, members, strict=True):
            yield group, [out[i] for i in some.tolist()]


def _pixels_around(tiles: Tiles) -> int:
    block = block_around(tiles)
    return block.width * block.height
