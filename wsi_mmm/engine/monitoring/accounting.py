"""The time and resources of a run, per slide and per worker, from the units started and their results.

A worker is a process; its threads are those that ran steps. The time between the first and the last step of the worker
that they did not spend in steps they waited: so per worker the stages add up to its wall time times its threads. Per
slide they add up to the time from starting each of its units to having its result.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from wsi_mmm import timing
from wsi_mmm.engine.units import ForwardResult, UnitResult, WorkUnit

Seconds = dict[str, float]
BusySpan = tuple[str, float, float]
"""Worker (host:pid), and epoch seconds from when to when its model ran."""


def _zero_seconds() -> Seconds:
    return dict.fromkeys(timing.STAGES, 0.0)


def _add_seconds(total: Seconds, more: Seconds) -> None:
    for stage, seconds in more.items():
        total[stage] = total.get(stage, 0.0) + seconds


@dataclass(slots=True)
class WorkerTotals:
    """Totals of a worker process. ``first``, ``last``: epoch seconds; ``in_steps``: seconds of all threads."""

    first: float = float("inf")
    last: float = 0.0
    in_steps: float = 0.0
    threads: set[int] = field(default_factory=set)
    seconds: Seconds = field(default_factory=_zero_seconds)
    units: int = 0
    tiles: int = 0

    def add(self, result: UnitResult) -> None:
        """Count a result of this worker."""
        for one in result.facts.times:
            self.first, self.last = min(self.first, one.start), max(self.last, one.end)
            self.in_steps += one.length
            self.threads.add(one.thread)
        _add_seconds(self.seconds, timing.sum_stages(result.facts.times))
        self.units += 1
        self.tiles += result.tiles if isinstance(result, ForwardResult) else 0

    def stage_seconds(self) -> Seconds:
        """Seconds per stage; together ``wall`` times the number of threads."""
        idle = self.wall * len(self.threads) - self.in_steps
        return {**self.seconds, "waiting": self.seconds["waiting"] + max(0.0, idle)}

    @property
    def wall(self) -> float:
        """Seconds from its first step to the end of its last one."""
        return max(0.0, self.last - self.first)


@dataclass(slots=True)
class SlideTotals:
    """Totals of a slide. ``seconds`` per stage of all threads; ``steps``: seconds per step, as report.json names them.

    ``forward_started``, ``forward_ended``: epoch seconds of the first block asked for and the last one in, 0 before.
    ``busy``: when the models of all workers ran while this slide was under way, with whatever slide.
    """

    seconds: Seconds = field(default_factory=_zero_seconds)
    steps: Seconds = field(default_factory=dict)
    started: float = 0.0
    forward_started: float = 0.0
    forward_ended: float = 0.0
    cache_hits: int = 0
    bytes_read: dict[str, int] = field(default_factory=dict)
    peak_rss_mb: dict[str, float] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)
    encoders: dict[str, str] = field(default_factory=dict)
    busy: list[BusySpan] = field(default_factory=list)

    def add(self, result: UnitResult) -> None:
        """Count a result of this slide."""
        facts = result.facts
        self.bytes_read[facts.worker] = max(self.bytes_read.get(facts.worker, 0), facts.bytes_read)
        self.peak_rss_mb[facts.worker] = max(self.peak_rss_mb.get(facts.worker, 0.0), facts.peak_rss_mb)
        for one in facts.times:
            busy = one.length - (one.seconds.get("prepare", 0.0) if one.step == "model" else 0.0)
            self.steps[one.step] = self.steps.get(one.step, 0.0) + busy
        if isinstance(result, ForwardResult):
            self.forward_ended = time.time()
            self.cache_hits += result.tiles if result.cached else 0
            self.devices |= {result.device} - {""}
            if result.encoder:
                self.encoders[facts.worker] = result.encoder


# ---------------------------------------------------------------- when the models ran


def busy_spans(result: UnitResult) -> Iterator[tuple[float, float]]:
    """The (start, end) in epoch seconds in which the model ran for a unit: its loading is not counted."""
    for one in result.facts.times:
        if one.step == "model":
            yield one.start + one.seconds.get("prepare", 0.0), one.end


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
            for ends in [self._ends[worker]]
            for part in [slice(bisect_right(ends, since), bisect_left(starts, until))]
            for start, end in zip(starts[part], ends[part], strict=True)
        ]

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


def busy_share(spans: Sequence[BusySpan], seconds: float) -> float:
    """Share of so many seconds in which the model ran, averaged over the workers that ran it.

    ``spans``: as of `BusyTimes.within`. The model counts as busy with whatever slide it works on: slides overlap, and
    what matters is that it never waits.
    """
    workers = {worker for worker, _, _ in spans}
    busy = sum(end - start for _, start, end in spans)
    return min(1.0, busy / len(workers) / seconds) if workers and seconds > 0 else 0.0


# ---------------------------------------------------------------- the whole run


@dataclass(slots=True)
class RunAccounting:
    """The totals of slides under way and of workers. ``now``: seconds on a clock that never goes back."""

    now: Callable[[], float] = time.perf_counter
    workers: dict[str, WorkerTotals] = field(default_factory=dict)
    slides: dict[str, SlideTotals] = field(default_factory=dict)
    busy: BusyTimes = field(default_factory=BusyTimes)
    _started: dict[str, float] = field(default_factory=dict)

    def watch(self, thing: WorkUnit | UnitResult) -> None:
        """Take in a unit that is started, or a result."""
        if isinstance(thing, WorkUnit):
            self._started[thing.name] = self.now()
            slide = self.slides.setdefault(thing.slide.id, SlideTotals())
            slide.started = slide.started or time.time()
            if thing.kind == "forward":
                slide.forward_started = slide.forward_started or time.time()
        else:
            self._count_result(thing)

    def _count_result(self, result: UnitResult) -> None:
        facts = result.facts
        took = self.now() - self._started.pop(facts.name, self.now())
        slide, spent = self.slides.setdefault(facts.slide, SlideTotals()), timing.sum_stages(facts.times)
        slide.add(result)
        _add_seconds(slide.seconds, spent)
        slide.seconds["waiting"] += max(0.0, took - sum(spent.values()))
        self.busy.add(facts.worker, busy_spans(result))
        if facts.worker:
            self.workers.setdefault(facts.worker, WorkerTotals()).add(result)

    def close_slide(self, name: str, started: float, ended: float) -> SlideTotals:
        """Forget and return the totals of a slide that was under way from ``started`` to ``ended`` (epoch seconds)."""
        totals = self.slides.pop(name, SlideTotals())
        totals.busy = self.busy.within(started, ended)
        self.busy.forget(next((other.started for other in self.slides.values() if other.started), ended))
        return totals

    def worker_rows(self) -> list[dict[str, str | int | float | Seconds]]:
        """One row per worker, for the report."""
        return [
            {
                "worker": name, "threads": len(one.threads), "seconds": round(one.wall, 3), "units": one.units,
                "tiles": one.tiles, "time": round_seconds(one.stage_seconds()),
            }
            for name, one in sorted(self.workers.items())
        ]  # fmt: skip


def round_seconds(seconds: Seconds) -> Seconds:
    """To milliseconds, in the order of ``timing.STAGES``."""
    return {stage: round(seconds[stage], 3) for stage in timing.STAGES}
