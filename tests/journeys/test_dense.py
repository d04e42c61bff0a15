"""Detection and independent masks from a slide to GeoJSON: no seam, whatever the blocks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

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
