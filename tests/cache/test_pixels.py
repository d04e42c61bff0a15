"""The tile cache: the reader's own pixels from every state of it, for threads, processes and evictions at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from wsi_mmm.cache import CachedReader
from wsi_mmm.cache.inventory import Quota, stored_shards, trim
from wsi_mmm.cache.shard import CHUNK, SHARD
from wsi_mmm.errors import OutputError
from wsi_mmm.slides.base import Fetched
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.tiles.grid import make_grid
from wsi_mmm.tiles.stream import stream
from wsi_mmm.types import I64, U8, Block, Tiles

WHOLE = Block(-30, -20, 1300, 1200, 1.0, 1.0)
LOST = [[1000, 1000, 1050, 1040]]


@pytest.fixture
def slide() -> ArrayReader:
    """A slide of 1100 x 1050 px in four shards, a part of which cannot be read."""
    image = np.random.default_rng(0).integers(0, 255, (1050, 1100, 3), dtype=np.uint8)
    return ArrayReader(image, failed=np.array(LOST))


def cache_of(slide: ArrayReader, root: Path, quota: Quota | None = None) -> CachedReader:
    """A cached reader of ``slide`` where a run puts it below the cache's folder."""
    return CachedReader(slide, str(root / "slide/pixels/1-1"), 1.0, 1.0, quota=quota)


def shards(root: Path) -> list[Path]:
    """Every shard below a folder."""
    return sorted(shard.path for shard in stored_shards(root))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes(b ^ 255 for b in data[half : half + 20]) + data[half + 20 :]


def noise(data: bytes) -> bytes:
    return np.random.default_rng(1).integers(0, 256, len(data), dtype=np.uint8).tobytes()


def tail_cut(data: bytes) -> bytes:
    return data[:-1]


def nothing(data: bytes) -> bytes:
    return data[:0]


def test_cached_pixels_are_the_readers_own(slide: ArrayReader, tmp_path: Path) -> None:
    """Cold and warm, inside and beyond the slide, with the rectangles that failed."""
    want = slide.read(WHOLE)
    cached = cache_of(slide, tmp_path)
    for _ in range(2):
        got = cached.read(WHOLE)
        assert np.array_equal(got.pixels, want.pixels)
        assert got.failed.tolist() == LOST
    assert (cached.filled, cached.hits) == (4, 4)
    assert cached.read(Block(2000, 2000, 10, 10, 1.0, 1.0)).pixels.min() == 255
    assert len(cached.read(Block(0, 0, 10, 10, 1.0, 1.0)).failed) == 0


@pytest.mark.parametrize(("tile", "overlap"), [(256, 0), (224, 32), (512, 64)])
def test_tiles_of_a_stream_are_the_readers_own(slide: ArrayReader, tmp_path: Path, tile: int, overlap: int) -> None:
    """Tiles that are chunks and tiles that are not, cold and warm, with what failed."""
    grid = make_grid(slide.info, float(slide.info.mpp_x or 0), tile=tile, overlap=overlap)
    index = np.argwhere(np.ones((grid.rows, grid.columns), bool))
    want = list(stream(slide, grid, index, workers=0))
    for _ in range(2):
        got = list(stream(cache_of(slide, tmp_path), grid, index, workers=2))
        for some, other in zip(got, want, strict=True):
            assert np.array_equal(some.pixels, other.pixels)
            assert np.array_equal(some.failed, other.failed)


def test_what_lies_there_is_zarr(slide: ArrayReader, tmp_path: Path) -> None:
    """The Zarr library reads the same pixels, and white where no shard is."""
    cache_of(slide, tmp_path).read(Block(0, 0, SHARD, SHARD, 1.0, 1.0))
    found = zarr.open_array(tmp_path / "slide/pixels/1-1/pixels", mode="r")[:]
    want = slide.read(Block(0, 0, 1100, 1050, 1.0, 1.0)).pixels.copy()
    want[SHARD:], want[:, SHARD:] = 255, 255
    assert np.array_equal(found, want)


def test_other_scales_and_origins_pass_by(slide: ArrayReader, tmp_path: Path) -> None:
    """They come from the reader, and nothing is kept of them."""
    cached = cache_of(slide, tmp_path)
    for block in (Block(0, 0, 100, 90, 2.0, 2.0), Block(0, 0, 100, 90, 1.0, 1.0, 7, 3)):
        assert np.array_equal(cached.read(block).pixels, slide.read(block).pixels)
    assert not shards(tmp_path)


def test_a_warm_cache_does_not_ask_the_slide(slide: ArrayReader, tmp_path: Path) -> None:
    """Nothing of the inner reader is called once all shards are in."""
    want = cache_of(slide, tmp_path).read(WHOLE)
    again = cache_of(slide, tmp_path)
    again.inner = Silent(slide)
    got = again.read(WHOLE)
    assert np.array_equal(got.pixels, want.pixels)
    assert got.failed.tolist() == LOST


