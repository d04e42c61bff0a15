"""Reading tiles: the one path of `run`, `embed`, training and `stream_tiles`, and the prefetch around it.

A block's native tiles are fetched in merged ranges and decoded once, into the memory of the caller. A pixel depends
only on its position in the target grid: neither the block size, nor the number of threads, nor the prefetch changes a
byte. From far storage several blocks are fetched at once, ahead of the threads that decode them (`Prefetcher`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np

from wsi_mmm.errors import OptionError
from wsi_mmm.slides.base import Fetched, Reader, TileReader
from wsi_mmm.slides.resample.cut import fill_tiles
from wsi_mmm.tiles.grid import BlockTiles, any_overlap, blocks, level0_boxes, tile_xy, tiles_at
from wsi_mmm.timing import timed
from wsi_mmm.types import I64, U8, Batch, Grid, Mask, Tiles

READ_AHEAD = 1
"""Blocks (full ones, or as many tiles) that may wait, read, beyond those that the threads are reading."""

ROWS_BYTES = 128 << 20
"""Most that the tiles of a row of blocks take where tiles are given row by row, unless one row of tiles is more."""

FETCHES_AHEAD = 2
"""Fetches that are under way, or wait to be used, beyond the one whose blocks are being decoded."""

FETCH_PIXELS = 1 << 27
"""Level-0 px that a fetch brings: some 20 to 30 MB of JPEG, of which a request brings 0.5 MB or more on tissue. Shorter
ones ask for less at a time; the first is half as long, so that decoding begins soon."""

FetchKey = TypeVar("FetchKey", bound=Hashable)
Data = TypeVar("Data")
Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


# ---------------------------------------------------------------- reading


def read_tiles(reader: Reader, tiles: Tiles, fetched: Fetched | None = None) -> tuple[U8, Mask]:
    """Return the pixels uint8[n, size, size, 3] of n tiles, white beyond the slide, and bool[n]: the tiles that hold
    pixels that could not be decoded. Native tiles that several of them need are fetched and decoded once; those in
    ``fetched`` are not fetched again. Raises StorageError."""
    pixels = np.empty((len(tiles.xy), tiles.size, tiles.size, 3), np.uint8)
    return pixels, read_into(reader, tiles, list(pixels), fetched)


def read_block(reader: Reader, grid: Grid, block: BlockTiles, fetched: Fetched | None = None) -> Batch:
    """Return the tiles of one block, in its order. Raises StorageError."""
    pixels, failed = read_tiles(reader, tiles_at(grid, block.index), fetched)
    return Batch(pixels=pixels, xy=tile_xy(grid, block.index), index=block.index, failed=failed)


def read_into(reader: Reader, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None) -> Mask:
    """Write tiles to ``out``, n arrays; return bool[n], the tiles that hold pixels that could not be decoded."""
    failed = fill_tiles(reader, tiles, out, fetched)
    return any_overlap(level0_boxes(tiles), failed) if len(failed) else np.zeros(len(out), bool)


# ---------------------------------------------------------------- fetching ahead of use


@dataclass(eq=False, slots=True)
class _Fetch(Generic[FetchKey, Data]):
    """One fetch for several keys. ``keys``: those not taken yet; ``future``: None until it has begun."""

    keys: list[FetchKey]
    fetch: Callable[[list[FetchKey]], Data]
    future: Future[Data] | None = None


class Prefetcher(Generic[FetchKey, Data]):
    """Fetches data in threads ahead of its use, in the order of `announce`. Thread-safe.

    At most ``most`` fetches are under way or wait to be used. What is not there when it is taken, because its fetch has
    not begun or has failed, is left to the caller, whose own read then says what is wrong.
    """

    def __init__(self, most: int = FETCHES_AHEAD + 1) -> None:
        self._most = most
        self._held = 0  # fetches that have begun and of which a key is left
        self._coming: deque[_Fetch[FetchKey, Data]] = deque()
        self._fetches: dict[FetchKey, _Fetch[FetchKey, Data]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="wsi-mmm-fetch")  # begins its threads when needed
        self._closed = False

    def __enter__(self) -> Prefetcher[FetchKey, Data]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def announce(self, keys: Iterable[FetchKey], fetch: Callable[[list[FetchKey]], Data]) -> None:
        """Plan one fetch: ``fetch`` is called in a thread with those of ``keys`` that were not taken before."""
        planned = _Fetch(list(keys), fetch)
        with self._lock:
            if not self._closed:
                self._coming.append(planned)
                self._fetches.update(dict.fromkeys(planned.keys, planned))
                self._begin_fetches()

    def take(self, key: FetchKey) -> Data | None:
        """Return what was fetched for ``key``, waiting for a fetch that is under way; None: read by yourself."""
        with self._lock:
            future = self._remove_key(key)
            self._begin_fetches()
        try:
            with timed("fetch"):
                return None if future is None else future.result()
        except Exception as error:  # noqa: BLE001  (the caller reads by itself, and raises what is wrong)
            _log.debug("fetching ahead failed: %s", error)
            return None

    def drop(self, keys: Iterable[FetchKey]) -> None:
        """Forget keys that nobody will take; those that were not announced are passed over."""
        with self._lock:
            for key in keys:
                self._remove_key(key)
            self._begin_fetches()

    def keys_left(self) -> list[FetchKey]:
        """Return the keys that were announced and not yet taken."""
        with self._lock:
            return list(self._fetches)

    def close(self) -> None:
        """Fetch nothing more, and wait for the threads to end."""
        with self._lock:
            self._closed = True
            self._coming.clear()
            self._fetches.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _remove_key(self, key: FetchKey) -> Future[Data] | None:
        planned = self._fetches.pop(key, None)
        if planned is None:
            return None
        planned.keys.remove(key)
        if planned.future is not None and not planned.keys:
            self._held -= 1
        return planned.future

    def _begin_fetches(self) -> None:
        while self._coming and self._held < self._most:
            planned = self._coming.popleft()
            if planned.keys:
                self._held += 1
                planned.future = self._pool.submit(planned.fetch, list(planned.keys))


def is_far(reader: Reader) -> bool:
    """Return whether reading waits for a network, so that it pays to fetch ahead."""
    return isinstance(reader, TileReader) and reader.remote


def fetch_groups(tiles: Mapping[FetchKey, Tiles], first: float = 0.5) -> Iterator[list[FetchKey]]:
    """Yield the keys of blocks that are fetched together: FETCH_PIXELS at a time, ``first`` of that to begin with.

    What would be less than half a fetch at the end joins the one before.
    """
    keys = list(tiles)
    area = [len(some.xy) * some.size**2 * some.scale_x * some.scale_y for some in tiles.values()]
    before = np.concatenate([[0.0], np.cumsum(area)])
    start, most = 0, first * FETCH_PIXELS
    while start < len(keys):
        stop = max(start + 1, int(np.searchsorted(before, before[start] + most, "right")) - 1)
        if start and before[-1] - before[stop] < FETCH_PIXELS / 2:
            stop = len(keys)
        yield keys[start:stop]
        start, most = stop, float(FETCH_PIXELS)


def map_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, most: int,
    size: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Result]:  # fmt: skip
    """Yield ``function`` of each item, in order, computed in ``pool``; begins while less than ``most`` is held."""
    waiting: deque[tuple[int, Future[Result]]] = deque()
    todo, held = iter(items), 0
    while True:
        while held < most and (found := next(((item,) for item in todo), None)) is not None:
            waiting.append((size(found[0]), pool.submit(function, found[0])))
            held += waiting[-1][0]
        if not waiting:
            return
        amount, future = waiting.popleft()
        result = future.result()
        held -= amount
        yield result


# ---------------------------------------------------------------- batches


def stream(
    reader: Reader,
    grid: Grid,
    index: I64,
    *,
    block_tiles: int = 4,
    batch_size: int = 64,
    workers: int = 2,
    by_row: bool = False,
) -> Iterator[Batch]:
    """Yield batches of ``batch_size`` tiles (the last may be shorter) of tiles ``index`` int64[n, 2] (row, column).

    Blocks come row-major, tiles row-major within a block; with ``by_row`` all tiles come row-major, as they lie in
    features.zarr and tiles.parquet. ``workers`` threads read ahead (0: read inline); at most ``workers + READ_AHEAD``
    full blocks are held, with ``by_row`` up to two rows of blocks, of ROWS_BYTES or one row of tiles each. Errors of
    the reader are raised here, in their turn. Closing the iterator cancels what has not begun and leaves no thread
    behind. Raises OptionError.
    """
    if batch_size < 1:
        raise OptionError(f"batch size is {batch_size}: give 1 or more")
    if workers < 0:
        raise OptionError(f"workers is {workers}: give 0 or more")
    if not by_row:
        parts = blocks(grid, index, block_tiles)
        return _stream_batches(reader, grid, parts, batch_size=batch_size, workers=workers)
    rows = next((k for k in range(block_tiles, 1, -1) if _largest_row(index, k) * 3 * grid.tile**2 <= ROWS_BYTES), 1)
    parts, ahead = blocks(grid, index, block_tiles, rows), _largest_row(index, rows)
    return _stream_batches(reader, grid, parts, batch_size=batch_size, workers=workers, by_row=True, ahead=ahead)


def _largest_row(index: I64, rows: int) -> int:
    """Tiles in the fullest row of blocks that are ``rows`` tiles high."""
    return int(np.bincount(index[:, 0] // rows).max(initial=0))


def _stream_batches(
    reader: Reader,
    grid: Grid,
    parts: list[BlockTiles],
    *,
    batch_size: int,
    workers: int,
    by_row: bool = False,
    ahead: int = 0,
) -> Iterator[Batch]:
    """``ahead``: tiles that may be held where those of a few blocks are less."""
    if not parts:
        return
    index = np.concatenate([block.index for block in parts])
    ranking = np.arange(len(index))  # where a tile comes, by where it is read
    if by_row:
        by_place = np.lexsort((index[:, 1], index[:, 0]))
        ranking[by_place] = np.arange(len(index))
        index = index[by_place]
    xy, failed = tile_xy(grid, index), np.zeros(len(index), bool)
    unread = np.bincount(ranking // batch_size)  # tiles of each batch
    memory: dict[int, U8] = {}  # pixels of batches, made when the first tile of each is about to be read

    def places(start: int, stop: int) -> list[U8]:
        for n in np.unique(ranking[start:stop] // batch_size).tolist():
            if n not in memory:
                count = min(batch_size, len(index) - n * batch_size)
                memory[n] = np.empty((count, grid.tile, grid.tile, 3), np.uint8)
        return [memory[n // batch_size][n % batch_size] for n in ranking[start:stop].tolist()]

    given = 0  # batches
    tiles = [tiles_at(grid, block.index) for block in parts]
    for start, mask in _read_blocks(reader, tiles, places, workers, ahead):
        where = ranking[start : start + len(mask)]
        failed[where] = mask
        np.subtract.at(unread, where // batch_size, 1)
        while given < len(unread) and not unread[given]:
            part = slice(given * batch_size, (given + 1) * batch_size)
            yield Batch(memory.pop(given), xy[part], index[part], failed[part])
            given += 1


def _read_blocks(
    reader: Reader, parts: Sequence[Tiles], places: Callable[[int, int], Sequence[U8]], workers: int, ahead: int
) -> Iterator[tuple[int, Mask]]:
    """Yield the position of each block's first tile and bool[k], its tiles that failed, in order.

    ``places``: the memory of tiles start..stop-1, counted over all blocks; asked for when they are about to be read.
    ``ahead``: tiles that may be held where those of a few blocks are less.
    """
    tiles = dict(enumerate(parts))
    stops = np.cumsum([0, *(len(some.xy) for some in parts)]).tolist()
    todo = ((n, places(stops[n], stops[n + 1])) for n in tiles)
    with ExitStack() as stack:
        prefetch: Prefetcher[int, Fetched] = stack.enter_context(Prefetcher())
        if isinstance(reader, TileReader) and is_far(reader):
            fetch = reader.fetch
            for group in fetch_groups(tiles):
                prefetch.announce(group, lambda numbers: fetch([tiles[number] for number in numbers]))

        def read(block: tuple[int, Sequence[U8]]) -> tuple[int, Mask]:
            number, out = block
            return stops[number], read_into(reader, tiles[number], out, prefetch.take(number))

        if workers == 0:
            yield from map(read, todo)
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="wsi-mmm-read")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        # Counted in tiles: a thread must not wait for a full block that another reads while sparse ones are left.
        most = max(ahead, (workers + READ_AHEAD) * max(len(some.xy) for some in parts))
        yield from map_ahead(pool, read, todo, most=most, size=lambda block: len(block[1]))
