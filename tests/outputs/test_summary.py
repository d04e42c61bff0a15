"""summary.csv: tidy names, derived numbers, and cells for whatever a slide.json may hold."""

from __future__ import annotations

import csv
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wsi_mmm.outputs.report import SlideRow
from wsi_mmm.outputs.summary import SUMMARY_FACTS, SlideResults, summary_csv, summary_parquet


def results(name: str, status: str = "done", **facts: Any) -> SlideResults:
    row = SlideRow(name, f"/s/{name}.svs", status, None, 0.5, 0.5, 9, 1, 0, 12.5, 4.0, 0.5, 10, 0, 1.0)
    return SlideResults(row, facts)


def place(level: str, tissue: float, tiles: int = 8, **rest: Any) -> dict[str, Any]:
    known = {"level": level, "region": None, "name": None, "class": None, "area_mm2": 4.0, "tissue_area_mm2": tissue}
    return {**known, "tiles": tiles, "failed_tiles": 1, "tasks": {}, **rest}


def table(*slides: SlideResults) -> list[dict[str, str]]:
    """The rows of the CSV, which are those of the Parquet file."""
    lines = list(csv.DictReader(io.StringIO(summary_csv(slides).decode())))
    rows = pq.read_table(pa.BufferReader(summary_parquet(slides))).to_pylist()
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows] == lines
    return lines


def test_counts_give_densities_and_percentages() -> None:
    """Per mm² of tissue, percent of the task's objects, of tissue, of tiles; a mean as it is."""
    tasks = {
        "ki67": {"positive": {"count": 30}, "negative": {"count": 90}}, "nuclei": {"nucleus": {"count": 120}},
        "tissue": {"tumour": {"count": 2, "area_mm2": 0.5}}, "stain": {"H&E": {"tiles": 6}, "": {"tiles": 2}},
        "age": {"": {"mean": 51.5}}, "cells": {"size (µm²)": {"mean": 7.0}},
    }  # fmt: skip
    facts = {"recipe": {"model": "default", "model_hash": "abc"}, "width": 100, "height": 50, "mpp_x": 0.25}
    [row] = table(results("a", summary=[place("slide", 2.0, tasks=tasks)], **facts))
    assert tuple(row)[: len(SUMMARY_FACTS)] == SUMMARY_FACTS
    wanted = {
        "slide_id": "a", "level": "slide", "model": "default", "model_hash": "abc", "slide_mpp_x": "0.25",
        "width_px": "100", "height_px": "50", "tissue_area_mm2": "2.0", "tiles": "8", "failed_tiles": "1",
        "seconds": "12.5", "ki67_positive_count": "30", "ki67_positive_per_mm2": "15.0",
        "ki67_positive_percent": "25.0", "nuclei_nucleus_count": "120", "nuclei_nucleus_per_mm2": "60.0",
        "tissue_tumour_count": "2", "tissue_tumour_area_mm2": "0.5", "tissue_tumour_percent_of_tissue": "25.0",
        "stain_h_e_tiles": "6", "stain_h_e_percent": "75.0", "stain_unclassified_tiles": "2", "age_mean": "51.5",
        "cells_size_µm²_mean": "7.0",
    }  # fmt: skip
    assert wanted.items() <= row.items()
    assert "nuclei_nucleus_percent" not in row  # of one class: always 100


def test_regions_and_classes_follow_their_slide() -> None:
    """Rows of a slide stand together; a slide that failed and one of an earlier version have a row, too."""
    count = {"nuclei": {"nucleus": {"count": 0}}}
    one = [
        place("slide", 0.0, tasks=count), place("region", 1.0, region=1, name="core 1", **{"class": "Tumor"}),
        place("class", 1.0, **{"class": "Tumor"}),
    ]  # fmt: skip
    rows = table(results("a", summary=one, answers={"grade": "high", "grade:high": 0.9}), results("b", "failed"),
                 results("c", tiles=9))  # fmt: skip
    keys = ("slide_id", "level", "region", "region_name", "annotation_class", "tiles", "grade", "grade_high")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("a", "slide", "", "", "", "8", "high", "0.9"), ("a", "region", "1", "core 1", "Tumor", "8", "", ""),
        ("a", "class", "", "", "Tumor", "8", "", ""), ("b", "slide", "", "", "", "", "", ""),
        ("c", "slide", "", "", "", "9", "", ""),
    ]  # fmt: skip
    assert (rows[0]["nuclei_nucleus_count"], rows[0]["nuclei_nucleus_per_mm2"]) == ("0", "")  # per no tissue
    assert rows[3]["nuclei_nucleus_count"] == ""  # not counted is not none


def test_classes_of_like_names_keep_columns_of_their_own() -> None:
    """Also where one would be named as a fact is."""
    tasks = {"t": {"a-b": {"count": 1}, "a b": {"count": 2}, "A_B": {"count": 3}}, "": {"tiles": {"mean": 4.0}}}
    facts = {"answers": {"seconds": 5.0, "uri": "x"}}
    [row] = table(results("a", summary=[place("slide", 1.0, tasks=tasks)], **facts))
    assert [row[f"t_a_b_count{end}"] for end in ("", "_2", "_3")] == ["1", "2", "3"]
    assert (row["seconds"], row["seconds_2"], row["uri"]) == ("12.5", "5.0", "/s/a.svs")


@pytest.mark.parametrize(
    "summary",
    [7, [3, None, "x"], [{"level": 4, "tasks": [1]}], [{"tasks": {"t": 5, "u": {"c": 6, "d": {"count": "many"}}}}],
     [place("slide", True, "nine", tasks={"t": {"c": {"mean": None}}})]],  # type: ignore[arg-type]
)  # fmt: skip
def test_a_summary_that_is_none_costs_no_row(summary: Any) -> None:
    """Others may have written to the folder: cells stay empty."""
    rows = table(results("a", summary=summary, recipe=[], width="wide"))
    assert {row["slide_id"] for row in rows} == {"a"} and all(row["width_px"] == "" for row in rows)
