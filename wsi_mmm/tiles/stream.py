"""The one stream of batches: blocks of tiles are read ahead in threads, in a fixed order.

A block is read as one canvas (or a few, when its tiles are sparse) and cut into tiles, so that every native
tile is fetched and decoded once. A pixel depends only on its position in the target grid: neither the block
size nor the number of threads changes a byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from scipy import ndimage

from wsi_mmm.errors import RecipeError
from wsi_mmm.slides.base import Reader
from wsi_mmm.tiles.grid import BlockTiles, blocks, tile_boxes, tile_xy
from wsi_mmm.types import I64, Batch, Block, Grid, Mask

SPARSE = 0.7
"""A block is read in pieces when they cover less than this share of the rectangle around all its tiles."""

READ_AHEAD = 1
"""Blocks that may wait, read, beyond those that the threads are reading."""


def stream(
    reader: Reader, grid: Grid, index: I64, *, block_tiles: int = 4, batch_size: int = 64, workers: int = 2
) -> Iterator[Batch]:
    """Batches of ``batch_size`` tiles (the last may be shorter) of tiles ``index`` int64[n, 2] (row, column).

    Order: blocks row-major, tiles row-major within a block. ``workers`` threads read ahead (0: read inline);
    at most ``workers + READ_AHEAD`` blocks are held. Errors of the reader are raised here, in their turn.
    Closing the iterator cancels what is not yet begun and leaves no thread behind. Raises RecipeError.
    """
    if batch_size < 1:
        raise RecipeError(f"batch size is {batch_size}: give 1 or more")
    if workers < 0:
        raise RecipeError(f"workers is {workers}: give 0 or more")
    work = blocks(grid, index, block_tiles)
    return _rebatch(_read_ahead(reader, grid, work, workers), batch_size)


def read_block(reader: Reader, grid: Grid, block: BlockTiles) -> Batch:
    """The tiles of one block, in its order: ``pixels`` uint8[k, tile, tile, 3], white beyond the slide."""
    pixels = np.empty((len(block.index), grid.tile, grid.tile, 3), np.uint8)
    failed = np.zeros(len(block.index), bool)
    for piece in _pieces(grid, block.index):
        first = block.index[piece].min(axis=0) * grid.stride
        last = block.index[piece].max(axis=0) * grid.stride + grid.tile
        canvas = reader.read(_rectangle(grid, first, last))
        for i, (y, x) in zip(piece, block.index[piece] * grid.stride - first, strict=True):
            pixels[i] = canvas.pixels[y : y + grid.tile, x : x + grid.tile]
        failed[piece] |= _touched(grid, block.index[piece], canvas.failed)
    return Batch(pixels=pixels, xy=tile_xy(grid, block.index), index=block.index, failed=failed)


def _rectangle(grid: Grid, first: I64, last: I64) -> Block:
    """The target rectangle from ``first`` to ``last`` (y, x), half-open."""
    height, width = (int(side) for side in last - first)
    return Block(int(first[1]), int(first[0]), width, height, grid.scale_x, grid.scale_y)


def _pieces(grid: Grid, index: I64) -> list[I64]:
    """Positions in ``index`` of the tiles to read together: all of them, or connected groups when that is much less."""
    everything = np.arange(len(index))
    corner = index.min(axis=0)
    taken = np.zeros(tuple(index.max(axis=0) - corner + 1), bool)
    taken[tuple((index - corner).T)] = True
    labels, count = ndimage.label(taken, np.ones((3, 3), bool))
    if count < 2:
        return [everything]
    group = labels[tuple((index - corner).T)]
    pieces = [np.flatnonzero(group == label) for label in range(1, count + 1)]
    area = sum(_area(grid, index[piece]) for piece in pieces)
    return pieces if area < SPARSE * _area(grid, index) else [everything]


def _area(grid: Grid, index: I64) -> int:
    """Target px of the rectangle around tiles ``index``."""
    return int(np.prod((index.max(axis=0) - index.min(axis=0)) * grid.stride + grid.tile))


def _touched(grid: Grid, index: I64, failed: I64) -> Mask:
    """Which tiles share area with a rectangle of ``failed`` int64[m, 4] (x0, y0, x1, y1), level-0 px."""
    boxes = tile_boxes(grid, index)[:, None, :]
    hit = (boxes[..., :2] < failed[None, :, 2:]) & (boxes[..., 2:] > failed[None, :, :2])
    return np.asarray(hit.all(axis=-1).any(axis=-1), bool)


def _read_ahead(reader: Reader, grid: Grid, work: Iterable[BlockTiles], workers: int) -> Iterator[Batch]:
    """Each block of ``work`` read, in order, with up to ``workers`` reads under way."""
    if workers == 0:
        for block in work:
            yield read_block(reader, grid, block)
        return
    todo = iter(work)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="wsi-mmm-read")
    try:
        waiting: deque[Future[Batch]] = deque()
        for block in islice(todo, workers + READ_AHEAD):
            waiting.append(pool.submit(read_block, reader, grid, block))
        while waiting:
            done = waiting.popleft().result()
            for block in islice(todo, 1):
                waiting.append(pool.submit(read_block, reader, grid, block))
            yield done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _rebatch(parts: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The tiles of ``parts`` in batches of exactly ``size``, the last one shorter."""
    held: list[Batch] = []
    count = 0
    try:
        for part in parts:
            held.append(part)
            count += len(part.failed)
            if count < size:
                continue
            whole = _join(held)
            full = count - count % size
            for start in range(0, full, size):
                yield _cut(whole, start, start + size)
            held, count = [_cut(whole, full, count)], count - full
        if count:
            yield _join(held)
    finally:
        if hasattr(parts, "close"):
            parts.close()


def _join(parts: list[Batch]) -> Batch:
    parts = [part for part in parts if len(part.failed)]
    if len(parts) == 1:
        return parts[0]
    return Batch(
        pixels=np.concatenate([part.pixels for part in parts]),
        xy=np.concatenate([part.xy for part in parts]),
        index=np.concatenate([part.index for part in parts]),
        failed=np.concatenate([part.failed for part in parts]),
    )


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    part = slice(start, stop)
    return Batch(batch.pixels[part], batch.xy[part], batch.index[part], batch.failed[part])
