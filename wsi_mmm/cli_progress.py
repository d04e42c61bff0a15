"""What a run shows while it goes: bars on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from wsi_mmm.cli_console import flags, say, say_json

if TYPE_CHECKING:
    from rich.progress import Progress

    from wsi_mmm.engine.events import Event

Clock = Callable[[], float]


@contextlib.contextmanager
def progress(slides: int = 0) -> Iterator[Callable[[Event], None]]:
    """The listener that fits where stdout goes, for a run over that many slides (0: not known yet)."""
    if flags.json:
        yield lambda event: say_json({"event": asdict(event)})
    elif sys.stdout.isatty():
        with _bars(slides) as listener:
            yield listener
    else:
        yield PlainLines()


@dataclass(slots=True)
class Pace:
    """Tiles per second of one slide over the last ``window`` seconds, and the seconds left at that pace."""

    window: float = 60.0
    marks: deque[tuple[float, int]] = field(default_factory=deque)

    def step(self, now: float, done: int) -> None:
        """Take note that ``done`` tiles are done at ``now`` (seconds on any clock)."""
        self.marks.append((now, done))
        while len(self.marks) > 2 and now - self.marks[1][0] >= self.window:
            self.marks.popleft()

    @property
    def rate(self) -> float:
        """Tiles per second; 0 while nothing can be said."""
        if len(self.marks) < 2:
            return 0.0
        (start, before), (end, after) = self.marks[0], self.marks[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def words(self, total: int) -> str:
        """``2.1 tiles/s, 3 min left``; empty while nothing can be said."""
        if not self.rate:
            return ""
        return f"{self.rate:.1f} tiles/s, {duration((total - self.marks[-1][1]) / self.rate)} left"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3 h 20 min``."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Paces:
    """The pace of every slide in work."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.slides: dict[str, Pace] = {}

    def hear(self, event: Event) -> str:
        """Take in an event; the words for a "tile" event, else empty."""
        if event.kind == "slide":
            self.slides.pop(event.slide, None)
        if event.kind not in ("plan", "tile"):
            return ""
        pace = self.slides.setdefault(event.slide, Pace())
        pace.step(self.clock(), event.done)
        return pace.words(event.total) if event.kind == "tile" else ""


class PlainLines:
    """Events as lines: every slide, stage and warning, and tiles at most every ``every`` seconds."""

    def __init__(self, every: float = 5.0, clock: Clock = time.monotonic) -> None:
        self.every, self.clock = every, clock
        self.paces = Paces(clock)
        self.last = clock()

    def __call__(self, event: Event) -> None:
        pace = self.paces.hear(event)
        now = self.clock()
        if event.kind == "tile" and now - self.last < self.every:
            return
        self.last = now
        say(line(event, pace))
        sys.stdout.flush()


def line(event: Event, pace: str = "") -> str:
    """``[done/total] slide: message`` with the parts that the event has."""
    count = f"{event.done}/{event.total} tiles" if event.kind == "tile" else ""
    number = f"[{event.done}/{event.total}] " if event.kind == "slide" and event.total else ""
    words = "warning: " if event.kind == "warning" else ""
    detail = ", ".join(part for part in (count, pace, event.message) if part)
    if event.kind == "slide" and event.total == 1 and detail.startswith("failed: "):
        detail = "failed"  # the reason is the very next line
    return f"{words}{number}{event.slide}" + (f": {detail}" if detail and event.slide else detail)


@contextlib.contextmanager
def _bars(slides: int) -> Iterator[Callable[[Event], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name, pace = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[pace]}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), pace)
    with Progress(*columns, refresh_per_second=4) as bars:
        yield Bars(bars, slides)


class Bars:
    """Events as bars: one for the slides, one for the tiles of each slide in work; the rest is printed above them."""

    def __init__(self, bars: Progress, slides: int = 0) -> None:
        self.bars = bars
        self.slides = bars.add_task("slides", total=slides or None, pace="")
        self.paces = Paces()
        self.rows: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        pace = self.paces.hear(event)
        if event.kind in ("plan", "tile"):
            row = self.rows.get(event.slide)
            if row is None:
                row = self.rows[event.slide] = self.bars.add_task(event.slide[:40], total=event.total, pace="")
            self.bars.update(row, completed=event.done, total=event.total, pace=pace)
            return
        if event.kind == "stage":
            if event.slide in self.rows:
                self.bars.update(self.rows[event.slide], pace=event.message)
            return
        if event.kind == "slide":
            self.bars.update(self.slides, completed=event.done, total=event.total or None)
            if event.slide in self.rows:
                self.bars.remove_task(self.rows.pop(event.slide))
        self.bars.console.print(line(event), markup=False, highlight=False, soft_wrap=True)
