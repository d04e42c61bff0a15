"""The one stream of batches: blocks of tiles are read ahead in threads, in a fixed order.

A block's native tiles are fetched in merged ranges and decoded once, into the very memory of the batches. A pixel
depends only on its position in the target grid: neither the block size nor the number of threads changes a byte.
Where fetching waits for a network, runs of blocks are fetched together, well ahead of those that decode them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from wsi_mmm.errors import RecipeError
from wsi_mmm.host_tuning import keep_memory
from wsi_mmm.slides.base import Fetched, Reader, TileReader
from wsi_mmm.slides.resample.cut import cut_tiles
from wsi_mmm.tiles.grid import BlockTiles, blocks, tile_boxes, tile_xy
from wsi_mmm.types import I64, U8, Batch, Grid, Mask, Tiles

READ_AHEAD = 1
"""Blocks (full ones, or as many tiles) that may wait, read, beyond those that the threads are reading."""

RUNS_AHEAD = 2
"""Runs of blocks that are fetched, or being fetched, beyond the one that is decoded."""

RUN_PIXELS = 1 << 27
"""Level-0 px of a run: some 20 to 30 MB of JPEG, of which a request brings 0.5 MB or more on tissue. Shorter ones ask
for less at a time; the first is half as long, so that decoding begins soon."""


def stream(
    reader: Reader, grid: Grid, index: I64, *, block_tiles: int = 4, batch_size: int = 64, workers: int = 2
) -> Iterator[Batch]:
    """Batches of ``batch_size`` tiles (the last may be shorter) of tiles ``index`` int64[n, 2] (row, column).

    Order: blocks row-major, tiles row-major within a block. ``workers`` threads read ahead (0: read inline);
    at most ``workers + READ_AHEAD`` full blocks are held. Errors of the reader are raised here, in their turn.
    Closing the iterator cancels what is not yet begun and leaves no thread behind. Raises RecipeError.
    """
    if batch_size < 1:
        raise RecipeError(f"batch size is {batch_size}: give 1 or more")
    if workers < 0:
        raise RecipeError(f"workers is {workers}: give 0 or more")
    work = blocks(grid, index, block_tiles)
    keep_memory()
    return _batches(reader, grid, work, batch_size=batch_size, workers=workers)


def read_block(reader: Reader, grid: Grid, block: BlockTiles) -> Batch:
    """The tiles of one block, in its order: ``pixels`` uint8[k, tile, tile, 3], white beyond the slide."""
    pixels = np.empty((len(block.index), grid.tile, grid.tile, 3), np.uint8)
    failed = _read(_tile_reader(reader), grid, block.index, list(pixels))
    return Batch(pixels=pixels, xy=tile_xy(grid, block.index), index=block.index, failed=failed)


ReadTiles = Callable[[Tiles, Sequence[U8], Fetched | None], I64]


def _tile_reader(reader: Reader) -> ReadTiles:
    """How this reader fills tiles: by itself, or by way of canvases."""
    if isinstance(reader, TileReader):
        return reader.read_tiles
    return lambda tiles, out, _: cut_tiles(reader.read, tiles, out)


def _read(read: ReadTiles, grid: Grid, index: I64, out: Sequence[U8], fetched: Fetched | None = None) -> Mask:
    """Read tiles to ``out``; return which of them hold pixels that could not be read."""
    return touched(grid, index, read(tiles_at(grid, index), out, fetched))


def tiles_at(grid: Grid, index: I64) -> Tiles:
    """Tiles ``index`` int64[n, 2] (row, column) of a grid."""
    return Tiles(index[:, ::-1] * grid.stride, grid.tile, grid.scale_x, grid.scale_y, grid.overlap)


def touched(grid: Grid, index: I64, failed: I64) -> Mask:
    """Which tiles share area with a rectangle of ``failed`` int64[m, 4] (x0, y0, x1, y1), level-0 px."""
    if not len(failed):
        return np.zeros(len(index), bool)
    boxes = tile_boxes(grid, index)[:, None, :]
    hit = (boxes[..., :2] < failed[None, :, 2:]) & (boxes[..., 2:] > failed[None, :, :2])
    return np.asarray(hit.all(axis=-1).any(axis=-1), bool)


# ---------------------------------------------------------------- batches


@dataclass(slots=True)
class _Slots:
    """The memory of the batches, made when the first tile of each is about to be read."""

    index: I64
    tile: int
    size: int
    made: dict[int, U8] = field(default_factory=dict)

    def take(self, start: int, stop: int) -> list[U8]:
        """Where tiles start..stop-1 of the whole order shall lie, uint8[tile, tile, 3] each."""
        return [self._batch(n // self.size)[n % self.size] for n in range(start, stop)]

    def _batch(self, number: int) -> U8:
        if number not in self.made:
            count = min(self.size, len(self.index) - number * self.size)
            self.made[number] = np.empty((count, self.tile, self.tile, 3), np.uint8)
        return self.made[number]


def _batches(reader: Reader, grid: Grid, work: list[BlockTiles], *, batch_size: int, workers: int) -> Iterator[Batch]:
    if not work:
        return
    index = np.concatenate([block.index for block in work])
    xy, failed = tile_xy(grid, index), np.zeros(len(index), bool)
    slots = _Slots(index, grid.tile, batch_size)
    given = 0  # batches
    for start, mask in _read_ahead(reader, grid, work, slots=slots, workers=workers):
        stop = start + len(mask)
        failed[start:stop] = mask
        while given * batch_size < stop and ((given + 1) * batch_size <= stop or stop == len(index)):
            part = slice(given * batch_size, (given + 1) * batch_size)
            yield Batch(slots.made.pop(given), xy[part], index[part], failed[part])
            given += 1


def _read_ahead(
    reader: Reader, grid: Grid, work: list[BlockTiles], *, slots: _Slots, workers: int
) -> Iterator[tuple[int, Mask]]:
    """Position of each block's first tile and which of its tiles failed, in order, up to ``workers`` under way."""
    starts = np.cumsum([0, *(len(block.index) for block in work)]).tolist()
    fill = _tile_reader(reader)

    def read(n: int, out: list[U8], fetched: Future[Fetched] | None) -> tuple[int, Mask]:
        brought = fetched.result() if fetched is not None else None
        return starts[n], _read(fill, grid, work[n].index, out, brought)

    with ExitStack() as stack:
        ahead = _fetch_ahead(reader, grid, work, stack)
        if workers == 0:
            for n, fetched in enumerate(ahead):
                yield read(n, slots.take(starts[n], starts[n + 1]), fetched)
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="wsi-mmm-read")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        waiting: deque[Future[tuple[int, Mask]]] = deque()
        todo, begun, given = enumerate(ahead), 0, 0
        most = (workers + READ_AHEAD) * max(len(block.index) for block in work)
        while given < len(slots.index):
            # Counted in tiles: a thread must not wait for a full block that another reads while sparse ones are left.
            while begun - given < most and (block := next(todo, None)) is not None:
                n, fetched = block
                waiting.append(pool.submit(read, n, slots.take(starts[n], starts[n + 1]), fetched))
                begun = starts[n + 1]
            done = waiting.popleft().result()
            given = done[0] + len(done[1])
            yield done


