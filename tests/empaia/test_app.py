"""The app on a platform of ours: what it posts, how it ends, and that it ends."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import shapely

import wsi_mmm
from helpers.empaia_platform import FakePlatform
from wsi_mmm.empaia.app import JobEnd
from wsi_mmm.empaia.bodies import Wsi
from wsi_mmm.empaia.geometry import polygons
from wsi_mmm.empaia.job_inputs import read_regions, read_slide, regions_geojson

from .conftest import ROIS, Start, posted, rectangle, regions, run

EAD = json.loads((Path(__file__).parents[2] / "deploy" / "empaia" / "ead.json").read_text())
POLYGON = {"type": "polygon", "coordinates": [[700, 300], [1000, 350], [900, 700], [650, 600]]}
CIRCLE = {"type": "circle", "center": [300, 300], "radius": 150}


def corners(platform: FakePlatform) -> list[list[list[int]]]:
    return [one["coordinates"] for one in posted(platform, "nuclei_objects")]


def objects_of_the_cli(slide: Path, output: Path, wsi: Wsi, regions_file: Path | None) -> list[list[list[int]]]:
    """What a run over the file finds, rounded as the platform wants it; in the file's order."""
    more = {} if regions_file is None else {"regions": regions_file}
    [row] = wsi_mmm.run(slide, output=output, **more).slides
    assert row.status == "done", row.error
    found = json.loads(gzip.decompress((output / row.id / "result.geojson.gz").read_bytes()))["features"]
    rings = [
        [np.array(ring[:-1]) for ring in one["geometry"]["coordinates"]]
        for one in found
        if one["properties"]["objectType"] == "detection"
    ]
    return [[list(c) for c in shape.corners] for one in rings for shape in polygons(one, wsi, keep_holes=False)]


# ------------------------------------------------------------------------------------------------ what is posted


def test_regions_of_every_shape(start: Start, tiny_slide: Path, tmp_path: Path) -> None:
    """Every output of the mode is posted, the objects are those of the CLI on the same regions, and each region has its
    count; the map has the same number of objects in it; progress rises; the job is finalized once."""
    given = regions(rectangle(500, 300, 300, 200), POLYGON, CIRCLE)
    platform = start(inputs={"regions": given})
    assert run(pause=0.0) == JobEnd("finalized")
    assert platform.state == "COMPLETED" and platform.log.count("PUT /finalize") == 1
    assert set(platform.outputs) == set(EAD["modes"]["standalone"]["outputs"])

    wsi = read_slide(platform.inputs["slide"])
    asked = tuple(read_regions(given, wsi))
    (tmp_path / "regions.geojson").write_bytes(regions_geojson(asked))
    expected = objects_of_the_cli(tiny_slide, tmp_path / "cli", wsi, tmp_path / "regions.geojson")
    assert corners(platform) == expected and len(expected) > 20

    centres = shapely.get_coordinates(shapely.centroid([shapely.Polygon(one) for one in expected]))
    counts = posted(platform, "nuclei_counts")
    assert [one["reference_id"] for one in counts] == ROIS[:3]
    for region, count, density in zip(asked, counts, posted(platform, "nuclei_densities"), strict=True):
        assert abs(count["value"] - int(region.area.holds(centres).sum())) <= 1  # corners are rounded here
        assert density["value"] == pytest.approx(count["value"] / (region.area.size * 0.25e-6))
    assert 0 < platform.progress[0] <= platform.progress[-1] <= 1 == len(set(np.sign(np.diff(platform.progress))))

    [tile] = [np.frombuffer(data, "<f4") for data in platform.tiles.values()]
    [level] = platform.outputs["nuclei_map"]["levels"]
    down = platform.inputs["slide"]["levels"][level["slide_level"]]["downsample_factor"]
    assert tile.sum() * (0.5e-3 * down) ** 2 == pytest.approx(len(expected), rel=0.1)
    for tissue in posted(platform, "tissue"):
        shape = shapely.Polygon(tissue["coordinates"])
        assert shape.intersection(shapely.union_all([one.area.shape for one in asked])).area > 0.95 * shape.area
    assert not list(tmp_path.glob("wsi-mmm-empaia-*"))


CIRCLES = [(700, 500, 260), (60, 1100, 300), (900, 560, 150)]  # x, y, radius: inside, across two edges, overlapping


