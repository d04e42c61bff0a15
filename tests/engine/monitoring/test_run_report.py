"""What a run report says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.plans import facts_of, plan_of, result_of
from wsi_mmm.engine.events import SlideStatus
from wsi_mmm.engine.monitoring import run_report
from wsi_mmm.engine.monitoring.run_report import load_report, outcome_text
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.scheduler import SlideState
from wsi_mmm.engine.units import ForwardResult, SlideSummary, SlideTask, WorkUnit
from wsi_mmm.errors import OutputError, StorageError
from wsi_mmm.timing import StepTime

RECIPE = Recipe("default", "hash", (), 0.5, 256, 0)


def report_in(folder: Path) -> run_report.RunReport:
    """The report of a run over one slide that was done."""
    task = SlideTask("s", "s.svs", str(folder / "s"), RECIPE)
    report = run_report.RunReport(str(folder), RECIPE, (task.id,))
    report.add(SlideState(task, status=SlideStatus.DONE, tiles=4, started=1.0, ended=3.0))
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
    report = run_report.RunReport(str(tmp_path), RECIPE, (task.id,))
    unit = WorkUnit("forward", task)
    report.accounting.watch(unit)
    time = StepTime("read", 1, 10.0, 14.0, {"decode": 3.0, "fetch": 1.0})
    report.accounting.watch(ForwardResult(facts_of(unit, time, worker="<node>:7"), tiles=4))
    report.add(SlideState(task, status=SlideStatus.DONE, tiles=4, started=1.0, ended=3.0))
    report.save()
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["slides"][0]["time"]["decode"] == 3.0
    [worker] = found["workers"]
    assert (worker["worker"], worker["threads"], worker["seconds"], worker["tiles"]) == ("<node>:7", 1, 4.0, 4)
    assert worker["time"]["fetch"] == 1.0
    page = (tmp_path / "report.html").read_text()
    assert "<td>&lt;node&gt;:7</td>" in page and "<td>75 %</td>" in page


def test_a_report_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    """Rows, their extras, the order and the exit code."""
    plan = plan_of(300, 300, 2, 8, 1.0, 0)
    report = run_report.RunReport(str(tmp_path), plan.slide.recipe, (plan.slide.id,))
    report.accounting.watch(result_of(WorkUnit("plan", plan.slide), plan=plan))
    report.add(SlideState(plan.slide, status=SlideStatus.DONE, plan=plan, tiles=25, started=1.0, ended=3.0))
    report.save()
    back = load_report(str(tmp_path), plan.slide.recipe, [plan.slide])
    assert back.slides[0].tiles == 25 and back.exit_code == report.exit_code == 0
    assert back.slides[0].extra.keys() == report.slides[0].extra.keys()


def test_what_is_no_report_is_said(tmp_path: Path) -> None:
    """StorageError, one line."""
    plan = plan_of(300, 300, 2, 8, 1.0, 0)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(StorageError, match="no report of a run"):
        load_report(str(tmp_path), plan.slide.recipe, [plan.slide])


def test_how_a_slide_ended_is_said_in_numbers() -> None:
    """Objects, tiles and seconds of a slide that is done; the reason of one that is not; what was done before."""
    task = SlideTask("s", "s.svs", "out/s", RECIPE)
    state = SlideState(task, status=SlideStatus.DONE, tiles=26, started=1.0, ended=11.0)
    state.summary = SlideSummary(SlideStatus.DONE, 26, {"nuclei": 2431})
    assert outcome_text(state) == "done, 2,431 objects in 26 tiles, 10.0 s (2.6 tiles/s)"
    state.resumed = True
    assert outcome_text(state) == "done before, 2,431 objects in 26 tiles; the option force redoes it"
    state.status, state.error = SlideStatus.FAILED, "no mpp"
    assert outcome_text(state) == "failed: no mpp"
    empty = SlideState(task, status=SlideStatus.EMPTY, started=1.0, ended=2.5)
    assert outcome_text(empty) == "empty (no tissue found), 0 tiles, 1.5 s"
