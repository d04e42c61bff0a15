"""The stream of batches: same bytes however it is read, bounded, and clean when it ends early."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from wsi_mmm.errors import OptionError, StorageError
from wsi_mmm.slides.base import Fetched, ReadStats
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.slides.resample.cut import cut_tiles
from wsi_mmm.tiles.grid import blocks, make_grid, tile_xy
from wsi_mmm.tiles.stream import FETCHES_AHEAD, READ_AHEAD, read_block, stream
from wsi_mmm.types import I64, U8, Batch, Block, Canvas, Grid, Tiles

PIXELS = np.random.default_rng(5).integers(0, 255, (700, 900, 3), dtype=np.uint8)


class Counting:
    """A reader that counts the blocks it is reading and has read, and fails at one of them if told to."""

    def __init__(self, inner: ArrayReader, fail_at: int | None = None) -> None:
        self.inner, self.fail_at = inner, fail_at
        self.info = inner.info
        self.started, self.area = 0, 0
        self.lock = threading.Lock()

    def read(self, block: Block) -> Canvas:
        with self.lock:
            self.started += 1
            self.area += block.width * block.height
            number = self.started
        if number == self.fail_at:
            raise StorageError("the cable was pulled")
        return self.inner.read(block)

    def stats(self) -> ReadStats:
        return self.inner.stats()

    def close(self) -> None:
        self.inner.close()


def a_grid(mpp: float = 0.7, tile: int = 64, overlap: int = 16) -> tuple[ArrayReader, Grid, np.ndarray]:
    reader = ArrayReader(PIXELS, 0.5)
    grid = make_grid(reader.info, mpp, tile=tile, overlap=overlap)
    every = np.argwhere(np.ones((grid.rows, grid.columns), bool))
    return reader, grid, every[np.random.default_rng(2).random(len(every)) < 0.6]


def reading_threads() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("wsi-mmm-read", "wsi-mmm-fetch"))
    ]


def sorted_whole(batches: list[Batch]) -> tuple[bytes, bytes, bytes]:
    """Everything in the batches, in the order of the grid."""
    index = np.concatenate([b.index for b in batches])
    order = np.lexsort((index[:, 1], index[:, 0]))
    pixels = np.concatenate([b.pixels for b in batches])[order]
    xy = np.concatenate([b.xy for b in batches])[order]
    return index[order].tobytes(), pixels.tobytes(), xy.tobytes()


@pytest.mark.parametrize("mpp", [0.5, 0.7, 1.0, 1.63])
def test_bytes_do_not_depend_on_blocks_batches_or_threads(mpp: float) -> None:
    reader, grid, index = a_grid(mpp)
    want = sorted_whole(list(stream(reader, grid, index, block_tiles=1, batch_size=1, workers=0)))
    for block_tiles, batch_size, workers in [(1, 7, 2), (2, 64, 1), (4, 3, 0), (4, 1000, 3), (99, 10, 2)]:
        got = stream(reader, grid, index, block_tiles=block_tiles, batch_size=batch_size, workers=workers)
        assert sorted_whole(list(got)) == want


@pytest.mark.parametrize("bytes_", [1, 8 * 3 * 64**2, 1 << 30])
def test_tiles_row_by_row_are_those_of_blocks(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With by_row the sequence is that of the grid, whatever is read together; the memory held follows ROWS_BYTES."""
    monkeypatch.setattr("wsi_mmm.tiles.stream.ROWS_BYTES", bytes_)
    reader, grid, index = a_grid(0.7)
    want = sorted_whole(list(stream(reader, grid, index, workers=0)))
    for batch_size, workers in [(1, 0), (7, 2), (1000, 3)]:
        got = list(stream(reader, grid, index, batch_size=batch_size, workers=workers, by_row=True))
        assert [len(batch.xy) for batch in got[:-1]] == [batch_size] * (len(got) - 1)
        assert np.array_equal(np.concatenate([batch.index for batch in got]), index)
        assert sorted_whole(got) == want


def test_a_tile_at_scale_one_is_the_slide_itself() -> None:
    """Tile (1, 2) of 64 px with stride 48 begins at level-0 (96, 48); beyond the slide it is white."""
    reader, grid, _ = a_grid(0.5)
    (batch,) = stream(reader, grid, np.array([[1, 2], [grid.rows - 1, grid.columns - 1]]), workers=0)
    assert (batch.pixels[0] == PIXELS[48:112, 96:160]).all()
    x, y = batch.xy[1]
    inside = PIXELS[y:, x:]
    assert (batch.pixels[1, : inside.shape[0], : inside.shape[1]] == inside).all()
    assert (batch.pixels[1, inside.shape[0] :] == 255).all()
    assert (batch.pixels[1, :, inside.shape[1] :] == 255).all()


def test_order_is_blocks_then_tiles_and_only_the_last_batch_is_short() -> None:
    reader, grid, index = a_grid()
    batches = list(stream(reader, grid, index, block_tiles=3, batch_size=10, workers=2))
    want = np.concatenate([block.index for block in blocks(grid, index, 3)])
    got = np.concatenate([batch.index for batch in batches])
    assert (got == want).all()
    assert [len(batch.failed) for batch in batches[:-1]] == [10] * (len(batches) - 1)
    assert (np.concatenate([b.xy for b in batches]) == tile_xy(grid, want)).all()


