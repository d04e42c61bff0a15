"""When the models were at work: merged spans, and only as many as are needed."""

from __future__ import annotations

import random

import pytest

from wsi_mmm.engine.monitoring.accounting import BusyTimes


def covered(spans: list[tuple[float, float]], since: float, until: float) -> float:
    """The length of a union, the slow way: in steps of a tenth."""
    steps = range(round(since * 10), round(until * 10))
    return sum(any(start * 10 <= step < end * 10 for start, end in spans) for step in steps) / 10


@pytest.mark.parametrize("seed", range(5))
def test_spans_in_any_order_give_their_union(seed: int) -> None:
    """Whatever the order, what lies within two times is the union of all spans, cut off there."""
    draw = random.Random(seed)
    starts = [draw.randrange(100) for _ in range(40)]
    spans = [(float(start), start + draw.randrange(1, 60) / 10) for start in starts]
    times = BusyTimes()
    for span in spans:
        times.add("a", [span])
    for since, until in ((0.0, 110.0), (13.0, 57.0), (40.0, 41.0)):
        found = times.within(since, until)
        assert sum(end - start for _, start, end in found) == pytest.approx(covered(spans, since, until))


def test_processes_are_kept_apart() -> None:
    """Spans of two workers at one time are two spans."""
    times = BusyTimes()
    times.add("a", [(0.0, 2.0)])
    times.add("b", [(1.0, 3.0)])
    assert times.within(0.0, 5.0) == [("a", 0.0, 2.0), ("b", 1.0, 3.0)]


def test_what_nobody_needs_any_more_is_dropped() -> None:
    """However long a run: as many spans are held as its slides under way need, and some more."""
    times, most = BusyTimes(), 0
    for n in range(20_000):
        times.add(f"w{n % 3}", [(float(n), n + 0.5)])
        times.forget(before=n - 50.0)
        most = max(most, len(times.within(0.0, 1e9)))
    assert most <= 1200
    assert len(times.within(19_950.0, 1e9)) == 50