# ---------------------------------------------------------------- fetching ahead


def _fetch_ahead(
    reader: Reader, grid: Grid, work: list[BlockTiles], stack: ExitStack
) -> Iterator[Future[Fetched] | None]:
    """For each block what will hold its bytes; None where they are read when it is decoded."""
    if not isinstance(reader, TileReader) or not reader.remote:
        yield from [None] * len(work)
        return
    pool = ThreadPoolExecutor(RUNS_AHEAD + 1, thread_name_prefix="wsi-mmm-fetch")
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    todo = iter(_runs(grid, work))
    flying: deque[tuple[int, Future[Fetched]]] = deque()

    def begin(count: int) -> None:
        for run in islice(todo, count):
            flying.append((len(run), pool.submit(reader.fetch, [tiles_at(grid, block.index) for block in run])))

    begin(RUNS_AHEAD + 1)
    while flying:
        count, fetched = flying.popleft()
        yield from [fetched] * count
        begin(1)


def _runs(grid: Grid, work: list[BlockTiles]) -> Iterator[list[BlockTiles]]:
    """Cut into runs of RUN_PIXELS, the first half as long; what would be less than half a run joins the last."""
    area = np.array([len(block.index) for block in work]) * grid.tile**2 * grid.scale_x * grid.scale_y
    before = np.concatenate([[0.0], np.cumsum(area)])
    start, most = 0, RUN_PIXELS / 2
    while start < len(work):
        stop = max(start + 1, int(np.searchsorted(before, before[start] + most, "right")) - 1)
        if before[-1] - before[stop] < RUN_PIXELS / 2:
            stop = len(work)
        yield work[start:stop]
        start, most = stop, float(RUN_PIXELS)
