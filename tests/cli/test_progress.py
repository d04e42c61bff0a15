"""What a run shows while it goes."""

from __future__ import annotations

import json
import os

import pytest

from wsi_mmm.cli import progress
from wsi_mmm.engine.events import Event, SlideStatus


class Clock:
    """A clock that the test winds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_show_tiles_sparingly(capsys: pytest.CaptureFixture[str]) -> None:
    """Slides and warnings always; tiles at most every few seconds, with their pace and the time left."""
    clock = Clock()
    lines = progress.PlainProgress(1, every=5, clock=clock)
    lines(Event("plan", "s", 0, 100, "100 tiles"))
    lines(Event("tile", "s", 5, 100))
    lines(Event("warning", "s", message="one tile is damaged"))
    clock.now = 10.0
    lines(Event("tile", "s", 20, 100))
    lines(Event("slide", "s", 1, 1, "done, 7 objects in 100 tiles, 50.0 s"))
    assert capsys.readouterr().out.splitlines() == [
        "s: 100 tiles",
        "warning: s: one tile is damaged",
        "s: 20/100 tiles, 2.0 tiles/s, 40 s left",
        "[1/1] s: done, 7 objects in 100 tiles, 50.0 s",
    ]


def test_with_several_slides_the_whole_run_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """How many have ended, their tiles and those to be expected, the pace of all and the time left."""
    clock = Clock()
    lines = progress.PlainProgress(4, every=5, clock=clock)
    for slide in "ab":
        lines(Event("plan", slide, 0, 100, "100 tiles"))
    clock.now = 10.0
    lines(Event("tile", "a", 20, 100))
    lines(Event("tile", "b", 5, 100))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "a: 20/100 tiles, 2.0 tiles/s, 40 s left",
        "all 4 slides: 0 done, 20 of about 400 tiles, 2.0 tiles/s, 3 min left",
    ]


def test_what_is_to_be_expected_becomes_what_is_known() -> None:
    """Slides that were done before, or failed before they were planned, have no tiles; those that failed later lose
    what was left; once all are planned nothing is guessed.
    """
    overall = progress.RunProgress(4)
    overall.hear(Event("slide", "before", 1, 4, "done before"), 0)
    overall.hear(Event("plan", "a", 0, 100), 0)
    assert (overall.expected, overall.tiles, overall.left) == (300, 0, None)
    overall.hear(Event("plan", "b", 0, 300), 0)
    overall.hear(Event("tile", "a", 100, 100), 10)
    assert (overall.expected, overall.left, overall.words()) == (
        600, 50.0, "100 of about 600 tiles, 10.0 tiles/s, 50 s left",
    )  # fmt: skip
    overall.hear(Event("slide", "a", 2, 4, "done"), 10)
    overall.hear(Event("slide", "c", 3, 4, "failed: no mpp"), 10)
    assert overall.words() == "100 of 400 tiles, 10.0 tiles/s, 30 s left"
    overall.hear(Event("tile", "b", 60, 300), 16)
    overall.hear(Event("slide", "b", 4, 4, "failed: no answer"), 16)
    assert (overall.expected, overall.tiles, overall.ended) == (160, 160, 4)


def test_machines_are_told_how_far_the_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Every event as it is, and the progress of the whole run every few seconds."""
    clock = Clock()
    lines = progress.JsonProgress(2, every=5, clock=clock)
    lines(Event("plan", "s", 0, 100, "100 tiles"))
    clock.now = 10.0
    lines(Event("tile", "s", 20, 100))
    lines(Event("tile", "s", 21, 100))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(iter(one)) for one in found] == ["event", "event", "progress", "event"]
    assert found[2]["progress"] == {
        "slides_done": 0, "slides": 2, "tiles_done": 20, "tiles_expected": 200, "tiles_per_s": 2.0, "seconds_left": 90,
    }  # fmt: skip


def test_the_pace_is_that_of_the_last_minute() -> None:
    """Tiles that a cache gave at the start do not make the rest look quick for ever."""
    pace = progress.TilePace(window=60)
    for now, done in ((0, 0), (1, 1000), (61, 1060), (121, 1120)):
        pace.step(now, done)
    assert pace.rate == pytest.approx(1.0)
    assert pace.words(1300) == "1.0 tiles/s, 3 min left"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (12000, "3 h 20 min"), (-1, "0 s")]
)
def test_a_duration_is_said_as_a_person_would(seconds: float, words: str) -> None:
    """Seconds, then minutes, then hours and minutes."""
    assert progress.duration(seconds) == words


def test_the_reason_of_the_only_slide_is_said_once() -> None:
    """With one slide the error line on stderr follows at once; with more, the reason is part of the line."""
    assert progress.line(Event("slide", "s", 1, 1, "failed: no mpp", SlideStatus.FAILED)) == "[1/1] s: failed"
    assert progress.line(Event("slide", "s", 1, 2, "failed: no mpp", SlideStatus.FAILED)) == "[1/2] s: failed: no mpp"


def test_bars_follow_the_events() -> None:
    """One bar for the slides, one for each slide in work, which goes when the slide is done."""
    from rich.console import Console
    from rich.progress import Progress

    screen = Console(file=open(os.devnull, "w"), force_terminal=True, width=100, record=True)  # noqa: SIM115
    with screen.file, Progress(console=screen, auto_refresh=False) as drawn:
        bars = progress.ProgressBars(drawn, 2)
        bars(Event("tile", "[s]", 5, 10))
        assert [(task.description, task.completed, task.total) for task in drawn.tasks[1:]] == [("[s]", 5, 10)]
        bars(Event("stage", "[s]", message="publishing"))
        bars(Event("stage", "", message="dashboard: http://x"))
        assert drawn.tasks[1].fields["pace"] == "publishing"
        bars(Event("slide", "[s]", 1, 2, "done"))
        assert [(task.description, task.completed, task.total) for task in drawn.tasks] == [("slides", 1, 2)]
        shown = screen.export_text()
        assert "[1/2] [s]: done" in shown and "dashboard: http://x" in shown
