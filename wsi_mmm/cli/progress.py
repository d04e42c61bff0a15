"""The output of a run: bars on a terminal, plain lines elsewhere, JSON lines for machines; a summary at its end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from wsi_mmm.cli.console import error_line, flags, print_json, say, say_json
from wsi_mmm.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from wsi_mmm.engine.events import Event
    from wsi_mmm.engine.monitoring.run_report import RunReport

Clock = Callable[[], float]


@contextlib.contextmanager
def progress(slides: int = 0) -> Iterator[Callable[[Event], None]]:
    """Yield the listener that suits stdout, for a run over that many slides (0: not known yet)."""
    if flags.json or not sys.stdout.isatty():
        yield JsonProgress(slides) if flags.json else PlainProgress(slides)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name, pace = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[pace]}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), pace)
    with Progress(*columns, refresh_per_second=4) as bars:
        yield ProgressBars(bars, slides)


@dataclass(slots=True)
class TilePace:
    """Tiles per second of one slide over the last ``window`` seconds, and the seconds left at that pace."""

    window: float = 60.0
    marks: deque[tuple[float, int]] = field(default_factory=deque)

    def step(self, now: float, done: int) -> None:
        """Record that ``done`` tiles are done at ``now`` (seconds on any clock)."""
        self.marks.append((now, done))
        while len(self.marks) > 2 and now - self.marks[1][0] >= self.window:
            self.marks.popleft()

    @property
    def rate(self) -> float:
        """Tiles per second; 0 while unknown."""
        if len(self.marks) < 2:
            return 0.0
        (start, before), (end, after) = self.marks[0], self.marks[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def words(self, total: int) -> str:
        """``2.1 tiles/s, 3 min left``; empty while unknown."""
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


@dataclass(slots=True)
class RunProgress:
    """Slides and tiles of a run, done and expected; tiles of slides not yet planned are estimated."""

    slides: int = 0
    ended: int = 0
    tiles: int = 0
    pace: TilePace = field(default_factory=TilePace)
    _known: int = 0  # tiles of slides that are planned or have ended
    _planned: int = 0  # slides
    _ended_unplanned: int = 0
    _open: dict[str, tuple[int, int]] = field(default_factory=dict)
    _paces: dict[str, TilePace] = field(default_factory=dict)

    def hear(self, event: Event, now: float) -> str:
        """Record an event that happened at ``now`` (seconds on any clock); return the slide's pace for a "tile"."""
        if event.kind in ("plan", "tile"):
            done, total = self._open.get(event.slide, (0, 0))
            self._planned += event.slide not in self._open
            self._known += event.total - total
            self.tiles += event.done - done
            self._open[event.slide] = event.done, event.total
            self.pace.step(now, self.tiles)
            pace = self._paces.setdefault(event.slide, TilePace())
            pace.step(now, event.done)
            return pace.words(event.total) if event.kind == "tile" else ""
        if event.kind == "slide":
            self._paces.pop(event.slide, None)
            self.ended, self.slides = event.done, max(self.slides, event.total)
            self._ended_unplanned += event.slide not in self._open
            done, total = self._open.pop(event.slide, (0, 0))
            self._known -= total - done  # of a slide that failed: they will never be
        return ""

    @property
    def expected(self) -> int:
        """Tiles of all slides; of those that are not planned yet as many as the others have on average."""
        left = max(0, self.slides - self._planned - self._ended_unplanned)
        return self._known + (round(left * self._known / self._planned) if self._planned else 0)

    @property
    def left(self) -> float | None:
        """Seconds left at the present pace; None while unknown."""
        return max(0, self.expected - self.tiles) / self.pace.rate if self.pace.rate else None

    def words(self) -> str:
        """``1,200 of about 9,000 tiles, 2.1 tiles/s, 3 min left``, as far as known."""
        about = "about " * (self._planned + self._ended_unplanned < self.slides)
        parts = [f"{self.tiles:,} of {about}{self.expected:,} tiles", self.pace.words(self.expected)]
        return ", ".join(part for part in parts if part)

    def facts(self) -> dict[str, Any]:
        """Return the same as a JSON object."""
        return {
            "slides_done": self.ended, "slides": self.slides, "tiles_done": self.tiles, "tiles_expected": self.expected,
            "tiles_per_s": round(self.pace.rate, 2), "seconds_left": None if self.left is None else round(self.left),
        }  # fmt: skip


