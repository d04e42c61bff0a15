"""How long threads wait for one another where Python itself is what they share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SHORT = 0.0005


@contextmanager
def short_turns() -> Iterator[None]:
    """While the context lasts, a thread that comes back from native code waits at most SHORT seconds for one that runs
    Python. By default it is 5 ms each time: too much where readers return a thousand times a second, and where a
    model's thread, with all the cores it computes on, waits for those that make batches."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SHORT))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
