"""Open slides shared by threads: a bounded number, with the tile cache in front of a reader where it pays."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from wsi_mmm.cache.inventory import Quota
from wsi_mmm.cache.pixels import CachedReader, pixels_uri
from wsi_mmm.slides import Reader, Slide, open_slide
from wsi_mmm.slides.resample.cut import fill_tiles
from wsi_mmm.storage import store
from wsi_mmm.types import U8, Tiles

OPEN_SLIDES = 8
"""Slides that stay open while nobody reads them. An open slide keeps up to 128 MB of decoded tiles."""
KEPT_CHOICES = 1024  # slides whose measurement is remembered


@dataclass(frozen=True, slots=True)
class TileCaching:
    """A tile cache at the folder or URI ``root``; ``use`` "auto" measures on each slide whether that pays.

    ``quota``: bytes that the cache may take, for a folder on a local disk.
    """

    root: str
    use: Literal["auto", "on"] = "auto"
    quota: int | None = None


@dataclass(frozen=True, slots=True)
class SlideKey:
    """A slide to open: its URI, the mpp that a user gives for it, the reader and the scene that are asked for."""

    uri: str
    mpp: float | None = None
    reader: str | None = None
    scene: int | None = None


@dataclass(slots=True)
class _PoolEntry:
    """A slide that is open or being opened; ``users``: how many read it now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    slide: Slide | None = None
    users: int = 0
    cached: dict[tuple[str, float, float], CachedReader] = field(default_factory=dict)

    def open(self, key: SlideKey) -> Slide:
        """The slide, opened by the first thread that asks; others wait for it."""
        with self.lock:
            if self.slide is None:
                self.slide = open_slide(key.uri, key.mpp, key.reader, key.scene)
            return self.slide

    def close(self) -> None:
        """Close the slide, if it is open."""
        with self.lock:
            if self.slide is not None:
                self.slide.close()
                self.slide = None
            self.cached.clear()


@dataclass(slots=True)
class SlidePool:
    """Opens slides when they are asked for and closes those that were used least recently.

    Thread-safe; a forked process begins with none open.
    """

    limit: int = OPEN_SLIDES
    _entries: OrderedDict[SlideKey, _PoolEntry] = field(default_factory=OrderedDict)
    _choices: OrderedDict[tuple[str, str, float, float], TileCacheChoice] = field(default_factory=OrderedDict)
    _quotas: dict[tuple[str, int], Quota] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _process: int = field(default_factory=os.getpid)

    @contextmanager
    def slide(self, key: SlideKey) -> Iterator[Slide]:
        """The slide, open until the context ends and for a while after it. Raises what `open_slide` raises."""
        with self._hold_slide(key) as entry:
            yield entry.open(key)

    @contextmanager
    def reader(self, key: SlideKey, tiles: Tiles, caching: TileCaching | None) -> Iterator[Reader]:
        """The reader for ``tiles`` of a slide: its own, or the tile cache in front of it.

        The first call for a slide and scale reads a few of them to measure whether the cache pays. Raises as `slide`
        does, and OutputError.
        """
        with self._hold_slide(key) as entry:
            slide, cached = entry.open(key), None
            if caching is not None and len(tiles.xy):
                with entry.lock:
                    cached = self._cached_reader(entry, slide, tiles, caching)
            yield cached or slide.reader

    def choice_texts(self, uri: str | None = None) -> list[str]:
        """The measurements and choices, for reports: a line per slide; of the slide at ``uri`` alone when given."""
        with self._lock:
            found = sorted((key, choice) for key, choice in self._choices.items() if uri in (None, key[0]))
        return [choice.words if uri else f"{store.redact(key[0])}: {choice.words}" for key, choice in found]

    def close(self) -> None:
        """Close every slide. Nobody may be reading; using the pool again opens them again."""
        with self._lock:
            entries, self._entries = list(self._entries.values()), OrderedDict()
            self._quotas.clear()
        for entry in entries:
            entry.close()

    def open_count(self) -> int:
        """Slides that are open now."""
        with self._lock:
            return sum(entry.slide is not None for entry in self._entries.values())

    @contextmanager
    def _hold_slide(self, key: SlideKey) -> Iterator[_PoolEntry]:
        """The entry of a slide; at the end, slides that nobody reads are closed where they are too many."""
        if self._process != os.getpid():  # files and threads of the parent are not ours
            self._entries, self._lock, self._process = OrderedDict(), threading.Lock(), os.getpid()
        with self._lock:
            entry = self._entries.setdefault(key, _PoolEntry())
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            yield entry
        finally:
            with self._lock:
                entry.users -= 1
                idle = [key for key, one in self._entries.items() if one.users == 0]
                closing = [self._entries.pop(key) for key in idle[: max(0, len(self._entries) - self.limit)]]
            for one in closing:  # nobody else can find these any more
                one.close()

    def _cached_reader(
        self, entry: _PoolEntry, slide: Slide, tiles: Tiles, caching: TileCaching
    ) -> CachedReader | None:
        """The cache's reader where it is to be used; the caller holds the entry's lock."""
        scale = (tiles.scale_x, tiles.scale_y)
        key = (caching.root, *scale)
        if key not in entry.cached:
            uri = pixels_uri(caching.root, slide.info, *scale)
            entry.cached[key] = CachedReader(slide.reader, uri, *scale, quota=self._shared_quota(caching))
        if caching.use == "on":
            return entry.cached[key]
        measured = (slide.info.uri, *key)
        choice = self._choices.get(measured) or choose(entry.cached[key], tiles)
        with self._lock:
            self._choices[measured] = choice
            while len(self._choices) > KEPT_CHOICES:
                self._choices.popitem(last=False)
        return entry.cached[key] if choice.use else None

    def _shared_quota(self, caching: TileCaching) -> Quota | None:
        if caching.quota is None or not store.is_local(caching.root):
            return None
        quota = Quota(store.local_path(caching.root), caching.quota)
        with self._lock:
            return self._quotas.setdefault((caching.root, caching.quota), quota)


# ---------------------------------------------------------------- does keeping tiles pay?

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
    clock = time.perf_counter if cached.remote or not store.is_local(cached.uri) else time.thread_time
    read_ms = _measure_ms(lambda: fill_tiles(cached.inner, sample, out, None), clock) / len(out)
    before = cached.stored_under(sample)
    cached.read_tiles(sample, out)
    cached_ms = _measure_ms(lambda: cached.read_tiles(sample, out), clock) / len(out)
    choice = TileCacheChoice(pays(read_ms, cached_ms, out[0]), read_ms, cached_ms)
    if not choice.use:
        cached.drop(cached.stored_under(sample) - before)
    return choice


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
