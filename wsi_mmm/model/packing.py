"""Tiles of several calls in one micro-batch: a call's last few tiles need not be padded while another call waits.

Measured on tissue of a slide in blocks of 64 tiles (many at its edge hold few): padding each block's last micro-batch
costs a tenth of the model's time. A tile's answer depends neither on its companions nor on its place in the batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from wsi_mmm.timing import count_waiting
from wsi_mmm.types import U8

Answers = dict[str, npt.NDArray[Any]]


@dataclass(slots=True, eq=False)
class Call:
    """Tiles uint8[n, s, s, 3] that somebody waits for, in memory or on the device, and their answers as they come."""

    pixels: U8 | Tensor
    answers: Answers = field(default_factory=dict)
    taken: int = 0
    left: int = 0
    error: BaseException | None = None
    added: float = field(default_factory=time.perf_counter)
    begun: float = 0.0  # perf_counter: its first tiles are taken
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.left = len(self.pixels)

    def wait(self) -> Answers:
        """All answers, in the order of the tiles; raises what the model raised."""
        self.done.wait()
        count_waiting(self.begun - self.added)
        if self.error is not None:
            raise self.error
        return self.answers


@dataclass(frozen=True, slots=True)
class Piece:
    """Tiles ``start`` to ``stop`` of a call."""

    call: Call
    start: int
    stop: int

    @property
    def pixels(self) -> U8 | Tensor:
        """The tiles themselves."""
        return self.call.pixels[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Packet:
    """What one micro-batch of ``size`` tiles is to hold: ``count`` of them are real, none when nothing waits."""

    pieces: tuple[Piece, ...]
    size: int

    @property
    def count(self) -> int:
        """How many tiles the pieces are."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(slots=True)
class Waiting:
    """Calls whose tiles have not all been taken, oldest first. Callable from several threads."""

    _calls: deque[Call] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, call: Call) -> None:
        """Put a call of at least one tile at the end."""
        with self._lock:
            self._calls.append(call)

    def take(self, pick: Callable[[], int]) -> Packet:
        """The next ``pick()`` tiles, of one call or of several; fewer when there are no more, none when none wait."""
        with self._lock:
            found: list[Piece] = []
            size = room = pick() if self._calls else 0
            while room and self._calls:
                call = self._calls[0]
                call.begun = call.begun or time.perf_counter()
                stop = min(len(call.pixels), call.taken + room)
                found.append(Piece(call, call.taken, stop))
                room -= stop - call.taken
                call.taken = stop
                if stop == len(call.pixels):
                    self._calls.popleft()
            return Packet(tuple(found), size)

    def give(self, pieces: Sequence[Piece], answers: Answers) -> None:
        """Hand the answers of a micro-batch, whose first tiles are those of ``pieces`` in order, to their calls."""
        first = 0
        for piece in pieces:
            count = piece.stop - piece.start
            with self._lock:
                for name, values in answers.items():
                    if name not in piece.call.answers:
                        shape = (len(piece.call.pixels), *values.shape[1:])
                        piece.call.answers[name] = np.empty(shape, values.dtype)
            for name, values in answers.items():
                piece.call.answers[name][piece.start : piece.stop] = values[first : first + count]
            first += count
            with self._lock:
                piece.call.left -= count
                if piece.call.left == 0:
                    piece.call.done.set()

    def fail(self, pieces: Sequence[Piece], error: BaseException) -> None:
        """The micro-batch of ``pieces`` raised: so do their calls, whose other tiles are dropped."""
        with self._lock:
            for call in {piece.call for piece in pieces}:
                call.error = error
                if call in self._calls:
                    self._calls.remove(call)
                call.done.set()
