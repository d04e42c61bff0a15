"""Events of a run: small records handed to a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class SlideStatus(StrEnum):
    """How a slide ended."""

    DONE = "done"
    EMPTY = "empty"  # no tissue
    PARTIAL = "partial"  # published, but some tiles could not be read
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``done``/``total`` count tiles for "plan" and "tile", slides for "slide", else 0.

    ``status``: how the slide ended, for "slide" alone. ``message`` is for people.
    """

    kind: Literal["plan", "tile", "slide", "warning", "stage"]
    slide: str
    done: int = 0
    total: int = 0
    message: str = ""
    status: SlideStatus | None = None


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore an event."""
