"""The cache of decoded tiles: bounded, and no tile decoded twice at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from wsi_mmm.slides.resample.tiled import TileCache


def test_several_threads_load_each_key_once() -> None:
    """Who asks for a key in flight waits for it."""
    cache: TileCache[int, int] = TileCache(1000)
    loads: list[int] = []

    def load(keys: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        for key in keys:
            time.sleep(0.002)
            loads.append(key)
            yield key, key * 10, 1

    def visit(start: int) -> dict[int, int]:
        got: dict[int, int] = {}
        cache.visit([(start + n) % 20 for n in range(15)], load, got.__setitem__, lambda _: False)
        return got

    with ThreadPoolExecutor(6) as pool:
        for got in pool.map(visit, range(0, 40, 3)):
            assert len(got) == 15
            assert all(value == key * 10 for key, value in got.items())
    assert sorted(loads) == list(range(20))


def test_memory_is_bounded_and_cold_values_go_first() -> None:
    """Tiles at the border of a block outlive those inside it."""
    cache: TileCache[int, str] = TileCache(10)

    def load(keys: Sequence[int]) -> Iterator[tuple[int, str, int]]:
        return ((key, "tile", 2) for key in keys)

    cache.visit([1, 2, 3, 4, 5], load, lambda *_: None, lambda key: key in (2, 4))
    assert cache.used == 10
    cache.visit([6, 7], load, lambda *_: None, lambda _: False)
    assert cache.used == 10
    missing: list[int] = []

    def watch(keys: Sequence[int]) -> Iterator[tuple[int, str, int]]:
        missing.extend(keys)
        return load(keys)

    cache.visit([1, 2, 3, 4, 5, 6, 7], watch, lambda *_: None, lambda _: False)
    assert missing == [2, 4]


def test_an_error_of_one_reader_does_not_stop_those_who_waited() -> None:
    """They load the key themselves."""
    cache: TileCache[int, int] = TileCache(100)
    entered, go = threading.Event(), threading.Event()

    def failing(_: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        entered.set()
        go.wait(5)
        raise OSError("network")
        yield

    def working(keys: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        return ((key, 7, 1) for key in keys)

    got: dict[int, int] = {}
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(cache.visit, [1], failing, lambda *_: None, lambda _: False)
        entered.wait(5)
        good = pool.submit(cache.visit, [1], working, got.__setitem__, lambda _: False)
        go.set()
        with pytest.raises(OSError, match="network"):
            bad.result(5)
        good.result(5)
    assert got == {1: 7}
