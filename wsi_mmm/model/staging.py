"""From a reader's array to the device: the next micro-batch is copied while the model works on this one.

On CUDA: two pinned buffers that are used again and again, a stream of its own for copies, and events both ways, so
that a buffer is not overwritten before it was sent and the model does not begin before its pixels are there. On a CPU
the same code runs with a plain buffer and no streams; that is what the tests see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
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

    def stage(self, parts: Sequence[U8 | Tensor], size: int) -> Tensor:
        """The tiles of ``parts``, one after another, on the device; a copy may be under way: see ``ready``.

        Parts that are tensors lie on the device already, complete.
        """
        in_memory = [part for part in parts if not isinstance(part, Tensor)]
        return self._copied(in_memory, size) if len(in_memory) == len(parts) else self._gathered(parts, size)

    def _gathered(self, parts: Sequence[U8 | Tensor], size: int) -> Tensor:
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            there, first = torch.zeros((size, *parts[0].shape[1:]), dtype=torch.uint8, device=self.device), 0
            for part in parts:
                tiles = part if isinstance(part, Tensor) else torch.from_numpy(part)
                there[first : first + len(part)].copy_(tiles)
                first += len(part)
                if self._side is not None and tiles.is_cuda:
                    tiles.record_stream(self._side)  # made on another stream: not free before this one has read it
        return there

    def _copied(self, parts: Sequence[U8], size: int) -> Tensor:
        if not self._cuda and len(parts) == 1 and len(parts[0]) == size and _plain(parts[0]):
            return torch.from_numpy(parts[0])
        slot = self._turn = (self._turn + 1) % SLOTS
        sent = self._sent[slot]
        if sent is not None:
            sent.synchronize()
        buffer = self._buffer(slot, (size, *parts[0].shape[1:]))
        host, first = buffer.numpy(), 0
        for part in parts:
            np.copyto(host[first : first + len(part)], part)
            first += len(part)
        host[first:] = 0
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


def _plain(pixels: U8) -> bool:
    return pixels.flags.c_contiguous and pixels.flags.writeable


def staged_ahead(
    parts: Iterable[T], stage: Callable[[T], Tensor], stager: Stager, *, ahead: bool = True
) -> Iterator[tuple[T, Tensor]]:
    """Each part in order with its tiles on the device; with ``ahead`` the next part is staged before one is given."""
    if not ahead:
        yield from ((part, stager.ready(stage(part))) for part in parts)
        return
    todo = iter(parts)
    held = [(part, stage(part)) for part in islice(todo, 1)]
    while held:
        part, tiles = held.pop()
        ready = stager.ready(tiles)
        held = [(following, stage(following)) for following in islice(todo, 1)]
        yield part, ready
