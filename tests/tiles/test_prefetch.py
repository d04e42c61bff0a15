"""Fetching ahead: overlapping, bounded, the same bytes, and no thread and no error of its own left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.faulty import Faulty
from wsi_mmm.errors import StorageError
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.base import TileReader
from wsi_mmm.tiles.grid import blocks, make_grid, tiles_at
from wsi_mmm.tiles.stream import Prefetcher, fetch_groups, map_ahead, stream
from wsi_mmm.types import Tiles


class Fetching:
    """A fetch that takes a while: counts how many are under way, and which keys were fetched."""

    def __init__(self, seconds: float = 0.02, fails: Callable[[int], bool] = lambda key: False) -> None:
        self.seconds, self.fails = seconds, fails
        self.now = self.most = 0
        self.keys: list[int] = []
        self.lock = threading.Lock()

    def __call__(self, keys: list[int]) -> str:
        with self.lock:
            self.keys += keys
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        if any(map(self.fails, keys)):
            raise StorageError("the cable was pulled")
        return f"{keys[0]}"


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


def fetching_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("wsi-mmm-fetch")]


def test_fetches_overlap_and_are_taken_in_order() -> None:
    """Three are under way at once, never more; each key gets what its own fetch brought."""
    fetch = Fetching()
    with Prefetcher[int, str](3) as prefetch:
        for key in range(0, 20, 2):
            prefetch.announce([key, key + 1], fetch)
        assert [prefetch.take(key) for key in range(20)] == [f"{key - key % 2}" for key in range(20)]
    assert fetch.most == 3 and fetch.keys == list(range(20))
    assert fetching_threads() == []


def test_what_is_fetched_and_not_yet_used_is_bounded() -> None:
    """However long the consumer takes: the fetch that is used, and two more."""
    fetch = Fetching(0)
    with Prefetcher[int, str](3) as prefetch:
        for key in range(10):
            prefetch.announce([key], fetch)
        for key in range(8):
            wait_until(lambda n=key + 3: len(fetch.keys) >= n)  # type: ignore[misc]
            time.sleep(0.005)
            assert len(fetch.keys) == key + 3
            prefetch.take(key)


def test_a_key_that_is_taken_before_its_fetch_begins_is_not_fetched() -> None:
    """Its owner reads by itself; nothing is fetched twice, and a key is given once."""
    fetch = Fetching(0)
    with Prefetcher[int, str](1) as prefetch:
        prefetch.announce([0], fetch)
        prefetch.announce([1, 2, 3], fetch)
        prefetch.announce([4], fetch)
        assert prefetch.take(2) is None and prefetch.take(4) is None and prefetch.take(99) is None
        assert prefetch.take(0) == "0"
        assert prefetch.take(1) == "1" and prefetch.take(3) == "1" and prefetch.take(3) is None
    assert fetch.keys == [0, 1, 3]


def test_a_fetch_that_fails_is_left_to_its_owner() -> None:
    """Only that one: those behind it go on."""
    fetch = Fetching(0, fails=lambda key: key == 1)
    with Prefetcher[int, str](2) as prefetch:
        for key in range(4):
            prefetch.announce([key], fetch)
        assert [prefetch.take(key) for key in range(4)] == ["0", None, "2", "3"]


def test_keys_that_nobody_will_take_make_room() -> None:
    """A slide that has failed does not stop the fetches of the next."""
    fetch = Fetching(0)
    with Prefetcher[int, str](2) as prefetch:
        for key in range(6):
            prefetch.announce([key], fetch)
        assert prefetch.keys_left() == [*range(6)]
        prefetch.drop([0, 1, 2, 3, 99])
        assert prefetch.take(4) == "4" and prefetch.take(5) == "5" and prefetch.take(0) is None
    assert set(fetch.keys) <= {0, 1, 4, 5}


def test_closing_fetches_nothing_more_and_leaves_no_thread() -> None:
    """Also for who waits at that moment; announcing afterwards does nothing."""
    fetch = Fetching(0.05)
    prefetch = Prefetcher[int, str](2)
    for key in range(10):
        prefetch.announce([key], fetch)
    with ThreadPoolExecutor(1) as pool:
        wait_until(lambda: len(fetch.keys) == 2)
        waiting = pool.submit(prefetch.take, 0)
        prefetch.close()
        assert waiting.result() in ("0", None)
    assert fetching_threads() == [] and len(fetch.keys) == 2
    prefetch.announce([20], fetch)
    assert prefetch.take(20) is None and prefetch.take(3) is None


def test_threads_that_take_at_random_get_everything_once() -> None:
    """Whatever the order, each key is given once, or left to its taker before it was fetched."""
    fetch = Fetching(0.001)
    order = np.random.default_rng(3).permutation(60).tolist()
    with Prefetcher[int, str](3) as prefetch, ThreadPoolExecutor(4) as pool:
        for key in range(0, 60, 3):
            prefetch.announce([key, key + 1, key + 2], fetch)
        got = dict(zip(order, pool.map(prefetch.take, order), strict=True))
    assert len(fetch.keys) == len(set(fetch.keys))
    assert {key for key, data in got.items() if data is not None} <= set(fetch.keys)


def test_groups_hold_every_block_once_and_are_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is shorter, so that decoding begins soon; the last is not a scrap."""
    monkeypatch.setattr("wsi_mmm.tiles.stream.FETCH_PIXELS", 20 * 64 * 64)
    tiles = {n: Tiles(np.array([[64 * n, 0]]), 64, 1.0, 1.0) for n in range(75)}
    assert [len(group) for group in fetch_groups(tiles)] == [10, 20, 20, 25]
    assert [len(group) for group in fetch_groups(tiles, first=0)] == [1, 20, 20, 20, 14]
    assert [key for group in fetch_groups(tiles) for key in group] == list(range(75))
    assert list(fetch_groups({})) == []


