"""What a run says while it goes: small records handed to a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``done``/``total`` count tiles for "plan" and "tile", slides for "slide", else 0."""

    kind: Literal["plan", "tile", "slide", "warning", "stage"]
    slide: str
    done: int = 0
    total: int = 0
    message: str = ""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener that listens to nothing."""
