"""Tables of all slides of an output, whoever wrote them, and what a slide cost the run that did it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.plans import plan_of
from wsi_mmm.engine.events import SlideStatus
from wsi_mmm.engine.monitoring.run_report import RunReport
from wsi_mmm.engine.monitoring.slide_rows import all_rows, with_kept_cost, write_slide_tables
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.scheduler import SlideState
from wsi_mmm.engine.units import SlidePlan, SlideSummary, SlideTask
from wsi_mmm.outputs.report import SlideRow
from wsi_mmm.storage import store

RECIPE = Recipe("default", "hash", (), 0.5, 256, 0)


def publish(folder: Path, name: str, grade: object, **facts: Any) -> SlideRow:
    """What the publish step of a slide leaves, and its row in the run that did it."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    answers = {"grade": grade}
    found = {
        "id": name,
        "uri": f"/s/{name}.svs",
        "status": "done",
        "mpp_effective": 0.5,
        "tiles": 4,
        "answers": answers,
    }
    (folder / name / "slide.json").write_text(json.dumps({**found, **facts}))
    return SlideRow(name, f"/s/{name}.svs", "done", None, 0.5, 0.5, 4, 0, 0, 1.0, 4.0, 0.5, 10, 0, 1.0,
                    {"answers": answers})  # fmt: skip


def table(folder: Path) -> dict[str, str]:
    """Grades by slide, as both tables say them."""
    lines = {line["id"]: line["grade"] for line in csv.DictReader((folder / "slides.csv").read_text().splitlines())}
    both = pq.read_table(folder / "slides.parquet").to_pydict()
    assert lines == {name: str(grade or "") for name, grade in zip(both["id"], both["grade"], strict=True)}
    return lines


def test_jobs_that_share_an_output_lose_no_rows(tmp_path: Path) -> None:
    """Each job of an array knows its own slides only; the tables hold all, one's own first, the others by id."""
    for name, grade in (("c", "high"), ("a", "low"), ("b", "high")):
        write_slide_tables(str(tmp_path), [publish(tmp_path, name, grade)])
    assert list(table(tmp_path).items()) == [("b", "high"), ("a", "low"), ("c", "high")]


def test_the_summary_has_every_slide_of_the_folder(tmp_path: Path) -> None:
    """Jobs of an array, a slide that failed in this run over results of an earlier one, and what others took."""
    counts = [{"level": "slide", "tissue_area_mm2": 2.0, "tiles": 4, "tasks": {"n": {"c": {"count": 6}}}}]
    for name in ("c", "a"):
        write_slide_tables(str(tmp_path), [publish(tmp_path, name, "low", summary=counts, result_hash="h")])
    (tmp_path / "c" / "report.json").write_text(json.dumps({"result_hash": "h", "seconds": 7.5}))
    (tmp_path / "a" / "report.json").write_text(json.dumps({"result_hash": "of another recipe", "seconds": 9.5}))
    failed = replace(publish(tmp_path, "b", "low", summary=counts), status="failed", extra={})
    write_slide_tables(str(tmp_path), [failed], answers=False)
    lines = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    names = ("slide_id", "status", "seconds", "n_c_count", "n_c_per_mm2")
    assert [tuple(line[name] for name in names) for line in lines] == [
        ("b", "failed", "1.0", "", ""), ("a", "done", "", "6", "3.0"), ("c", "done", "7.5", "6", "3.0"),
    ]  # fmt: skip
    assert pq.read_table(tmp_path / "summary.parquet").num_rows == 3
    assert "b" not in (tmp_path / "slides.csv").read_text().split("\n")[1]


