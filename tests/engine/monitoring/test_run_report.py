"""What a run report says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wsi_mmm.engine.monitoring import run_report
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.scheduler import SlideState
from wsi_mmm.engine.units import SlideTask, UnitResult, WorkUnit
from wsi_mmm.errors import OutputError
from wsi_mmm.timing import Lap

RECIPE = Recipe("default", "hash", (), 0.5, 256, 0)


def report_in(folder: Path) -> run_report.RunReport:
    """The report of a run over one slide that was done."""
    task = SlideTask("s", "s.svs", str(folder / "s"), RECIPE)
    report = run_report.begin(str(folder), RECIPE, [task])
    report.add(SlideState(task, status="done", tiles=4, started=1.0, ended=3.0))
    report.save()
    return report


def test_a_report_is_written_for_people_and_machines(tmp_path: Path) -> None:
    """report.html and report.json; the exit code is 0 when every slide is done."""
    report = report_in(tmp_path)
    assert (report.exit_code, report.unsaved) == (0, "")
    [row] = json.loads((tmp_path / "report.json").read_text())["slides"]
    assert (row["id"], row["status"], row["tiles"], row["tiles_per_s"]) == ("s", "done", 4, 2.0)
    assert (tmp_path / "report.html").exists()


def test_a_report_that_cannot_be_written_does_not_lose_the_run(tmp_path: Path) -> None:
    """The rows are still handed to the caller, with the reason and an exit code that is not 0."""
    (tmp_path / "taken").write_text("")
    report = report_in(tmp_path / "taken")
    assert [row.status for row in report.slides] == ["done"]
    assert "report.json: file exists" in report.unsaved
    assert report.exit_code == 3


def test_an_output_that_cannot_be_written_is_named_as_the_user_gave_it(tmp_path: Path) -> None:
    """The line names the folder, not a file of ours in it, and what to do."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError) as caught:
        run_report.check_writable(str(tmp_path / "taken"))
    assert str(caught.value) == f"cannot write to {tmp_path}/taken: file exists; choose another folder"


def test_a_report_says_where_the_time_went(tmp_path: Path) -> None:
    """Per slide and per worker in report.json, the workers as a table in report.html, names of hosts as text."""
    task = SlideTask("s", "s.svs", str(tmp_path / "s"), RECIPE)
    report = run_report.begin(str(tmp_path), RECIPE, [task])
    report.ledger.watch(WorkUnit("forward", task))
    laps = (Lap(1, 10.0, 14.0, {"decode": 3.0, "fetch": 1.0}),)
    report.ledger.watch(UnitResult("forward", "s", (0, 0), "ok", tiles=4, laps=laps, worker="<node>:7"))
    report.add(SlideState(task, status="done", tiles=4, started=1.0, ended=3.0))
    report.save()
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["slides"][0]["time"]["decode"] == 3.0
    [worker] = found["workers"]
    assert (worker["worker"], worker["threads"], worker["seconds"], worker["tiles"]) == ("<node>:7", 1, 4.0, 4)
    assert worker["time"]["fetch"] == 1.0
    page = (tmp_path / "report.html").read_text()
    assert "<td>&lt;node&gt;:7</td>" in page and "<td>75 %</td>" in page
