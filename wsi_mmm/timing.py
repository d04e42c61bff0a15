"""Where the time of a thread goes: laps, each cut into stages that do not overlap.

A lap is what one thread does for one unit of work. Whoever fetches, decodes or writes in it says so with ``spent``, and
the time goes to the innermost stage alone, so the stages of a lap add up to its length. Two readings of the clock per
stage; outside a lap ``spent`` does nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

Stage = Literal["prepare", "fetch", "decode", "model", "interpret", "write", "waiting"]
STAGES: tuple[Stage, ...] = ("prepare", "fetch", "decode", "model", "interpret", "write", "waiting")


@dataclass(frozen=True, slots=True)
class Lap:
    """What a thread did for one unit: ``start``, ``end`` in epoch seconds; ``seconds`` per stage, together its length.

    ``thread``: the system's number of the thread.
    """

    thread: int
    start: float
    end: float
    seconds: Mapping[str, float] = field(default_factory=dict)


class _Hand(threading.local):
    """The lap that this thread runs."""

    lap: lap | None = None


_hand = _Hand()


class lap:  # noqa: N801  (used like a function, in a with statement)
    """A lap of this thread for ``unit`` (a name for logs); what is not said to be another stage is ``stage``."""

    __slots__ = ("_began", "_epoch", "_outer", "_seconds", "_since", "_stages", "taken", "unit")

    def __init__(self, stage: Stage, unit: str = "") -> None:
        self.unit = unit
        self.taken = Lap(0, 0.0, 0.0)
        self._stages: list[str] = [stage]
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> lap:
        self._outer, _hand.lap = _hand.lap, self
        self._epoch = time.time()
        self._began = self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cut()
        _hand.lap = self._outer
        seconds = {name: max(0.0, spent) for name, spent in self._seconds.items()}
        end = self._epoch + self._since - self._began
        self.taken = Lap(threading.get_native_id(), self._epoch, end, seconds)

    def _cut(self) -> None:
        now, stage = time.perf_counter(), self._stages[-1]
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def enter(self, stage: str) -> None:
        """From now on it is this stage, until ``leave``."""
        self._cut()
        self._stages.append(stage)

    def leave(self) -> None:
        """It is again the stage of before."""
        self._cut()
        self._stages.pop()

    def move(self, stage: str, seconds: float) -> None:
        """Of the present stage that many seconds were another one."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        here = self._stages[-1]
        self._seconds[here] = self._seconds.get(here, 0.0) - seconds


class spent:  # noqa: N801  (used like a function, in a with statement)
    """The time within is spent on ``stage``, when this thread runs a lap."""

    __slots__ = ("_lap", "_stage")

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        self._lap = _hand.lap
        if self._lap is not None:
            self._lap.enter(self._stage)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lap is not None:
            self._lap.leave()


def waited(seconds: float) -> None:
    """Say afterwards that so much of the present stage was spent waiting for others."""
    if _hand.lap is not None and seconds > 0:
        _hand.lap.move("waiting", seconds)


def unit() -> str:
    """The unit of work that this thread is at; empty when none."""
    return _hand.lap.unit if _hand.lap is not None else ""


def worker() -> str:
    """This process among all machines: ``host:pid``."""
    return f"{os.uname().nodename}:{os.getpid()}"


def together(laps: Iterable[Lap]) -> dict[str, float]:
    """Seconds per stage over several laps."""
    seconds: dict[str, float] = {}
    for one in laps:
        for stage, more in one.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + more
    return seconds
