"""From a reader's array to the device: the next micro-batch is copied while the model works on this one.

On CUDA: two pinned buffers that are used again and again, a stream of its own for copies, and events both ways, so
that a buffer is not overwritten before it was sent and the model does not begin before its pixels are there. On a CPU
the same code runs with a plain buffer and no streams; that is what the tests see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from wsi_mmm.types import U8

SLOTS = 2
T = TypeVar("T")


class Stager:
    """Micro-batches uint8[k, s, s, 3], padded to ``size`` tiles with zeros, on ``device``. For one thread.

    What ``stage`` gives holds until it has been called ``SLOTS`` more times.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._buffers: list[Tensor | None] = [None] * SLOTS
        self._turn = 0
        self._side = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._sent: list[torch.cuda.Event | None] = [None] * SLOTS

    def stage(self, pixels: U8, size: int) -> Tensor:
        """The tiles on the device; on CUDA the copy may still be under way: see ``ready``."""
        if not self._cuda and len(pixels) == size and pixels.flags.c_contiguous and pixels.flags.writeable:
            return torch.from_numpy(pixels)
        slot = self._turn = (self._turn + 1) % SLOTS
        sent = self._sent[slot]
        if sent is not None:
            sent.synchronize()
        buffer = self._buffer(slot, (size, *pixels.shape[1:]))
        host = buffer.numpy()
        np.copyto(host[: len(pixels)], pixels)
        host[len(pixels) :] = 0
        return self._send(buffer, slot)

    def ready(self, staged: Tensor) -> Tensor:
        """``staged`` for the current stream, which waits for its copy."""
        if self._side is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._side)
            staged.record_stream(current)
        return staged

    def _buffer(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        held = self._buffers[slot]
        if held is None or held.shape != shape:
            held = torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda)
            self._buffers[slot] = held
        return held

    def _send(self, buffer: Tensor, slot: int) -> Tensor:
        if self._side is None:
            return buffer if self.device.type == "cpu" else buffer.to(self.device)
        with torch.cuda.stream(self._side):
            there = buffer.to(self.device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._side)
        self._sent[slot] = event
        return there


def staged_ahead(parts: Iterable[U8], size: int, stager: Stager, work: Callable[[Tensor, int], T]) -> Iterator[T]:
    """``work(tiles on the device, how many are real)`` for each part in order, the next part staged before it."""
    todo = iter(parts)
    part = next(todo, None)
    ahead = None if part is None else (stager.stage(part, size), len(part))
    while ahead is not None:
        now, part = ahead, next(todo, None)
        ready = stager.ready(now[0])
        ahead = None if part is None else (stager.stage(part, size), len(part))
        yield work(ready, now[1])
