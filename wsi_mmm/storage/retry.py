"""Retrying what failed with a TransientError: single requests, and whole units of work while the storage is away."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from wsi_mmm.errors import TransientError

A = TypeVar("A")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, how long and after which pauses a failed step is tried again; times in seconds.

    The pause before the second try is ``pause``, each further one ``growth`` times as long, up to ``longest``; with
    ``jitter`` it is a random time up to that. No try begins ``seconds`` after the first (``unproven``: where nothing
    has worked yet, since the address may be wrong).
    """

    pause: float
    growth: float = 2.0
    longest: float = math.inf
    jitter: bool = True
    tries: int | None = None
    seconds: float = math.inf
    unproven: float = math.inf

    def pauses(self) -> Iterator[float]:
        """The pause before each further try; endless when the number of tries is."""
        pause = self.pause
        for _ in itertools.count() if self.tries is None else range(self.tries - 1):
            yield random.uniform(0, pause) if self.jitter else pause
            pause = min(pause * self.growth, self.longest)


REQUEST = RetryPolicy(pause=0.1, growth=4.0, tries=4, seconds=5.0)
"""A request for a whole object. One that fails only after seconds was repeated by the library below."""

OUTAGE = RetryPolicy(pause=1.0, longest=15.0, jitter=False, seconds=150.0, unproven=20.0)
"""A unit of work."""


@dataclass(slots=True)
class Outage:
    """Since when (monotonic clock) the storage has failed, None while it answers; ``proven``: it has answered."""

    since: float | None = None
    proven: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count_failure(self) -> float:
        """Return the seconds since the first failure without a success after it."""
        now = time.monotonic()
        with self.lock:
            self.since = now if self.since is None else self.since
            return now - self.since

    def end(self) -> None:
        """The storage answers."""
        self.since, self.proven = None, True


process_outage = Outage()
"""Shared by all units of this process: storage that is gone for good is waited for once, not once for each slide."""


def retry_transient(
    step: Callable[[], T],
    policy: RetryPolicy | None = None,
    *,
    outage: Outage | None = None,
    stopped: threading.Event | None = None,
) -> T:
    """Return ``step()``, tried again while it raises a TransientError and ``policy`` (None: `REQUEST`) allows.

    For steps that may be repeated: reading, writing a whole object, deleting, listing, a unit of work. ``outage``: the
    clock that several steps share (None: of this step alone, from now on). Gives up at once when ``stopped`` is set.
    """
    policy, stopped = policy or REQUEST, stopped or threading.Event()
    outage = outage or Outage(since=time.monotonic(), proven=True)
    pauses = policy.pauses()
    while True:
        try:
            result = step()
        except TransientError:
            pause, seconds = next(pauses, math.inf), policy.seconds if outage.proven else policy.unproven
            if outage.count_failure() + pause > seconds or stopped.wait(pause):
                raise
        else:
            outage.end()
            return result


def retry_unit(step: Callable[[A], T], value: A, *, stopped: threading.Event | None = None) -> T:
    """Return ``step(value)``, tried again while the storage of this process is away (see `OUTAGE`)."""
    return retry_transient(lambda: step(value), OUTAGE, outage=process_outage, stopped=stopped)
