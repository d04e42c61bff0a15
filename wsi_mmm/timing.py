"""The time of a thread, divided into stages that do not overlap.

A `StageTimer` covers one step that a thread does for one unit of work. Code that fetches, decodes or writes within it
says so with ``timed("fetch")``, and the time is counted for the innermost stage alone, so the stages of a timer add up
to its length. A stage costs two readings of the clock; outside a timer ``timed`` does nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

Stage = Literal["prepare", "fetch", "decode", "model", "interpret", "write", "waiting"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Step = Literal["plan", "extract", "read", "model", "write", "interpret", "publish"]
STAGE_OF_STEP: dict[Step, Stage] = {
    "plan": "prepare", "extract": "decode", "read": "decode", "model": "model", "write": "write",
    "interpret": "interpret", "publish": "write",
}  # fmt: skip
"""The stage that a step's time is counted for unless ``timed`` says otherwise."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """The time of one step of a thread: ``start``, ``end`` in epoch seconds, and ``seconds`` per stage, which add up.

    ``thread``: the system's number of the thread.
    """

    step: Step
    thread: int
    start: float
    end: float
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def length(self) -> float:
        """Seconds from start to end."""
        return self.end - self.start


class _ThreadState(threading.local):
    """The timer that this thread runs in."""

    timer: StageTimer | None = None


_state = _ThreadState()


class StageTimer:
    """A context that times a step of this thread; ``unit``: the name of the work unit, for logs."""

    def __init__(self, step: Step, unit: str = "") -> None:
        self.step, self.unit = step, unit
        self.result = StepTime(step, 0, 0.0, 0.0)
        self.stages: list[str] = [STAGE_OF_STEP[step]]
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __enter__(self) -> StageTimer:
        self._outer, _state.timer = _state.timer, self
        self._epoch = time.time()
        self._began = self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.count_stage()
        _state.timer = self._outer
        seconds = {name: max(0.0, spent) for name, spent in self.seconds.items()}
        end = self._epoch + self._since - self._began
        self.result = StepTime(self.step, threading.get_native_id(), self._epoch, end, seconds)

    def count_stage(self) -> None:
        """Count the time since this was done last for the present stage."""
        now = time.perf_counter()
        self.seconds[self.stages[-1]] += now - self._since
        self._since = now


@contextmanager
def timed(stage: Stage) -> Iterator[None]:
    """A context whose time is counted for ``stage``, when this thread runs in a `StageTimer`."""
    timer = _state.timer
    if timer is None:
        yield
        return
    timer.count_stage()
    timer.stages.append(stage)
    try:
        yield
    finally:
        timer.count_stage()
        timer.stages.pop()


def count_waiting(seconds: float) -> None:
    """Count so many seconds of the present stage as waiting for other threads."""
    timer = _state.timer
    if timer is not None and seconds > 0:
        timer.seconds["waiting"] += seconds
        timer.seconds[timer.stages[-1]] -= seconds


def current_unit() -> str:
    """The name of the work unit that this thread is at; empty when none."""
    return _state.timer.unit if _state.timer is not None else ""


def worker_name() -> str:
    """The name of this process among all machines: ``host:pid``."""
    return f"{os.uname().nodename}:{os.getpid()}"


def sum_stages(times: Iterable[StepTime]) -> dict[str, float]:
    """Seconds per stage over several steps."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for one in times:
        for stage, more in one.seconds.items():
            seconds[stage] += more
    return dict(seconds)
