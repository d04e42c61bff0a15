"""Regions: classes per pixel become polygons that no seam has cut, whatever the blocks were."""

from __future__ import annotations

from pathlib import Path

import pytest

import wsi_mmm
from helpers.qupath import check_qupath

CARD = {
    "format": "wsi-mmm-model/1",
    "name": "regions",
    "encoder": {"name": "resnet18", "args": {"channels": [16, 16, 24, 32]}},
    "decoder": {"bottleneck": 16, "widths": [8, 8, 16, 16]},
    "mpp": 1.0,
    "tile_size": 128,
    "overlap": 16,
    "mean": [0.7, 0.6, 0.7],
    "std": [0.2, 0.2, 0.2],
    "tasks": [
        {
            "name": "regions", "kind": "segment", "head": "map", "outputs": 3,
            "classes": ["background", "stroma", "gland"], "colors": [[0, 0, 0], [240, 160, 190], [120, 60, 160]],
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights: its regions are ragged, which is what a test of merging wants."""
    import torch

    from wsi_mmm.model.card import ModelCard
    from wsi_mmm.model.checkpoint import build_model, save_model

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model")
    model = build_model(ModelCard.model_validate(CARD)).eval()
    with torch.no_grad():  # contrasts between classes large enough that each wins somewhere
        model.get_parameter("heads.regions.out.weight").mul_(300.0)
        model.get_parameter("heads.regions.out.bias").zero_()
    save_model(model, folder)
    return str(folder)


def test_regions_do_not_know_the_blocks(model: str, tiny_slide: Path, tmp_path: Path) -> None:
    """Blocks of 1, 2 and 16 tiles give the same bytes, which QuPath would import."""
    found = []
    for block in (1, 2, 16):
        report = wsi_mmm.run(tiny_slide, model, output=tmp_path / str(block), block_tiles=block, save_maps=True)
        [row] = report.slides
        assert row.status == "done", row.error
        found.append((tmp_path / str(block) / row.id / "result.geojson.gz").read_bytes())
    assert found[0] == found[1] == found[2]
    checked = check_qupath(tmp_path / "1" / row.id / "result.geojson.gz")
    assert checked.ok, checked.violations
    assert checked.features > 3


def test_maps_are_kept_when_asked_for(model: str, tiny_slide: Path, tmp_path: Path) -> None:
    """maps/<task>.zarr holds the blended map of the whole slide, the same for any blocks."""
    zarr = pytest.importorskip("zarr")
    maps = []
    for block in (1, 4):
        [row] = wsi_mmm.run(tiny_slide, model, output=tmp_path / str(block), block_tiles=block, save_maps=True).slides
        maps.append(zarr.open_array(tmp_path / str(block) / row.id / "maps" / "regions.zarr", mode="r")[:])
    assert maps[0].shape[0] == 3
    assert maps[0].any()
    assert (maps[0] == maps[1]).all()
