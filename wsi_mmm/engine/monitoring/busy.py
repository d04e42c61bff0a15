"""When the models of a run's processes were at work: spans that are kept as long as some slide under way needs them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Span = tuple[int, float, float]  # pid, epoch seconds


@dataclass(slots=True)
class BusyTimes:
    """Spans of each process, merged and in order. Adding costs next to nothing, for spans come nearly in order."""

    _starts: dict[int, list[float]] = field(default_factory=dict)
    _ends: dict[int, list[float]] = field(default_factory=dict)
    _room: int = 1024  # spans that may be there before the old ones are looked for
    _count: int = 0

    def add(self, pid: int, spans: Iterable[tuple[float, float]]) -> None:
        """Take in spans (start, end) of a process; those that touch others become one with them."""
        starts, ends = self._starts.setdefault(pid, []), self._ends.setdefault(pid, [])
        for start, end in spans:
            first, last = bisect_left(ends, start), bisect_right(starts, end)
            self._count += 1 - (last - first)
            if first < last:
                start, end = min(start, starts[first]), max(end, ends[last - 1])
            starts[first:last], ends[first:last] = [start], [end]

    def within(self, since: float, until: float) -> list[Span]:
        """What lies between two times, cut off at both."""
        return [
            (pid, max(since, start), min(until, end))
            for pid, starts in self._starts.items()
            for start, end in self._overlapping(pid, starts, since, until)
        ]

    def _overlapping(self, pid: int, starts: list[float], since: float, until: float) -> Iterator[tuple[float, float]]:
        ends = self._ends[pid]
        part = slice(bisect_right(ends, since), bisect_left(starts, until))
        return zip(starts[part], ends[part], strict=True)

    def forget(self, before: float) -> None:
        """Drop what ended before a time, once there is so much of it that it is worth looking."""
        if self._count < self._room:
            return
        for pid in list(self._ends):
            cut = bisect_left(self._ends[pid], before)
            del self._starts[pid][:cut], self._ends[pid][:cut]
            if not self._ends[pid]:
                del self._starts[pid], self._ends[pid]
        self._count = sum(map(len, self._ends.values()))
        self._room = max(1024, 2 * self._count)
