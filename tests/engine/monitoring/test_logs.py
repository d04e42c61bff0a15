"""Logs as JSON lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wsi_mmm.engine.monitoring.logs import NAME, logging_to
from wsi_mmm.engine.monitoring.observe import Hooks
from wsi_mmm.errors import OptionError, OutputError
from wsi_mmm.timing import StageTimer

Story = Callable[[Hooks], None]


def lines(path: Path, story: Story, level: str) -> list[dict[str, Any]]:
    """What a run leaves in its log."""
    with logging_to(str(path), level) as hooks:
        story(hooks)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_at_info_there_are_a_few_lines_per_slide(tmp_path: Path, story: Story) -> None:
    """What was planned, how slides ended, and the units that went wrong; each names its slide and its level."""
    found = lines(tmp_path / "run.jsonl", story, "info")
    assert [(line["level"], line["event"], line["slide"]) for line in found] == [
        ("info", "plan", "good"),
        ("warning", "unit", "good"),
        ("error", "unit", "bad"),
        ("error", "slide", "bad"),
        ("warning", "slide", "good"),
    ]
    assert found[3]["done"] == 1 and found[3]["total"] == 2
    assert all(line["time"].endswith("Z") for line in found)


def test_at_debug_there_is_a_line_per_unit(tmp_path: Path, story: Story) -> None:
    """With slide, unit, worker, tiles and the seconds of every stage."""
    found = lines(tmp_path / "run.jsonl", story, "debug")
    assert sum(line["event"] == "unit" for line in found) == 5
    [unit] = [line for line in found if line.get("unit") == "good/forward/0-0" and line["event"] == "unit"]
    assert (unit["kind"], unit["status"], unit["tiles"], unit["failed_tiles"]) == ("forward", "partial", 4, 1)
    assert unit["seconds"] == {"fetch": 0.2, "decode": 0.3, "model": 0.5} and unit["worker"] == "node:1"


def test_no_line_shows_a_secret(tmp_path: Path, story: Story) -> None:
    """Whatever is in a message or a field, and in the traceback of a foreign error."""
    path = tmp_path / "run.jsonl"
    with logging_to(str(path), "debug") as hooks:
        story(hooks)
        try:
            raise OSError("GET https://me:hush@host/?sig=hush")
        except OSError:
            logging.getLogger("wsi_mmm.slides").exception("s3://key:hush@bucket/x")
    text = path.read_text()
    assert "hush" not in text
    assert json.loads(text.splitlines()[-1])["traceback"].startswith("Traceback")


def test_what_a_thread_says_is_of_the_unit_that_it_is_at(tmp_path: Path) -> None:
    """Lines of other rooms get the slide and the unit of the lap that their thread runs."""
    path = tmp_path / "run.jsonl"
    with logging_to(str(path), "info"), StageTimer("read", "s/forward/3-4"):
        logging.getLogger("wsi_mmm.storage.remote").warning("tried again")
    [line] = [json.loads(line) for line in path.read_text().splitlines()]
    assert (line["event"], line["slide"], line["unit"]) == ("wsi_mmm.storage.remote", "s", "s/forward/3-4")


def test_a_log_is_added_to_and_left_as_it_was_found(tmp_path: Path, story: Story) -> None:
    """A second run goes on in the same file; afterwards the logger has neither our handler nor our level."""
    logger = logging.getLogger(NAME)
    before = logger.level, logger.propagate, list(logger.handlers)
    first = lines(tmp_path / "run.jsonl", story, "error")
    assert len(lines(tmp_path / "run.jsonl", story, "error")) == 2 * len(first) == 4
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_without_a_file_the_lines_go_to_stderr(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    """Not to stdout, which is for results."""
    with logging_to(None, "error") as hooks:
        story(hooks)
    shown = capsys.readouterr()
    assert shown.out == "" and [json.loads(line)["level"] for line in shown.err.splitlines()] == ["error", "error"]


def test_what_cannot_be_done_is_told_at_once(tmp_path: Path) -> None:
    """A level that does not exist, a file that cannot be written."""
    with pytest.raises(OptionError, match="no log level 'loud'"), logging_to(None, "loud"):
        pass
    with pytest.raises(OutputError, match="choose another --log-file"), logging_to(str(tmp_path / "no" / "x"), "info"):
        pass