class JsonProgress:
    """Print events as JSON, and the progress of the run at most every ``every`` seconds."""

    def __init__(self, slides: int = 0, every: float = 5.0, clock: Clock = time.monotonic) -> None:
        self.every, self.clock, self.last = every, clock, clock()
        self.overall = RunProgress(slides)

    def __call__(self, event: Event) -> None:
        now = self.clock()
        print_json({"event": {name: value for name, value in asdict(event).items() if value is not None}})
        self.overall.hear(event, now)
        if event.kind == "tile" and now - self.last >= self.every:
            self.last = now
            print_json({"progress": self.overall.facts()})


class PlainProgress:
    """Print events as lines: every slide, stage and warning, and tiles at most every ``every`` seconds; with several
    slides a line for the whole run, too.
    """

    def __init__(self, slides: int = 0, every: float = 5.0, clock: Clock = time.monotonic) -> None:
        self.every, self.clock, self.last = every, clock, clock()
        self.overall = RunProgress(slides)

    def __call__(self, event: Event) -> None:
        now = self.clock()
        pace = self.overall.hear(event, now)
        if event.kind == "tile" and now - self.last < self.every:
            return
        self.last = now
        say(line(event, pace))
        if event.kind == "tile" and self.overall.slides > 1:
            say(f"all {self.overall.slides:,} slides: {self.overall.ended:,} done, {self.overall.words()}")
        sys.stdout.flush()


def line(event: Event, pace: str = "") -> str:
    """``[done/total] slide: message`` with the parts that the event has."""
    count = f"{event.done}/{event.total} tiles" if event.kind == "tile" else ""
    number = f"[{event.done}/{event.total}] " if event.kind == "slide" and event.total else ""
    words = "warning: " if event.kind == "warning" else ""
    detail = ", ".join(part for part in (count, pace, event.message) if part)
    if event.total == 1 and event.status == "failed":
        detail = "failed"  # the reason is the very next line
    return printable(f"{words}{number}{event.slide}" + (f": {detail}" if detail and event.slide else detail))


class ProgressBars:
    """Show events as bars: one for the slides, one for the tiles of each open slide; other events are printed above."""

    def __init__(self, bars: Progress, slides: int = 0) -> None:
        self.bars = bars
        self.slides = bars.add_task("slides", total=slides or None, pace="")
        self.overall = RunProgress(slides)
        self.rows: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        pace = self.overall.hear(event, time.monotonic())
        if self.overall.slides > 1:
            self.bars.update(self.slides, pace=self.overall.words())
        if event.kind in ("plan", "tile"):
            if event.slide not in self.rows:
                self.rows[event.slide] = self.bars.add_task(event.slide[:40], total=event.total, pace="")
            self.bars.update(self.rows[event.slide], completed=event.done, total=event.total, pace=pace)
            return
        if event.kind == "stage" and event.slide:
            if event.slide in self.rows:
                self.bars.update(self.rows[event.slide], pace=event.message)
            return
        if event.kind == "slide":
            self.bars.update(self.slides, completed=event.done, total=event.total or None)
            if event.slide in self.rows:
                self.bars.remove_task(self.rows.pop(event.slide))
        self.bars.console.print(line(event), markup=False, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------ at the end


def print_report(report: RunReport) -> int:
    """Print how the slides ended and where their results are; return the exit code."""
    say_json({"report": {"path": report.path, "seconds": report.seconds, "slides": list(report.slides)}})
    bad = [row for row in report.slides if row.status in ("failed", "partial")]
    for row in bad:
        trace = row.extra.get("traceback", "")
        if flags.debug and trace:
            typer.echo(printable(trace), err=True, nl=False)
        hint = "" if flags.debug or not trace else " (--debug shows where)"
        error_line(f"{row.id} {row.status}: {row.error or 'some tiles could not be read'}{hint}")
    counts = Counter(row.status for row in report.slides)
    total = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    say(f"{total} in {duration(report.seconds)}")
    for name, path in result_files(report):
        say(f"{name:<8} {path}")
    if report.unsaved:
        error_line(f"the report could not be written: {report.unsaved}")
    return report.exit_code


SHOWN = 5  # slides whose files are named one by one at the end of a run


def result_files(report: RunReport) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of the files to open: those of a few slides, or the folder of many, then the report."""
    good = [row for row in report.slides if row.status != "failed"]
    if len(good) > SHOWN:
        yield "results", f"{report.output}  (a folder per slide)"
    for row in good[:SHOWN] if len(good) <= SHOWN else ():
        files = row.extra.get("files", {})
        if "geojson" in files:
            yield "GeoJSON", f"{files['geojson']}  (open the slide in QuPath, drag this file onto it)"
            yield "picture", files.get("overlay", "none")
        elif "features" in files:
            yield "features", files["features"]
            if "slide" in files:
                yield "slide", files["slide"]
    if not report.unsaved:
        yield "report", report.path