class Silent(ArrayReader):
    """A reader that must not be asked."""

    def __init__(self, other: ArrayReader) -> None:
        self.info = other.info

    def read(self, block: Block) -> None:  # type: ignore[override]
        raise AssertionError(block)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", [cut, flipped, noise, tail_cut, nothing])
def test_damaged_shards_are_read_from_the_slide_again(
    slide: ArrayReader, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Never other pixels; and the shard is whole afterwards."""
    want = cache_of(slide, tmp_path).read(WHOLE).pixels
    for path in shards(tmp_path):
        path.write_bytes(damage(path.read_bytes()))
    mending = cache_of(slide, tmp_path)
    assert np.array_equal(mending.read(WHOLE).pixels, want)
    assert mending.filled == 4
    after = cache_of(slide, tmp_path)
    assert np.array_equal(after.read(WHOLE).pixels, want)
    assert (after.filled, after.hits) == (0, 4)


def test_every_byte_counts(tmp_path: Path) -> None:
    """No byte of a shard can change without the shard being made anew."""
    slide = ArrayReader(np.full((200, 200, 3), 7, np.uint8), failed=np.array([[0, 0, 10, 10]]))
    block = Block(0, 0, 200, 200, 1.0, 1.0)
    want = cache_of(slide, tmp_path).read(block)
    [path] = shards(tmp_path)
    data = path.read_bytes()
    places = {*range(0, len(data), 1 + len(data) // 40), *range(len(data) - 330, len(data), 3)}
    for at in sorted(places):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        got = cache_of(slide, tmp_path).read(block)
        assert np.array_equal(got.pixels, want.pixels)
        assert got.failed.tolist() == want.failed.tolist()


def test_a_crash_while_a_shard_is_written_leaves_nothing_that_counts(slide: ArrayReader, tmp_path: Path) -> None:
    """What a killed process leaves (half a temporary file) is not a shard; the next reader fills it."""
    want = cache_of(slide, tmp_path).read(WHOLE).pixels
    first, *_ = shards(tmp_path)
    half = first.read_bytes()[:1000]
    first.unlink()
    first.with_name(".0.123.part").write_bytes(half)
    reader = cache_of(slide, tmp_path)
    assert np.array_equal(reader.read(WHOLE).pixels, want)
    assert reader.filled == 1


def test_many_failures_are_kept(tmp_path: Path) -> None:
    """A note of more rectangles than the first look at the end of a shard brings."""
    lost = np.array([[x, y, x + 1, y + 1] for y in range(0, 200, 10) for x in range(0, 200, 10)])
    slide = ArrayReader(np.zeros((300, 300, 3), np.uint8), failed=lost)
    block = Block(0, 0, 300, 300, 1.0, 1.0)
    want = sorted(slide.read(block).failed.tolist())
    for _ in range(2):
        assert sorted(cache_of(slide, tmp_path).read(block).failed.tolist()) == want
    assert len(want) == 400


def test_a_cache_that_cannot_be_written_is_one_line(slide: ArrayReader, tmp_path: Path) -> None:
    """A file where the folder should be is an OutputError with the reason."""
    (tmp_path / "slide").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        cache_of(slide, tmp_path).read(WHOLE)


# ---------------------------------------------------------------- several at once


class Slow(ArrayReader):
    """A reader that takes a moment and counts what it is asked."""

    asked = 0

    def read(self, block: Block):  # type: ignore[no-untyped-def]
        self.asked += 1
        time.sleep(0.05)
        return super().read(block)


def test_threads_fill_a_shard_once(tmp_path: Path) -> None:
    """Eight threads that want the same shard at the same time read it from the slide once."""
    slide = Slow(np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8))
    want = ArrayReader.read(slide, Block(0, 0, 500, 500, 1.0, 1.0)).pixels
    cached = cache_of(slide, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cached.read(Block(0, 0, 500, 500, 1.0, 1.0)).pixels, range(8)))
    assert all(np.array_equal(one, want) for one in found)
    assert slide.asked == 1


def _work(root: str, limit: int, seed: int, failed: multiprocessing.Queue[str]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (3000, 3000, 3), dtype=np.uint8)
    slide = ArrayReader(image)
    cached = cache_of(slide, Path(root), Quota(Path(root), limit))
    choose = np.random.default_rng(seed)
    for _ in range(40):
        x, y = (int(n) for n in choose.integers(0, 2500, 2))
        block = Block(x, y, 500, 500, 1.0, 1.0)
        if not np.array_equal(cached.read(block).pixels, image[y : y + 500, x : x + 500]):
            failed.put(f"{x}, {y}")


def test_processes_that_fill_and_evict_at_once_read_the_right_pixels(tmp_path: Path) -> None:
    """Two processes in a cache that holds a third of the slide: every block is right, and the quota holds."""
    limit = 10_000_000
    context = multiprocessing.get_context("spawn")
    failed: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=_work, args=(str(tmp_path), limit, seed, failed)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert failed.empty()
    assert 0 < sum(shard.size for shard in stored_shards(tmp_path)) <= limit + 2 * 3_200_000


# ---------------------------------------------------------------- fetching ahead


class Ahead(ArrayReader):
    """A reader that fetches ahead, as one of a remote slide does."""

    remote = True

    def __init__(self, image: U8) -> None:
        super().__init__(image)
        self.fetched: list[list[list[int]]] = []
        self.given: list[Fetched | None] = []

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        self.fetched.append([xy for some in tiles for xy in some.xy.tolist()])
        return Fetched(0, dict.fromkeys(range(len(tiles)), b"x"))

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        self.given.append(fetched)
        for (x, y), target in zip(tiles.xy.tolist(), out, strict=True):
            target[...] = self.read(Block(x, y, tiles.size, tiles.size, tiles.scale_x, tiles.scale_y)).pixels
        return np.zeros((0, 4), np.int64)


@pytest.mark.parametrize("tile", [256, 224])
def test_what_is_not_in_is_fetched_ahead_by_whole_shards(tmp_path: Path, tile: int) -> None:
    """Once each, however many runs of tiles touch them; nothing is fetched from a slide whose shards are in."""
    image = np.random.default_rng(0).integers(0, 255, (2048, 3000, 3), dtype=np.uint8)
    slide = Ahead(image)
    grid = make_grid(slide.info, float(slide.info.mpp_x or 0), tile=tile, overlap=0)
    index = np.argwhere(np.ones((grid.rows, grid.columns), bool))
    want = [batch.pixels for batch in stream(ArrayReader(image), grid, index)]
    cold = [batch.pixels for batch in stream(cache_of(slide, tmp_path), grid, index)]
    asked = [tuple(xy) for run in slide.fetched for xy in run]
    assert sorted(asked) == [(x, y) for x in (0, 1024, 2048) for y in (0, 1024)]
    assert all(one is not None for one in slide.given)
    slide.fetched.clear()
    warm = [batch.pixels for batch in stream(cache_of(slide, tmp_path), grid, index)]
    assert not slide.fetched
    for got in (cold, warm):
        assert all(np.array_equal(some, other) for some, other in zip(got, want, strict=True))


# ---------------------------------------------------------------- quota


def test_the_least_recently_used_shards_go_first(tmp_path: Path) -> None:
    """A shard that was read again after it was written stays, and the one used longest ago goes."""
    slide = ArrayReader(np.random.default_rng(0).integers(0, 255, (2 * SHARD, 2 * SHARD, 3), dtype=np.uint8))
    cache_of(slide, tmp_path).read(Block(0, 0, 2 * SHARD, 2 * SHARD, 1.0, 1.0))
    paths = shards(tmp_path)
    for age, path in enumerate(paths):
        os.utime(path, (1e9 + age, 1e9 + age))
    cache_of(slide, tmp_path).read(Block(0, 0, CHUNK, CHUNK, 1.0, 1.0))  # the first shard: the oldest until now
    total = sum(path.stat().st_size for path in paths)
    assert trim(tmp_path, total) == 0
    assert trim(tmp_path, total - 1) == total // 4
    assert shards(tmp_path) == [paths[0], *paths[2:]]


def test_an_evicted_shard_is_filled_again(slide: ArrayReader, tmp_path: Path) -> None:
    """A reader that knew the shard reads the slide again: never blank pixels."""
    cached = cache_of(slide, tmp_path)
    want = cached.read(WHOLE).pixels
    for path in shards(tmp_path):
        path.unlink()
    assert np.array_equal(cached.read(WHOLE).pixels, want)
    assert cached.filled == 8


def test_the_quota_holds_while_a_run_writes(tmp_path: Path) -> None:
    """A cache of less than the slide: at no time more than the quota and one shard."""
    image = np.random.default_rng(0).integers(0, 255, (2048, 6144, 3), dtype=np.uint8)
    quota = Quota(tmp_path, 8_000_000)
    cached = cache_of(ArrayReader(image), tmp_path, quota)
    for x in range(0, 6144, 512):
        cached.read(Block(x, 0, 512, 2048, 1.0, 1.0))
        assert sum(shard.size for shard in stored_shards(tmp_path)) <= 8_000_000
    assert len(shards(tmp_path)) == 2


def test_one_process_trims_at_a_time(slide: ArrayReader, tmp_path: Path) -> None:
    """While another holds the lock nothing is removed, and nobody waits."""
    import fcntl

    cache_of(slide, tmp_path).read(WHOLE)
    with (tmp_path / ".trim").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = threading.Event()
        threading.Thread(target=lambda: (trim(tmp_path, 1), done.set())).start()
        assert done.wait(5)
    assert len(shards(tmp_path)) == 4
    assert trim(tmp_path, 1) > 0
    assert not shards(tmp_path)
