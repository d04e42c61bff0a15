"""Requests that may be repeated, made again when an answer was cut off or a connection broke."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from wsi_mmm.errors import TransientError

T = TypeVar("T")

TRIES = 4
PAUSE = 0.1  # seconds before the second try at most; four times as long before each further one
SOON = 5.0  # seconds: what fails only after so long has been tried often enough by the library below, or is gone


def insisted(work: Callable[[], T]) -> T:
    """What ``work`` gives, called again while it soon raises a TransientError.

    For what is the same when it is done twice: reading, writing a whole object, deleting, listing. Libraries repeat
    what no answer came to; an answer that ends early, and a deletion (a POST, on S3), they do not.
    """
    begun = time.monotonic()
    for number in range(TRIES):
        try:
            return work()
        except TransientError:
            if number + 1 == TRIES or time.monotonic() - begun > SOON:
                raise
        time.sleep(random.uniform(0, PAUSE * 4.0**number))
    raise AssertionError("unreachable")
