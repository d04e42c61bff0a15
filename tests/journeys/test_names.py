"""File names that are no UTF-8: one way to write them down, in every file and on the terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from helpers.commands import invoke, json_lines
from helpers.made_slides import Made, small_slide  # noqa: F401  (a fixture)
from wsi_mmm.engine.executors.dask_jobs import JobStatus
from wsi_mmm.engine.monitoring.logs import JsonLines
from wsi_mmm.errors import printable
from wsi_mmm.outputs.report import SlideRow, report_html, report_json
from wsi_mmm.outputs.tables import slides_csv, slides_parquet
from wsi_mmm.storage import store

ODD = os.fsdecode(b"caf\xe9")  # as Latin-1 file systems have it


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("ünï 切片 🔬", "ünï 切片 🔬"),
        (ODD, r"caf\xe9"),
        (f"{ODD}é", r"caf\xe9é"),
        ("a\ud83d", r"a\ud83d"),
    ],
)
def test_what_is_no_utf8_is_escaped(text: str, shown: str) -> None:
    """A byte as \\xe9; text that is UTF-8 stays."""
    assert printable(text) == shown
    assert store.redact(f"/slides/{text}.svs") == f"/slides/{shown}.svs"


def test_a_run_over_such_a_name_ends_with_its_report(small_slide: Made, tmp_path: Path) -> None:  # noqa: F811
    """Report, tables, log and lines are UTF-8; the same command resumes; the names on disk are as they were."""
    if os.fsencode(ODD) != b"caf\xe9":
        pytest.skip("the file system's names are no bytes")
    slides, out, log = tmp_path / f"in-{ODD}", tmp_path / f"out-{ODD}", tmp_path / f"log-{ODD}.jsonl"
    slides.mkdir()
    shutil.copy(small_slide.path, slides / f"{ODD}.tiff")
    options = ["-o", str(out), "--task", "stain", "--device", "cpu", "--log-file", str(log), "--log-level", "debug"]
    first = invoke("run", str(slides), *options)
    assert first.exit_code == 0, first.output
    assert r"caf\xe9" in first.stdout
    report = json.loads((out / "report.json").read_bytes().decode("utf-8"))
    [row] = report["slides"]
    assert row["uri"].endswith(r"in-caf\xe9/caf\xe9.tiff") and row["status"] == "done"
    assert r"caf\xe9" in (out / "report.html").read_bytes().decode("utf-8")
    assert json.loads((out / row["id"] / "slide.json").read_bytes())["uri"] == row["uri"]
    assert row["id"].isascii() and (out / row["id"] / "result.geojson.gz").exists()
    assert all(json.loads(line) for line in log.read_bytes().decode("utf-8").splitlines())
    again = invoke("run", str(slides), *options, "--json")
    assert again.exit_code == 0 and json_lines(again)[-1]["report"]["slides"][0]["extra"]["resumed"]


def test_a_slide_that_is_missing_is_named(tmp_path: Path) -> None:
    """On stderr and in the report."""
    done = invoke("run", str(tmp_path / f"{ODD}.svs"), "-o", str(tmp_path / "out"), "--task", "stain")
    assert done.exit_code == 4 and r"caf\xe9.svs" in done.stderr and "unexpected" not in done.output
    assert r"caf\\xe9.svs" in (tmp_path / "out" / "report.json").read_bytes().decode("utf-8")


def test_writers_take_any_text() -> None:
    """Each by itself, whatever the text that reaches it: messages hold paths as they are."""
    extra = {"answers": {f"grade {ODD}": ODD}, "files": {"geojson": f"/o/s/{ODD}"}, "traceback": ODD}
    row = SlideRow("s", f"/{ODD}", "done", ODD, 0.5, 0.5, 4, 0, 0, 1.0, 4.0, 0.5, 10, 0, 1.0, extra)
    assert report_json({"argv": [ODD], ODD: 1}, [row]).decode("utf-8").count(r"caf\\xe9") == 8
    assert r"caf\xe9" in report_html({"argv": [ODD], "warnings": [ODD]}, [row]).decode("utf-8")
    assert slides_csv([row]).decode("utf-8").count(r"caf\xe9") == 3
    assert pq.read_table(io.BytesIO(slides_parquet([row])))["uri"].to_pylist() == [r"/caf\xe9"]
    record = logging.makeLogRecord({"msg": "at %s", "args": (ODD,), "facts": {"event": "slide", "output": ODD}})
    assert json.loads(JsonLines().format(record).encode("utf-8"))["message"] == r"at caf\xe9"


def test_a_job_tells_its_output_to_a_cluster_in_utf8() -> None:
    """Dask's messages hold nothing else."""
    status = JobStatus("1a2b", store.redact(f"/results/{ODD}"))
    assert status.output.encode("utf-8") == rb"/results/caf\xe9"
