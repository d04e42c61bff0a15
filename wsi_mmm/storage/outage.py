"""Storage that is away for a minute: wait and try again, rather than fail every slide that is under way.

How long is counted from when the storage of this process first failed without a success since: a bucket that is gone
for good costs a run this time once, and not once for each of its slides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from wsi_mmm.errors import TransientError

A = TypeVar("A")
B = TypeVar("B")

PATIENCE = 150.0  # seconds
UNPROVEN = 20.0  # seconds, where nothing has worked yet: the address may be wrong
FIRST, LONGEST = 1.0, 15.0  # seconds between tries: twice as long each time


@dataclass(slots=True)
class Outage:
    """Since when the storage has failed; None while it answers. ``proven``: some step has worked here."""

    since: float | None = None
    proven: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def failed(self, now: float) -> float:
        """Seconds that it has been away, this failure included."""
        with self.lock:
            self.since = now if self.since is None else self.since
            return now - self.since

    def answered(self) -> None:
        """It is there."""
        self.since, self.proven = None, True

    @property
    def patience(self) -> float:
        """Seconds after which it counts as gone."""
        return PATIENCE if self.proven else min(PATIENCE, UNPROVEN)


_here = Outage()


def patiently(step: Callable[[A], B], value: A, *, stopped: threading.Event | None = None, outage: Outage = _here) -> B:
    """``step(value)``, tried again while it raises a TransientError, for PATIENCE seconds.

    Steps may be repeated. Gives up at once when ``stopped`` is set.
    """
    wait, stopped = FIRST, stopped or threading.Event()
    while True:
        try:
            found = step(value)
        except TransientError:
            if outage.failed(time.monotonic()) + wait > outage.patience or stopped.wait(wait):
                raise
            wait = min(LONGEST, 2 * wait)
        else:
            outage.answered()
            return found
