"""Tiles that wait for a model, of several callers, handed out in batches of one size."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.timing import count_waiting
from wsi_mmm.types import U8

Answers = dict[str, npt.NDArray[Any]]
"""By task; "" holds the pooled vectors."""


@dataclass(slots=True, eq=False)
class PendingTiles:
    """Tiles uint8[n, s, s, 3] of one caller, and their answers as they come.

    The first ``taken`` tiles are in batches; ``left`` tiles have no answer yet; ``begun``: time of the first batch, of
    ``perf_counter``.
    """

    pixels: U8
    left: int
    answers: Answers = field(default_factory=dict)
    taken: int = 0
    error: BaseException | None = None
    begun: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> Answers:
        """Return all answers in the order of the tiles; raise the error of a batch that failed."""
        since = time.perf_counter()
        self.done.wait()
        count_waiting(self.begun - since)
        if self.error is not None:
            raise self.error
        return self.answers


TileSpan = tuple[PendingTiles, slice]
"""Some of a caller's tiles."""


@dataclass(slots=True)
class TileQueue:
    """Tiles of one size for one choice of tasks, oldest first, handed out in batches of ``size``. Thread-safe."""

    tasks: tuple[str, ...]
    size: int
    pending: deque[PendingTiles] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, pixels: U8) -> PendingTiles:
        """Put at least one tile at the end."""
        pending = PendingTiles(pixels, len(pixels))
        with self._lock:
            self.pending.append(pending)
        return pending

    def take_batch(self) -> list[TileSpan]:
        """Return the next ``size`` tiles, of one caller or of several; fewer when no more wait."""
        spans: list[TileSpan] = []
        with self._lock:
            room = self.size
            while room and self.pending:
                first = self.pending[0]
                first.begun = first.begun or time.perf_counter()
                stop = min(len(first.pixels), first.taken + room)
                spans.append((first, slice(first.taken, stop)))
                room -= stop - first.taken
                first.taken = stop
                if stop == len(first.pixels):
                    self.pending.popleft()
        return spans

    def finish(self, spans: Sequence[TileSpan], answers: Answers) -> None:
        """Hand the answers of a batch, in the order of its tiles, to the callers."""
        first = 0
        with self._lock:
            for pending, some in spans:
                count = some.stop - some.start
                for name, values in answers.items():
                    if name not in pending.answers:
                        pending.answers[name] = np.empty((len(pending.pixels), *values.shape[1:]), values.dtype)
                    pending.answers[name][some] = values[first : first + count]
                first += count
                pending.left -= count
                if pending.left == 0:
                    pending.done.set()

    def fail(self, spans: Sequence[TileSpan], error: BaseException) -> None:
        """Let the callers of a batch raise ``error``; their other tiles are dropped."""
        with self._lock:
            for pending in {pending for pending, _ in spans}:
                pending.error = error
                if pending in self.pending:
                    self.pending.remove(pending)
                pending.done.set()
