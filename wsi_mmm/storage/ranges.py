"""Merge byte ranges so that many small reads become few requests, and cut the answers up again without a copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.timing import timed
from wsi_mmm.types import I64

Range = tuple[int, int]  # start, length
Ranges = Sequence[Range] | I64  # int64[n, 2]
Buffer = bytes | memoryview


class Counter:
    """Bytes and requests so far; thread-safe."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.requests = 0
        self._lock = threading.Lock()

    def add(self, size: int, requests: int = 1) -> None:
        """Count requests that brought ``size`` bytes in all."""
        with self._lock:
            self.bytes_read += size
            self.requests += requests


@dataclass(frozen=True, slots=True)
class MergeRule:
    """Rule for joining ranges: gaps of at most ``gap`` bytes, smallest first, while they add up to at most ``waste`` of
    the bytes wanted. Spans of ``part`` bytes and more are cut into equal parts of at least ``part``, at most ``most``
    of them unless a part would be longer than ``longest``.
    """

    gap: int
    waste: float = 0.1
    part: int = 2 << 20
    most: int = 8
    longest: int = 8 << 20


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """The spans to fetch, and the place of each range in them.

    ``spans`` (start, length), ascending, without overlap. ``first`` int64[n]: the span a range begins in, -1 when the
    range is empty; ``offset`` int64[n]: where in it; ``length`` int64[n]: its bytes inside the object.
    """

    spans: list[Range]
    first: I64
    offset: I64
    length: I64


def plan_spans(ranges: Ranges, size: int, rule: MergeRule) -> FetchPlan:
    """Return the spans that cover ``ranges``, clipped to an object of ``size`` bytes."""
    wanted = np.asarray(ranges, np.int64).reshape(-1, 2)
    start = np.clip(wanted[:, 0], 0, size)
    length = np.clip(wanted[:, 1], 0, size - start)
    full = np.flatnonzero(length)
    if not len(full):
        return FetchPlan([], np.full(len(start), -1), start, length)
    by_start = full[np.argsort(start[full], kind="stable")]
    begins = start[by_start]
    ends = np.maximum.accumulate(begins + length[by_start])
    spans = _cut_spans(begins, ends, _find_breaks(begins, ends, rule), rule)
    first = np.full(len(start), -1, np.int64)
    edges = spans[:, 0]
    first[full] = np.searchsorted(edges, start[full], side="right") - 1
    return FetchPlan([(int(a), int(b - a)) for a, b in spans], first, start - edges[first], length)


def _find_breaks(begins: I64, ends: I64, rule: MergeRule) -> I64:
    """Return the positions before which a new span begins; ``ends`` are running maxima."""
    gaps = begins[1:] - ends[:-1]
    apart = np.flatnonzero(gaps > 0)
    needed = int(ends[-1] - begins[0]) - int(gaps[apart].sum())
    rising = apart[np.argsort(gaps[apart], kind="stable")]
    joined = (gaps[rising] <= rule.gap) & (np.cumsum(gaps[rising]) <= rule.waste * needed)
    return np.sort(rising[~joined]) + 1


def _cut_spans(begins: I64, ends: I64, breaks: I64, rule: MergeRule) -> I64:
    """Return int64[m, 2] (start, stop): the spans between ``breaks``, long ones in parts that end between ranges."""
    lows = begins[np.concatenate([[0], breaks])]
    highs = ends[np.concatenate([breaks - 1, [len(ends) - 1]])]
    if (highs - lows).max() < 2 * rule.part:
        return np.stack([lows, highs], axis=1)
    whole = begins[1:][begins[1:] >= ends[:-1]]  # a cut here crosses no range
    parts = [_cut_span(int(a), int(b), whole, rule) for a, b in zip(lows, highs, strict=True)]
    return np.concatenate(parts)


def _cut_span(low: int, high: int, whole: I64, rule: MergeRule) -> I64:
    length = high - low
    number = max(min(length // rule.part, rule.most), -(-length // rule.longest))
    if number < 2:
        return np.array([[low, high]], np.int64)
    cuts = low + length * np.arange(1, number, dtype=np.int64) // number
    if len(whole):
        after = np.clip(np.searchsorted(whole, cuts), 0, len(whole) - 1)
        # A cut through a range costs a copy, but a part half as long again costs more.
        near = np.abs(whole[after] - cuts) < length // (2 * number)
        cuts = np.unique(np.where(near, whole[after], cuts))
    edges = np.concatenate([[low], cuts[(cuts > low) & (cuts < high)], [high]])
    return np.stack([edges[:-1], edges[1:]], axis=1)


def fetch_merged(
    ranges: Ranges, size: int, *, rule: MergeRule, get: Callable[[Sequence[Range]], Sequence[Buffer]]
) -> list[Buffer]:
    """Return the bytes of each range, clipped to ``size``, fetched by ``get`` in merged spans: views, not copies."""
    found = plan_spans(ranges, size, rule)
    if not found.spans:
        return [b""] * len(found.first)
    with timed("fetch"):
        views = [memoryview(part) for part in get(found.spans)]
    stops = found.offset + found.length
    out: list[Buffer] = []
    for n, a, b in zip(found.first.tolist(), found.offset.tolist(), stops.tolist(), strict=True):
        if n < 0:
            out.append(b"")
        else:
            view = views[n]
            out.append(view[a:b] if b <= len(view) else _join_views(views[n:], a, b))
    return out


def _join_views(views: Sequence[memoryview], start: int, stop: int) -> bytes:
    """Return the bytes of a range that continues in the next spans."""
    parts = []
    for view in views:
        parts.append(view[start:stop])
        start, stop = 0, stop - len(view)
        if stop <= 0:
            break
    return b"".join(parts)