def test_failed_rectangles_flag_exactly_the_tiles_that_share_pixels_with_them() -> None:
    """A rectangle that ends where a tile begins does not fail that tile."""
    bad = np.array([[64, 64, 128, 128]], np.int64)
    reader = ArrayReader(PIXELS, 0.5, failed=bad)
    grid = make_grid(reader.info, 0.5, tile=64, overlap=0)
    index = np.argwhere(np.ones((4, 4), bool))
    for block_tiles in (1, 2, 4):
        batches = list(stream(reader, grid, index, block_tiles=block_tiles, workers=0))
        failed = {tuple(i) for b in batches for i in b.index[b.failed].tolist()}
        assert failed == {(1, 1)}


def test_sparse_tiles_of_a_block_are_read_in_pieces() -> None:
    """Two far corners of a block cost two tiles, not the square around them; the pixels are the same."""
    inner, grid, _ = a_grid(0.5, overlap=0)
    reader = Counting(inner)
    (block,) = blocks(grid, np.array([[0, 0], [3, 3]]), 4)
    batch = read_block(reader, grid, block)
    assert reader.area == 2 * 64 * 64
    assert (batch.pixels[1] == PIXELS[192:256, 192:256]).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_errors_of_the_reader_arrive_and_leave_no_thread(workers: int) -> None:
    inner, grid, index = a_grid()
    with pytest.raises(StorageError, match="cable"):
        list(stream(Counting(inner, fail_at=4), grid, index, block_tiles=2, workers=workers))
    assert reading_threads() == []


def test_closing_early_cancels_the_rest_and_leaves_no_thread() -> None:
    inner, grid, index = a_grid()
    reader = Counting(inner)
    batches = stream(reader, grid, index, block_tiles=1, batch_size=1, workers=2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert reading_threads() == []
    assert reader.started <= 2 + READ_AHEAD + 1


def test_reading_ahead_is_bounded() -> None:
    """While the consumer holds the first batch, no more than threads + READ_AHEAD further blocks are read."""
    inner, grid, index = a_grid()
    reader = Counting(inner)
    batches = stream(reader, grid, index, block_tiles=1, batch_size=1, workers=2)
    for taken in range(1, 6):
        next(batches)
        assert reader.started <= taken + 2 + READ_AHEAD
    batches.close()  # type: ignore[attr-defined]


class Remote(ArrayReader):
    """A reader far away: counts what is fetched, in which runs; from fetch ``fail_at`` on, fetching fails."""

    remote = True

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(PIXELS, 0.5)
        self.runs: list[int] = []
        self.fail_at = fail_at
        self.decoded = 0

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        self.runs.append(len(tiles))
        if self.fail_at is not None and len(self.runs) >= self.fail_at:
            raise StorageError("the cable was pulled")
        places = [tuple(xy) for part in tiles for xy in part.xy.tolist()]
        return Fetched(0, {hash(place): b"" for place in places})

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        fetched = fetched or self.fetch([tiles])
        assert all(hash(tuple(xy)) in fetched.data for xy in tiles.xy.tolist())
        self.decoded += 1
        return cut_tiles(self.read, tiles, out)


@pytest.mark.parametrize("workers", [0, 2])
def test_far_slides_are_fetched_in_runs_ahead_of_decoding(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run is half as long, none is shorter; what is decoded was fetched; the pixels are the same."""
    monkeypatch.setattr("wsi_mmm.tiles.stream.FETCH_PIXELS", 20 * 64 * 64)
    inner, grid, index = a_grid(0.5, overlap=0)
    far = Remote()
    got = list(stream(far, grid, index, block_tiles=1, batch_size=10, workers=workers))
    assert sorted_whole(got) == sorted_whole(list(stream(inner, grid, index, batch_size=10, workers=0)))
    assert sum(far.runs) == len(index)
    assert far.runs[:3] == [10, 20, 20]
    assert min(far.runs) >= 10
    assert far.decoded == len(index)
    assert reading_threads() == []


def test_fetching_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the consumer holds a batch, only the next runs are on their way."""
    monkeypatch.setattr("wsi_mmm.tiles.stream.FETCH_PIXELS", 4)
    _, grid, index = a_grid(0.5, overlap=0)
    far = Remote()
    batches = stream(far, grid, index, block_tiles=1, batch_size=1, workers=1)
    for taken in range(1, 6):
        next(batches)
        assert len(far.runs) <= taken + 1 + READ_AHEAD + FETCHES_AHEAD + 1
    batches.close()  # type: ignore[attr-defined]
    assert reading_threads() == []


def test_errors_of_fetching_arrive_in_their_turn() -> None:
    _, grid, index = a_grid(0.5)
    with pytest.raises(StorageError, match="cable"):
        list(stream(Remote(fail_at=1), grid, index, block_tiles=2))
    assert reading_threads() == []


def test_nothing_selected_is_an_empty_stream() -> None:
    reader, grid, _ = a_grid()
    assert list(stream(reader, grid, np.zeros((0, 2), np.int64))) == []


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}, {"block_tiles": 0}])
def test_nonsense_is_refused_before_the_first_batch(options: dict[str, int]) -> None:
    reader, grid, index = a_grid()
    with pytest.raises(OptionError):
        stream(reader, grid, index, **options)  # type: ignore[arg-type]
