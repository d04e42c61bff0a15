"""What a run says while it goes: small records handed to a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from wsi_mmm.engine.units import Executor, Kind, UnitResult, WorkUnit


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``done``/``total`` count tiles for "plan" and "tile", slides for "slide", else 0."""

    kind: Literal["plan", "tile", "slide", "warning", "stage"]
    slide: str
    done: int = 0
    total: int = 0
    message: str = ""


Listener = Callable[[Event], None]

Watch = Callable[[WorkUnit | UnitResult], None]
"""Called with every unit that is started and with every receipt, in the thread that keeps the books."""


def silent(event: Event) -> None:
    """The listener that listens to nothing."""


def unwatched(thing: WorkUnit | UnitResult) -> None:
    """The watch that sees nothing."""


def greet(executor: object, listener: Listener) -> None:
    """Say what an executor has to say before it begins: workers that are of no use, where its dashboard is."""
    for line in getattr(executor, "warnings", ()):
        listener(Event("warning", "", message=line))
    if dashboard := getattr(executor, "dashboard", ""):
        listener(Event("stage", "", message=f"dashboard: {dashboard}"))


class WatchedExecutor:
    """An Executor that shows ``watches`` what goes in and out of another one."""

    def __init__(self, inner: Executor, *watches: Watch) -> None:
        self.inner, self.watches = inner, watches

    def room(self, kind: Kind) -> int:
        """How many more works of this kind may be started now."""
        return self.inner.room(kind)

    def start(self, unit: WorkUnit) -> None:
        """Begin a work, then show it."""
        self.inner.start(unit)
        for watch in self.watches:
            watch(unit)

    def wait(self, timeout: float) -> UnitResult | None:
        """The next receipt, or None after ``timeout`` seconds."""
        result = self.inner.wait(timeout)
        if result is not None:
            for watch in self.watches:
                watch(result)
        return result

    def close(self, *, cancel: bool = False) -> None:
        """Let go of threads, processes and open slides."""
        self.inner.close(cancel=cancel)
