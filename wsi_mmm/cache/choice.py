"""Does keeping tiles pay on this slide? Measured on tiles at hand, said in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wsi_mmm.cache.pixels import CachedReader
from wsi_mmm.slides.base import Reader
from wsi_mmm.slides.resample.cut import fill_tiles
from wsi_mmm.storage.store import is_local
from wsi_mmm.types import U8, Tiles

SAVES = 15.0
"""Milliseconds of reading that a cached MB must save: 1 GB of the disk for 15 s of a core each time it is read.

Measured per MB of pixels: JPEG from a disk saves 1 to 12 ms, JPEG 2000 22 to 80, a slide in a distant bucket as much.
"""

FASTER = 2.0
"""By how much the cache must beat the reader."""

SAMPLE = 16  # tiles


@dataclass(frozen=True, slots=True)
class TileCacheChoice:
    """Keep tiles or not (``use``); measured milliseconds per tile from the reader and from the cache."""

    use: bool
    read_ms: float
    cached_ms: float

    @property
    def words(self) -> str:
        """For reports and logs."""
        verdict = "tiles cached" if self.use else "tiles not cached"
        return f"{verdict}: reading costs {self.read_ms:.2g} ms a tile, the cache {self.cached_ms:.2g}"


def choose(cached: CachedReader, tiles: Tiles) -> TileCacheChoice:
    """Read a few of ``tiles`` from the slide, then from the cache, and decide. Raises StorageError, OutputError.

    The shards under them stay where the cache pays; else those that were not there before are removed.
    """
    sample = _nearby_tiles(tiles)
    out = list(np.empty((len(sample.xy), sample.size, sample.size, 3), np.uint8))
    first = Tiles(sample.xy[:1], sample.size, sample.scale_x, sample.scale_y)
    fill_tiles(cached.inner, first, out[:1], None)  # imports, connections and compiled code are not the slide's cost
    # Other threads are at work too: what they take is no cost of reading, so the work of this thread is measured, and
    # only where a network is waited for the time that passes.
    clock = time.perf_counter if cached.remote or not is_local(cached.uri) else time.thread_time
    read_ms = _measure_ms(lambda: fill_tiles(cached.inner, sample, out, None), clock) / len(out)
    before = cached.stored_under(sample)
    cached.read_tiles(sample, out)
    cached_ms = _measure_ms(lambda: cached.read_tiles(sample, out), clock) / len(out)
    choice = TileCacheChoice(pays(read_ms, cached_ms, out[0]), read_ms, cached_ms)
    if not choice.use:
        cached.drop(cached.stored_under(sample) - before)
    return choice


def through_cache(reader: Reader, uri: str, tiles: Tiles) -> Reader:
    """The tile cache at ``uri`` in front of ``reader`` where it holds ``tiles`` or pays on them; else ``reader``."""
    cached = CachedReader(reader, uri, tiles.scale_x, tiles.scale_y)
    return cached if cached.holds(tiles) or choose(cached, tiles).use else reader


def pays(read_ms: float, cached_ms: float, tile: U8) -> bool:
    """The rule: clearly faster, and by enough for what a tile takes of the disk."""
    return read_ms >= FASTER * cached_ms and read_ms - cached_ms >= SAVES * tile.nbytes / 1e6


def _nearby_tiles(tiles: Tiles) -> Tiles:
    """Tiles that lie near the first of them: few shards are filled for a measurement."""
    far = np.abs(tiles.xy - tiles.xy[0]).max(axis=1)
    near = np.sort(np.argsort(far, kind="stable")[:SAMPLE])
    return Tiles(tiles.xy[near], tiles.size, tiles.scale_x, tiles.scale_y)


def _measure_ms(step: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    step()
    return 1000 * (clock() - begin)
