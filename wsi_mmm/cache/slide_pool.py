"""Open slides shared by threads: a bounded number, with the tile cache in front of a reader where it pays."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from wsi_mmm.cache.choice import TileCacheChoice, choose
from wsi_mmm.cache.pixels import CachedReader, pixels_uri
from wsi_mmm.cache.quota import Quota
from wsi_mmm.slides import Reader, Slide, open_slide
from wsi_mmm.storage import store
from wsi_mmm.types import Tiles

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
    """A slide to open: its URI, the mpp that a user gives for it, and the reader that is asked for."""

    uri: str
    mpp: float | None = None
    reader: str | None = None


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
                self.slide = open_slide(key.uri, key.mpp, key.reader)
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
        entry = self._enter_slide(key)
        try:
            yield entry.open(key)
        finally:
            self._leave_slide(entry)

    @contextmanager
    def reader(self, key: SlideKey, tiles: Tiles, caching: TileCaching | None) -> Iterator[Reader]:
        """The reader for ``tiles`` of a slide: its own, or the tile cache in front of it.

        The first call for a slide and scale reads a few of them to measure whether the cache pays. Raises as `slide`
        does, and OutputError.
        """
        entry = self._enter_slide(key)
        try:
            slide = entry.open(key)
            cached = None
            if caching is not None and len(tiles.xy):
                with entry.lock:
                    cached = self._cached_reader(entry, slide, tiles, caching)
            yield cached or slide.reader
        finally:
            self._leave_slide(entry)

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

    def _enter_slide(self, key: SlideKey) -> _PoolEntry:
        if self._process != os.getpid():  # files and threads of the parent are not ours
            self._entries, self._lock, self._process = OrderedDict(), threading.Lock(), os.getpid()
        with self._lock:
            entry = self._entries.setdefault(key, _PoolEntry())
            self._entries.move_to_end(key)
            entry.users += 1
        return entry

    def _leave_slide(self, entry: _PoolEntry) -> None:
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
        key = (caching.root, caching.quota)
        with self._lock:
            if key not in self._quotas:
                self._quotas[key] = Quota(store.local_path(caching.root), caching.quota)
            return self._quotas[key]