def test_circles_hold_what_lies_in_them(start: Start) -> None:
    """Of a run over the whole slide, the objects whose centre is no farther from a circle's than its radius, and no
    others; counts and densities are those of the circle's area on the slide."""
    whole = start(mode="PREPROCESSING")
    assert run() == JobEnd("finalized")
    every = corners(whole)
    drawn = [{"type": "circle", "center": [x, y], "radius": radius} for x, y, radius in CIRCLES]
    platform = start(inputs={"regions": regions(*drawn)})
    assert run() == JobEnd("finalized") and platform.refused == []

    centres = shapely.get_coordinates(shapely.centroid([shapely.Polygon(one) for one in every]))
    beyond = np.array([np.hypot(*(centres - (x, y)).T) - radius for x, y, radius in CIRCLES])  # px
    edge = np.abs(beyond).min(axis=0) < 1.0  # corners are rounded, and a circle has corners here
    inside = {json.dumps(one) for one, far in zip(every, beyond.min(axis=0), strict=True) if far <= 0}
    unsure = {json.dumps(one) for one, near in zip(every, edge, strict=True) if near}
    found = {json.dumps(one) for one in corners(platform)}
    assert found ^ inside <= unsure and len(inside - unsure) > 30 and len(unsure) < 10

    frame = shapely.box(0, 0, platform.inputs["slide"]["extent"]["x"], platform.inputs["slide"]["extent"]["y"])
    counts, densities = posted(platform, "nuclei_counts"), posted(platform, "nuclei_densities")
    for (x, y, radius), far, count, density in zip(CIRCLES, beyond, counts, densities, strict=True):
        area = shapely.intersection(frame, shapely.Point(x, y).buffer(radius, quad_segs=4096)).area
        assert (far < -1).sum() <= count["value"] <= (far < 1).sum()
        assert density["value"] == pytest.approx(count["value"] / (area * 0.25e-6), rel=2e-4)


def test_preprocessing_is_the_whole_slide(start: Start, tiny_slide: Path, tmp_path: Path) -> None:
    """Without regions; each object has a class of the EAD and a confidence, in the objects' order."""
    platform = start(mode="PREPROCESSING")
    del platform.inputs["regions"]
    assert run() == JobEnd("finalized")
    assert set(platform.outputs) == set(EAD["modes"]["preprocessing"]["outputs"])
    wsi = read_slide(platform.inputs["slide"])
    assert corners(platform) == objects_of_the_cli(tiny_slide, tmp_path / "cli", wsi, None)
    objects = posted(platform, "nuclei_objects")
    classes, confidences = posted(platform, "nuclei_classes"), posted(platform, "nuclei_confidences")
    ids = [one["id"] for one in objects]
    assert [one["reference_id"] for one in classes] == ids == [one["reference_id"] for one in confidences]
    assert {one["value"] for one in classes} == {f"{EAD['namespace']}.classes.nuclei.nucleus"}
    assert all(0 < one["value"] <= 1 for one in confidences)
    assert platform.outputs["nuclei_slide_count"]["value"] == len(ids) > 50
    area = sum(shapely.Polygon(one["coordinates"]).area for one in posted(platform, "tissue")) * 0.25e-6
    assert platform.outputs["nuclei_slide_density"]["value"] == pytest.approx(len(ids) / area)
    stains = posted(platform, "stain_classes")
    assert {one["reference_id"] for one in stains} == {one["id"] for one in posted(platform, "tissue")}
    assert platform.outputs["stain_slide_class"]["value"] in ("H&E", "IHC", "Giemsa", "other")


def test_a_region_without_tissue_has_no_objects(start: Start) -> None:
    """Empty collections, counts of 0, and the job is finalized."""
    platform = start(inputs={"regions": regions(rectangle(0, 0, 4, 4))})
    assert run() == JobEnd("finalized")
    assert corners(platform) == [] and [one["value"] for one in posted(platform, "nuclei_counts")] == [0]
    assert set(platform.outputs) == set(EAD["modes"]["standalone"]["outputs"])


# ------------------------------------------------------------------------------------------------ how it ends


def test_a_cluster_needs_a_shared_work_folder(start: Start) -> None:
    """A scheduler without one is refused before anything is begun."""
    platform = start()
    ended = run(scheduler="tcp://127.0.0.1:9")
    assert ended.how == "failed" and "--work" in ended.error and "--work" not in ended.message
    assert platform.state == "FAILED"
