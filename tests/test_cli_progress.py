"""What a run shows while it goes."""

from __future__ import annotations

import os

import pytest

from wsi_mmm import cli_progress
from wsi_mmm.engine.events import Event


class Clock:
    """A clock that the test winds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_show_tiles_sparingly(capsys: pytest.CaptureFixture[str]) -> None:
    """Slides and warnings always; tiles at most every few seconds, with their pace and the time left."""
    clock = Clock()
    lines = cli_progress.PlainLines(every=5, clock=clock)
    lines(Event("slide", "r", 1, 2, "done, 7 objects in 9 tiles, 3.0 s"))
    lines(Event("plan", "s", 0, 100, "100 tiles"))
    lines(Event("tile", "s", 5, 100))
    lines(Event("warning", "s", message="one tile is damaged"))
    clock.now = 10.0
    lines(Event("tile", "s", 20, 100))
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] r: done, 7 objects in 9 tiles, 3.0 s",
        "s: 100 tiles",
        "warning: s: one tile is damaged",
        "s: 20/100 tiles, 2.0 tiles/s, 40 s left",
    ]


def test_the_pace_is_that_of_the_last_minute() -> None:
    """Tiles that a cache gave at the start do not make the rest look quick for ever."""
    pace = cli_progress.Pace(window=60)
    for now, done in ((0, 0), (1, 1000), (61, 1060), (121, 1120)):
        pace.step(now, done)
    assert pace.rate == pytest.approx(1.0)
    assert pace.words(1300) == "1.0 tiles/s, 3 min left"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (12000, "3 h 20 min"), (-1, "0 s")]
)
def test_a_duration_is_said_as_a_person_would(seconds: float, words: str) -> None:
    """Seconds, then minutes, then hours and minutes."""
    assert cli_progress.duration(seconds) == words


def test_the_reason_of_the_only_slide_is_said_once() -> None:
    """With one slide the error line on stderr follows at once; with more, the reason is part of the line."""
    assert cli_progress.line(Event("slide", "s", 1, 1, "failed: no mpp")) == "[1/1] s: failed"
    assert cli_progress.line(Event("slide", "s", 1, 2, "failed: no mpp")) == "[1/2] s: failed: no mpp"


def test_bars_follow_the_events() -> None:
    """One bar for the slides, one for each slide in work, which goes when the slide is done."""
    from rich.console import Console
    from rich.progress import Progress

    screen = Console(file=open(os.devnull, "w"), force_terminal=True, width=100, record=True)  # noqa: SIM115
    with screen.file, Progress(console=screen, auto_refresh=False) as progress:
        bars = cli_progress.Bars(progress, 2)
        bars(Event("tile", "[s]", 5, 10))
        assert [(task.description, task.completed, task.total) for task in progress.tasks[1:]] == [("[s]", 5, 10)]
        bars(Event("stage", "[s]", message="publishing"))
        assert progress.tasks[1].fields["pace"] == "publishing"
        bars(Event("slide", "[s]", 1, 2, "done"))
        assert [(task.description, task.completed, task.total) for task in progress.tasks] == [("slides", 1, 2)]
        assert "[1/2] [s]: done" in screen.export_text()
