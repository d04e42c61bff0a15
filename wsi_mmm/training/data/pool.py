"""Slides kept open for training: a bounded number, shared by threads, with the tile cache in front where it pays."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from wsi_mmm.cache import CachedReader, Quota, TileCacheChoice, choose, pixels_uri
from wsi_mmm.slides import Reader, Slide, open_slide
from wsi_mmm.storage import store
from wsi_mmm.types import Tiles

OPEN_SLIDES = 16
"""Slides that stay open while nobody reads them. An open slide keeps up to 128 MB of decoded tiles."""

Key = tuple[str, float | None]


@dataclass(slots=True)
class _Held:
    """A slide that is open or being opened; ``users``: who reads it now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    slide: Slide | None = None
    users: int = 0
    cached: dict[tuple[float, float], CachedReader] = field(default_factory=dict)


@dataclass(slots=True)
class SlidePool:
    """Opens slides when they are asked for and closes those that were used least recently. Thread-safe; a forked
    process begins with none open.

    ``cache``: folder or URI of the tile cache (the one that runs use: the same tiles are found again); None: none.
    ``tiles``: "auto" measures on each slide whether keeping tiles pays; "on", "off". ``quota``: bytes on a local disk.
    """

    limit: int = OPEN_SLIDES
    cache: str | None = None
    tiles: Literal["auto", "on", "off"] = "auto"
    quota: int | None = None
    _held: OrderedDict[Key, _Held] = field(default_factory=OrderedDict)
    _choices: dict[tuple[str, float, float], TileCacheChoice] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _process: int = field(default_factory=os.getpid)
    _quota: Quota | None = None

    @contextmanager
    def slide(self, uri: str, mpp: float | None = None) -> Iterator[Slide]:
        """The slide, open until the block ends and for a while after it. Raises what `open_slide` raises."""
        held = self._take((uri, mpp))
        try:
            yield _opened(held, uri, mpp)
        finally:
            self._give_back(held)

    @contextmanager
    def reader(self, uri: str, mpp: float | None, tiles: Tiles) -> Iterator[Reader]:
        """The reader of ``tiles`` of the slide: its reader, or the tile cache in front of it. On the first call for a
        slide and scale a few of them are read to measure which. Raises as `slide` does, and OutputError."""
        held = self._take((uri, mpp))
        try:
            slide = _opened(held, uri, mpp)
            with held.lock:
                cached = self._cached(held, slide, tiles)
            yield cached or slide.reader
        finally:
            self._give_back(held)

    def words(self) -> list[str]:
        """The choices made by measurement, for reports: a line per slide."""
        with self._lock:
            return [f"{store.redact(uri)}: {choice.words}" for (uri, _, _), choice in sorted(self._choices.items())]

    def close(self) -> None:
        """Close every slide; using the pool again opens them again. Nobody may be reading."""
        with self._lock:
            held, self._held = list(self._held.values()), OrderedDict()
        for one in held:
            _close(one)

    def open_count(self) -> int:
        """Slides that are open now."""
        with self._lock:
            return sum(one.slide is not None for one in self._held.values())

    def _take(self, key: Key) -> _Held:
        if self._process != os.getpid():  # files and threads of the parent are not ours
            self._held, self._lock, self._process = OrderedDict(), threading.Lock(), os.getpid()
        with self._lock:
            held = self._held.setdefault(key, _Held())
            self._held.move_to_end(key)
            held.users += 1
        return held

    def _give_back(self, held: _Held) -> None:
        with self._lock:
            held.users -= 1
            idle = [key for key, one in self._held.items() if one.users == 0]
            closing = [self._held.pop(key) for key in idle[: max(0, len(self._held) - self.limit)]]
        for one in closing:  # nobody else can find these any more
            _close(one)

    def _cached(self, held: _Held, slide: Slide, tiles: Tiles) -> CachedReader | None:
        if self.cache is None or self.tiles == "off" or not len(tiles.xy):
            return None
        scale = (tiles.scale_x, tiles.scale_y)
        if scale not in held.cached:
            place = pixels_uri(self.cache, slide.info, *scale)
            held.cached[scale] = CachedReader(slide.reader, place, *scale, quota=self._quota_of())
        if self.tiles == "on":
            return held.cached[scale]
        key = (slide.info.uri, *scale)
        if key not in self._choices:
            self._choices[key] = choose(held.cached[scale], tiles)
        return held.cached[scale] if self._choices[key].use else None

    def _quota_of(self) -> Quota | None:
        with self._lock:
            if self._quota is None and self.cache is not None and self.quota is not None and store.is_local(self.cache):
                self._quota = Quota(store.local_path(self.cache), self.quota)
            return self._quota


def _opened(held: _Held, uri: str, mpp: float | None) -> Slide:
    """Whoever comes first opens the slide; others that want it wait, those that want another one do not."""
    with held.lock:
        if held.slide is None:
            held.slide = open_slide(uri, mpp)
        return held.slide


def _close(held: _Held) -> None:
    with held.lock:
        if held.slide is not None:
            held.slide.close()
            held.slide = None