def test_a_table_that_was_overtaken_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job publishes and writes its tables after the first has looked at the folders, before it writes."""
    write, own = store.write_bytes, publish(tmp_path, "mine", "low")
    overtaken: list[str] = []

    def late(uri: str, data: bytes) -> None:
        if not overtaken:
            overtaken.append(uri)
            write_slide_tables(str(tmp_path), [publish(tmp_path, "theirs", "high")])
        write(uri, data)

    monkeypatch.setattr(store, "write_bytes", late)
    write_slide_tables(str(tmp_path), [own])
    assert table(tmp_path) == {"mine": "low", "theirs": "high"} and overtaken
    assert pq.read_table(tmp_path / "summary.parquet")["slide_id"].to_pylist() == ["mine", "theirs"]


def test_only_folders_with_results_of_a_slide_are_rows(tmp_path: Path) -> None:
    """No cache, no torn or foreign slide.json, no link out of the folder; the tiles that failed come from the row."""
    publish(tmp_path, "good", "low")
    publish(tmp_path, "part", "low", status="partial")
    (tmp_path / "part" / "report.json").write_text(json.dumps({"failed_tiles": 3}))
    publish(tmp_path, "renamed", "low", id="other")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "slide.json").write_text('{"id": "torn"')
    (tmp_path / "cache" / "deep").mkdir(parents=True)
    publish(tmp_path / "elsewhere", "link", "low")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "link")
    rows = all_rows(str(tmp_path), [])
    assert [(row.id, row.status, row.failed_tiles) for row in rows] == [("good", "done", 0), ("part", "partial", 3)]


def test_answers_of_two_models_share_a_column(tmp_path: Path) -> None:
    """A class of one, a number of the other: both as text."""
    publish(tmp_path, "a", "high")
    write_slide_tables(str(tmp_path), [publish(tmp_path, "b", 0.25)])
    assert table(tmp_path) == {"b": "0.25", "a": "high"}


def ended(plan: SlidePlan, folder: Path, **facts: Any) -> SlideState:
    task = SlideTask("s", "s.svs", str(folder / "s"), RECIPE, reader="r")
    return SlideState(task, SlideStatus.DONE, plan=SlidePlan(task, *list(_parts(plan))[1:]), **facts)


def _parts(plan: SlidePlan) -> list[Any]:
    return [getattr(plan, name) for name in SlidePlan.__slots__]


def test_a_run_that_resumes_keeps_what_the_slide_cost(tmp_path: Path) -> None:
    """The row is that of the run that did the slide; what looking at it took is ``this_run``."""
    first = RunReport(str(tmp_path), RECIPE, ("s",))
    done = first.add(ended(plan_of(300, 300, 2, 8, 1.0, 0), tmp_path, tiles=25, started=10.0, ended=60.0))
    assert done.seconds == 50.0 and "this_run" not in done.extra
    kept = json.loads((tmp_path / "s" / "report.json").read_text())
    assert (kept["seconds"], kept["tiles_per_s"], kept["result_hash"]) == (50.0, 0.5, RECIPE.result_hash("r"))
    again = RunReport(str(tmp_path), RECIPE, ("s",))
    summary = SlideSummary(SlideStatus.DONE, 25, cost=kept)
    task = SlideTask("s", "s.svs", str(tmp_path / "s"), RECIPE)
    row = again.add(SlideState(task, SlideStatus.DONE, resumed=True, summary=summary, started=100.0, ended=100.5))
    assert (row.seconds, row.tiles_per_s, row.cache_hits) == (50.0, 0.5, 0)
    assert row.extra["resumed"] and row.extra["this_run"]["seconds"] == 0.5
    assert json.loads((tmp_path / "s" / "report.json").read_text()) == kept
    again.save()
    page = (tmp_path / "report.html").read_text()
    assert "50.0 s" in page


@pytest.mark.parametrize("kept", [None, {}, {"seconds": "long"}, {"seconds": 1.0, "tiles_per_s": True}])
def test_a_kept_row_that_is_none_changes_nothing(kept: dict[str, Any] | None, tmp_path: Path) -> None:
    """Results of earlier versions have none."""
    row = publish(tmp_path, "a", "low")
    assert with_kept_cost(row, kept) is row
