"""Merge byte ranges so that many small reads become few requests, and cut the answers up again without a copy."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    """The spans to fetch (start, length), ascending, without overlap, and the place of each range in them: the span it
    begins in (-1 when it is empty), where in it, and where it ends, counted from the start of that span."""

    spans: list[Range]
    places: list[tuple[int, int, int]]


def plan_spans(ranges: Ranges, size: int, rule: MergeRule) -> FetchPlan:
    """Return the spans that cover ``ranges``, clipped to an object of ``size`` bytes."""
    wanted = [(min(max(start, 0), size), start + length) for start, length in np.asarray(ranges).tolist()]
    parts = [(start, min(stop, size)) for start, stop in wanted]
    runs: list[list[int]] = []  # start, stop: ranges that touch each other
    whole: list[int] = []  # a cut here crosses no range
    for start, stop in sorted(part for part in parts if part[0] < part[1]):
        if runs and start <= runs[-1][1]:
            whole += [start] if start == runs[-1][1] else []
            runs[-1][1] = max(stop, runs[-1][1])
        else:
            whole += [start] if runs else []
            runs.append([start, stop])
    spans: list[list[int]] = []
    joined = _join_gaps([b[0] - a[1] for a, b in pairwise(runs)], sum(stop - start for start, stop in runs), rule)
    for n, (start, stop) in enumerate(runs):
        if n in joined:
            spans[-1][1] = stop
        else:
            spans.append([start, stop])
    if any(stop - start >= 2 * rule.part for start, stop in spans):
        spans = [part for start, stop in spans for part in _cut_span(start, stop, np.array(whole, np.int64), rule)]
    starts = [start for start, _ in spans]
    places = []
    for start, stop in parts:
        n = bisect_right(starts, start) - 1 if start < stop else -1
        places.append((n, start - starts[n], stop - starts[n]) if n >= 0 else (-1, 0, 0))
    return FetchPlan([(start, stop - start) for start, stop in spans], places)


def _join_gaps(gaps: Sequence[int], needed: int, rule: MergeRule) -> set[int]:
    """Return the numbers of the runs that are joined to the one before: by the smallest gaps, as the rule allows."""
    joined, spent = set(), 0
    for gap, n in sorted((gap, n) for n, gap in enumerate(gaps, start=1)):
        spent += gap
        if gap > rule.gap or spent > rule.waste * needed:
            break
        joined.add(n)
    return joined


def _cut_span(low: int, high: int, whole: I64, rule: MergeRule) -> list[list[int]]:
    """Return (start, stop) of the parts of a span: equal ones that end between ranges."""
    length = high - low
    number = max(min(length // rule.part, rule.most), -(-length // rule.longest))
    if number < 2:
        return [[low, high]]
    cuts = low + length * np.arange(1, number, dtype=np.int64) // number
    if len(whole):
        after = np.clip(np.searchsorted(whole, cuts), 0, len(whole) - 1)
        # A cut through a range costs a copy, but a part half as long again costs more.
        near = np.abs(whole[after] - cuts) < length // (2 * number)
        cuts = np.unique(np.where(near, whole[after], cuts))
    return [list(part) for part in pairwise([low, *cuts[(cuts > low) & (cuts < high)].tolist(), high])]


def fetch_merged(
    ranges: Ranges, size: int, *, rule: MergeRule, get: Callable[[Sequence[Range]], Sequence[Buffer]]
) -> list[Buffer]:
    """Return the bytes of each range, clipped to ``size``, fetched by ``get`` in merged spans: views, not copies."""
    plan = plan_spans(ranges, size, rule)
    if not plan.spans:
        return [b""] * len(plan.places)
    with timed("fetch"):
        views = [memoryview(part) for part in get(plan.spans)]
    return [
        b"" if n < 0 else views[n][a:b] if b <= len(views[n]) else _join_views(views[n:], a, b)
        for n, a, b in plan.places
    ]


def _join_views(views: Sequence[memoryview], start: int, stop: int) -> bytes:
    """Return the bytes of a range that continues in the next spans."""
    parts = []
    for view in views:
        parts.append(view[start:stop])
        start, stop = 0, stop - len(view)
        if stop <= 0:
            break
    return b"".join(parts)