def test_results_computed_ahead_come_in_order_and_are_bounded() -> None:
    """By number, or by the size that the caller says."""
    begun: list[int] = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item

    with ThreadPoolExecutor(4) as pool:
        for n, item in enumerate(map_ahead(pool, slow, range(20), most=3)):
            assert item == n and len(begun) <= n + 3
        assert list(map_ahead(pool, slow, [5, 5, 1], most=4, size=lambda item: item)) == [5, 5, 1]


@pytest.mark.parametrize("pixels", [512 * 1536, 1 << 27])
@pytest.mark.parametrize("scale", [1.0, 1.9])
def test_a_far_slide_gives_the_same_bytes_for_few_more(
    tiny_slide: Path, scale: float, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent is at most 1.15 of what the fetches need, and nothing is fetched once more by the blocks."""
    monkeypatch.setattr("wsi_mmm.tiles.stream.FETCH_PIXELS", pixels)
    with open_slide(str(tiny_slide)) as slide, Faulty(files={"/s.tiff": tiny_slide}, delay=0.02) as web:
        grid = make_grid(slide.info, 0.5 * scale, tile=128, overlap=16)
        index = np.argwhere(np.ones((grid.rows, grid.columns), bool))
        tiles = {n: tiles_at(grid, block.index) for n, block in enumerate(blocks(grid, index, 3))}
        assert isinstance(slide.reader, TileReader)
        fetches = [slide.reader.fetch([tiles[n] for n in group]) for group in fetch_groups(tiles)]
        needed = sum(len(data) for fetched in fetches for data in fetched.data.values())
        near = list(stream(slide.reader, grid, index, block_tiles=3))
        with open_slide(f"{web.url}/s.tiff") as far:
            before = far.reader.stats().bytes_read
            got = list(stream(far.reader, grid, index, block_tiles=3))
            read = far.reader.stats().bytes_read - before  # without requests that were sent once more on a busy machine
        for a, b in zip(near, got, strict=True):
            assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.xy, b.xy) and not b.failed.any()
        assert read <= 1.15 * needed and (len(fetches) == 1) == (pixels > 1 << 20)
    assert fetching_threads() == []
