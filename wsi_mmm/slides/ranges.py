"""Merging byte ranges, so that many small reads become few."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

Range = tuple[int, int]  # start, length

_LARGEST = 8 << 20  # longer merged ranges are cut, so that parts travel side by side


class Counter:
    """Bytes and requests so far; thread-safe."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.requests = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count one request that brought ``size`` bytes."""
        with self._lock:
            self.bytes_read += size
            self.requests += 1


def merge(ranges: Sequence[Range], gap: int) -> tuple[list[Range], list[tuple[int, int]]]:
    """Return spans covering ``ranges`` (joined when at most ``gap`` apart) and, per range, (span, offset within it)."""
    spans: list[Range] = []
    where: list[tuple[int, int]] = [(0, 0)] * len(ranges)
    for n in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        start, length = ranges[n]
        if spans:
            s0, size = spans[-1]
            grown = max(s0 + size, start + length) - s0
            if start <= s0 + size + gap and (grown <= _LARGEST or start + length <= s0 + size):
                spans[-1] = (s0, grown)
                where[n] = (len(spans) - 1, start - s0)
                continue
        spans.append((start, length))
        where[n] = (len(spans) - 1, 0)
    return spans, where


def fetch_merged(
    ranges: Sequence[Range], size: int, *, gap: int, get: Callable[[Sequence[Range]], list[bytes]]
) -> list[bytes]:
    """Return the bytes of each range, clipped to ``size``, by way of ``get`` on merged spans."""
    clipped = [_clip(start, length, size) for start, length in ranges]
    wanted = [n for n, (_, length) in enumerate(clipped) if length]
    out = [b""] * len(ranges)
    if not wanted:
        return out
    spans, where = merge([clipped[n] for n in wanted], gap)
    parts = get(spans)
    for n, (span, offset) in zip(wanted, where, strict=True):
        out[n] = parts[span][offset : offset + clipped[n][1]]
    return out


def _clip(start: int, length: int, size: int) -> Range:
    start = min(max(start, 0), size)
    return start, max(0, min(length, size - start))
