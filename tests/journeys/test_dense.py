"""Detection and independent masks from a slide to GeoJSON: no seam, whatever the blocks."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from shapely.geometry import box, mapping, shape

import wsi_mmm
from helpers.qupath import check_qupath

GREY = [[120, 120, 120]] * 3
CARD = {
    "format": "wsi-mmm-model/1",
    "name": "dense",
    "encoder": {"name": "resnet18", "args": {"channels": [16, 16, 24, 32]}},
    "decoder": {"kind": "fpn", "bottleneck": 16, "widths": [8, 8, 8, 8]},
    "neck": {"width": 8},
    "mpp": 1.0,
    "tile_size": 128,
    "overlap": 16,
    "mean": [0.7, 0.6, 0.7],
    "std": [0.2, 0.2, 0.2],
    "tasks": [
        {
            "name": "cells", "kind": "detect", "head": "dense", "outputs": 6, "classes": ["round", "long"],
            "colors": GREY[:2], "params": {"threshold": 20, "size": 24},
        },
        {
            "name": "layers", "kind": "multisegment", "head": "map", "outputs": 3, "classes": ["a", "b", "c"],
            "colors": GREY,
        },
        {
            "name": "draw", "kind": "reconstruct", "head": "image", "outputs": 3, "classes": ["px"], "colors": GREY[:1],
        },
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights, loud enough that there are peaks and ragged masks everywhere."""
    import torch

    from wsi_mmm.model.card import ModelCard
    from wsi_mmm.model.checkpoint import build_model, save_model

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model")
    model = build_model(ModelCard.model_validate(CARD)).eval()
    with torch.no_grad():
        for name in ("cells", "layers"):
            model.get_parameter(f"heads.{name}.out.weight").mul_(30.0)
            model.get_parameter(f"heads.{name}.out.bias").zero_()
        model.get_parameter("heads.cells.out.weight")[2:].mul_(0.1)  # boxes within two octaves of the usual size
    save_model(model, folder)
    return str(folder)


def test_boxes_and_masks_do_not_know_the_blocks(model: str, tiny_slide: Path, tmp_path: Path) -> None:
    """Blocks of 2 and 16 tiles give the same bytes, beside a task that draws nothing, for QuPath to import."""
    found = []
    for block, tasks in ((2, ["cells", "layers"]), (16, ["cells", "layers", "draw"])):
        report = wsi_mmm.run(tiny_slide, model, output=tmp_path / str(block), block_tiles=block, tasks=tasks)
        [row] = report.slides
        assert row.status == "done", row.error
        found.append((tmp_path / str(block) / row.id / "result.geojson.gz").read_bytes())
    assert found[0] == found[1]
    checked = check_qupath(tmp_path / "2" / row.id / "result.geojson.gz")
    assert checked.ok, checked.violations
    features = json.loads(gzip.decompress(found[0]))["features"]
    boxes = [f for f in features if f["properties"]["classification"]["name"] in ("round", "long")]
    masks = [f for f in features if f["properties"]["classification"]["name"] in ("a", "b", "c")]
    assert len(boxes) > 20 and len(masks) > 5
    assert all(
        len(f["geometry"]["coordinates"][0]) == 5 and f["properties"]["measurements"]["probability"] for f in boxes
    )
    assert {f["properties"]["objectType"] for f in boxes} == {"detection"}
    for block in ("2", "16"):
        check_summary(tmp_path / block, row.id)


def test_a_summary_counts_regions_to_the_object(model: str, tiny_slide: Path, tmp_path: Path) -> None:
    """Regions that overlap and cut blocks, a slide that cannot be read, a run that resumes: counts of the GeoJSON."""
    places = {"one": box(100, 100, 700, 1100), "two": box(600, 300, 1500, 640), "glass": box(0, 0, 30, 30)}
    drawn = [
        {"type": "Feature", "geometry": mapping(area), "properties": {"name": name, "classification": "gland"}}
        for name, area in places.items()
    ]
    (tmp_path / "regions.json").write_text(json.dumps({"type": "FeatureCollection", "features": drawn}))
    (tmp_path / "bad.tiff").write_bytes(b"II*\0 no slide")
    options = {"regions": tmp_path / "regions.json", "tissue": "none", "tasks": ["cells", "layers"]}
    for _ in range(2):  # the second resumes
        report = wsi_mmm.run([tiny_slide, tmp_path / "bad.tiff"], model, output=tmp_path / "out", **options)
    assert [row.status for row in report.slides] == ["done", "failed"] and report.slides[0].extra["resumed"]
    rows = check_summary(tmp_path / "out", report.slides[0].id)
    assert rows[-1]["status"] == "failed" and rows[-1]["cells_round_count"] == rows[-1]["tiles"] == ""
    features = read_features(tmp_path / "out" / report.slides[0].id)
    union = box(100, 100, 700, 1100).union(places["two"]).union(places["glass"])
    areas = [None, *places.values(), union]
    assert [row["region_name"] or row["level"] for row in rows[:5]] == ["slide", *places, "class"]
    for row, area in zip(rows[:5], areas, strict=True):
        for name in ("round", "long"):
            points = [shape(f["geometry"]).centroid for f in features if class_name(f) == name]
            assert int(row[f"cells_{name}_count"]) == sum(area is None or area.intersects(one) for one in points)
        for name in "abc":
            cut = [shape(f["geometry"]).intersection(area or union) for f in features if class_name(f) == name]
            mm2 = sum(one.area for one in cut) * 0.25e-6
            assert float(row[f"layers_{name}_area_mm2"]) == pytest.approx(mm2, rel=1e-3, abs=1e-6)
        assert float(row["tissue_area_mm2"]) == pytest.approx((area or union).area * 0.25e-6, rel=1e-6)


def class_name(feature: dict[str, Any]) -> str:
    return str(feature["properties"]["classification"]["name"])


def read_features(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads(gzip.decompress((folder / "result.geojson.gz").read_bytes()))["features"])


def check_summary(output: Path, slide: str) -> list[dict[str, str]]:
    """The rows of summary.csv; that of the slide has the counts of its GeoJSON, to the object."""
    rows = list(csv.DictReader((output / "summary.csv").read_text().splitlines()))
    counts = Counter(map(class_name, read_features(output / slide)))
    tasks = {"round": "cells", "long": "cells", "a": "layers", "b": "layers", "c": "layers"}
    assert {name: int(rows[0][f"{task}_{name}_count"]) for name, task in tasks.items()} == {
        name: counts[name] for name in tasks
    }
    facts = json.loads((output / slide / "slide.json").read_text())
    for task in ("cells", "layers"):
        assert facts["classes"][task] == {name: counts[name] for name in tasks if tasks[name] == task}
    return rows
