"""Where the time of a run went, per slide and per worker, kept from what went out and what came back.

A worker is a process; its threads are those that ran laps. What they did not spend in laps, between the first and the
last one of the worker, they waited: so per worker the stages add up to its wall time times its threads. Per slide they
add up to the time from starting each of its units to having its receipt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from wsi_mmm import timing
from wsi_mmm.engine.units import UnitResult, WorkUnit

Seconds = dict[str, float]


def _none() -> Seconds:
    return dict.fromkeys(timing.STAGES, 0.0)


def _add(total: Seconds, more: Seconds) -> None:
    for stage, seconds in more.items():
        total[stage] = total.get(stage, 0.0) + seconds


@dataclass(slots=True)
class WorkerTime:
    """What a process did for a run. ``first``, ``last``: epoch seconds of its clock; ``lapped``: seconds in laps."""

    first: float = float("inf")
    last: float = 0.0
    lapped: float = 0.0
    threads: set[int] = field(default_factory=set)
    seconds: Seconds = field(default_factory=_none)
    units: int = 0
    tiles: int = 0
    failures: int = 0

    def add(self, result: UnitResult) -> None:
        """Take in a receipt of this worker."""
        for lap in result.laps:
            self.first, self.last = min(self.first, lap.start), max(self.last, lap.end)
            self.lapped += lap.end - lap.start
            self.threads.add(lap.thread)
        _add(self.seconds, timing.together(result.laps))
        self.units += 1
        self.tiles += result.tiles if result.kind == "forward" else 0
        self.failures += result.status == "failed"

    def times(self) -> Seconds:
        """Seconds per stage; together ``wall`` times the number of threads."""
        idle = self.wall * len(self.threads) - self.lapped
        return {**self.seconds, "waiting": self.seconds["waiting"] + max(0.0, idle)}

    @property
    def wall(self) -> float:
        """Seconds from its first lap to the end of its last one."""
        return max(0.0, self.last - self.first)


@dataclass(slots=True)
class TimeAccounting:
    """Slides under way and workers, with the time they took. ``now``: seconds on a clock that never goes back."""

    now: Callable[[], float] = time.perf_counter
    workers: dict[str, WorkerTime] = field(default_factory=dict)
    slides: dict[str, Seconds] = field(default_factory=dict)
    _started: dict[str, float] = field(default_factory=dict)

    def watch(self, thing: WorkUnit | UnitResult) -> None:
        """Take note of a unit that is started, or of what came of it."""
        if isinstance(thing, WorkUnit):
            self._started[thing.name] = self.now()
        else:
            self._receive(thing)

    def _receive(self, result: UnitResult) -> None:
        took = self.now() - self._started.pop(result.name, self.now())
        slide, spent = self.slides.setdefault(result.slide, _none()), timing.together(result.laps)
        _add(slide, spent)
        slide["waiting"] += max(0.0, took - sum(spent.values()))
        if result.worker:
            self.workers.setdefault(result.worker, WorkerTime()).add(result)

    def slide(self, name: str) -> Seconds:
        """Seconds per stage of a slide that has ended, which is let go."""
        return self.slides.pop(name, _none())

    def rows(self) -> list[dict[str, Any]]:
        """One row per worker, for the report."""
        return [
            {
                "worker": name, "threads": len(one.threads), "seconds": round(one.wall, 3), "units": one.units,
                "tiles": one.tiles, "time": rounded(one.times()),
            }
            for name, one in sorted(self.workers.items())
        ]  # fmt: skip


def rounded(seconds: Seconds) -> Seconds:
    """To milliseconds, in the order of ``clock.STAGES``."""
    return {stage: round(seconds[stage], 3) for stage in timing.STAGES}
