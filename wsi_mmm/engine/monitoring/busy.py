"""When the models of a run's workers ran: spans that are kept as long as some slide under way needs them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

BusySpan = tuple[str, float, float]  # worker (host:worker), epoch seconds


@dataclass(slots=True)
class BusyTimes:
    """Spans of each worker, merged and in order. Adding is cheap, because spans come nearly in order."""

    _starts: dict[str, list[float]] = field(default_factory=dict)
    _ends: dict[str, list[float]] = field(default_factory=dict)
    _room: int = 1024  # spans that may be there before the old ones are looked for
    _count: int = 0

    def add(self, worker: str, spans: Iterable[tuple[float, float]]) -> None:
        """Add spans (start, end) of a worker; spans that touch are merged."""
        starts, ends = self._starts.setdefault(worker, []), self._ends.setdefault(worker, [])
        for start, end in spans:
            first, last = bisect_left(ends, start), bisect_right(starts, end)
            self._count += 1 - (last - first)
            if first < last:
                start, end = min(start, starts[first]), max(end, ends[last - 1])
            starts[first:last], ends[first:last] = [start], [end]

    def within(self, since: float, until: float) -> list[BusySpan]:
        """The spans between two times, cut off at both."""
        return [
            (worker, max(since, start), min(until, end))
            for worker, starts in self._starts.items()
            for start, end in self._overlapping_spans(worker, starts, since, until)
        ]

    def _overlapping_spans(
        self, worker: str, starts: list[float], since: float, until: float
    ) -> Iterator[tuple[float, float]]:
        ends = self._ends[worker]
        part = slice(bisect_right(ends, since), bisect_left(starts, until))
        return zip(starts[part], ends[part], strict=True)

    def forget(self, before: float) -> None:
        """Drop spans that ended before a time, once there are enough of them to be worth it."""
        if self._count < self._room:
            return
        for worker in list(self._ends):
            cut = bisect_left(self._ends[worker], before)
            del self._starts[worker][:cut], self._ends[worker][:cut]
            if not self._ends[worker]:
                del self._starts[worker], self._ends[worker]
        self._count = sum(map(len, self._ends.values()))
        self._room = max(1024, 2 * self._count)
