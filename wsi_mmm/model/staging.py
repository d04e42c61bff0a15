"""From a reader's array to the device: the next batch is copied while the model computes this one.

On CUDA: two pinned buffers that are used again and again, a stream of its own for copies, and events both ways, so
that a buffer is not overwritten before it was sent and the model does not begin before its pixels are there. On a CPU
the same code runs with a plain buffer and no streams.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wsi_mmm.types import U8

SLOTS = 2


class BatchStager:
    """Batches uint8[k, s, s, 3], padded to ``size`` tiles with zeros, on ``device``. For one thread.

    A batch that ``stage`` returned holds until it has been called ``SLOTS`` more times.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._buffers: list[Tensor | None] = [None] * SLOTS
        self._turn = 0
        self._side = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._sent: list[torch.cuda.Event | None] = [None] * SLOTS

    def stage(self, parts: Sequence[U8], size: int) -> Tensor:
        """The tiles of ``parts``, one after another, on the device; a copy may be under way: see `await_copy`."""
        if not self._cuda and len(parts) == 1 and len(parts[0]) == size and _can_share(parts[0]):
            return torch.from_numpy(parts[0])
        slot = self._turn = (self._turn + 1) % SLOTS
        sent = self._sent[slot]
        if sent is not None:
            sent.synchronize()
        buffer = self._find_buffer(slot, (size, *parts[0].shape[1:]))
        host, first = buffer.numpy(), 0
        for part in parts:
            np.copyto(host[first : first + len(part)], part)
            first += len(part)
        host[first:] = 0
        if self._side is None:
            return buffer if self.device.type == "cpu" else buffer.to(self.device)
        with torch.cuda.stream(self._side):
            there = buffer.to(self.device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._side)
        self._sent[slot] = event
        return there

    def await_copy(self, staged: Tensor) -> Tensor:
        """Let the current stream wait for the copy of ``staged``, and return it."""
        if self._side is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._side)
            staged.record_stream(current)
        return staged

    def _find_buffer(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        held = self._buffers[slot]
        if held is None or held.shape != shape:
            held = torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda)
            self._buffers[slot] = held
        return held


def _can_share(pixels: U8) -> bool:
    """Return whether torch can read the array where it is."""
    return pixels.flags.c_contiguous and pixels.flags.writeable
