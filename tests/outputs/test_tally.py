"""Counts per place and class are those of the GeoJSON, counted again from the file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from shapely.geometry import box, shape

from helpers.shapes import NUCLEI, ellipses, polygons, regions
from wsi_mmm.annotations import Shape, Shapes
from wsi_mmm.outputs import tally as tally_module
from wsi_mmm.outputs.geojson import GeoJSONWriter
from wsi_mmm.outputs.inside import Regions
from wsi_mmm.outputs.places import Place, places_of
from wsi_mmm.outputs.polygons import concat, part
from wsi_mmm.outputs.tally import SlideTally
from wsi_mmm.types import Objects, TaskInfo

TISSUE = TaskInfo("tissue", "segment", ("tumour", "stroma"), ((200, 0, 0), (0, 200, 0)), "pixel")
STAIN = TaskInfo("stain", "classify", ("H&E", "IHC"), ((1, 2, 3), (4, 5, 6)), "tile")
MARKS = TaskInfo("marks", "multilabel", ("a", "b"), ((1, 2, 3), (4, 5, 6)), "tile")
AGE = TaskInfo("age", "regress", ("years",), ((1, 2, 3),), "tile")
INFOS = [replace(NUCLEI, scope="pixel"), TISSUE, STAIN, MARKS, AGE]
DRAWN = (
    Shape(box(0, 0, 4000, 4000), "Tumor", (), "core"),
    Shape(shapely.Point(5000, 5000).buffer(3000), "Tumor"),
    Shape(box(7000, 100, 9000, 9000).difference(box(7500, 500, 8000, 6000)), "Stroma"),
    Shape(box(50, 50, 60, 60)),
)


def places() -> list[Place]:
    return places_of(Regions(shapely.union_all([one.geometry for one in DRAWN]), Shapes(DRAWN)))


def tiles(info: TaskInfo, classes: list[int], measured: dict[str, Any]) -> Objects:
    """Tiles of 900 px in a row at y = 3500."""
    corners = [[(x, 3500), (x + 900, 3500), (x + 900, 4400), (x, 4400)] for x in range(0, 900 * len(classes), 900)]
    made = polygons(*corners, **measured)
    return replace(made, task=info.name, class_index=np.array(classes, np.int32))


def publish(path: Path, tally: SlideTally, *some: Objects) -> list[dict[str, Any]]:
    def complete(objects: Objects) -> Objects:
        tally.add(objects)
        return objects

    with GeoJSONWriter(path, "f", INFOS, gzip=False) as writer:
        for objects in some:
            writer.write(objects, complete)
    return list(json.loads(path.read_text())["features"])


def class_of(feature: dict[str, Any]) -> str:
    return str(feature["properties"].get("classification", {}).get("name", ""))


def test_objects_are_counted_as_they_are_published(tmp_path: Path) -> None:
    """Objects that fall apart when they are made valid count as the parts, slivers not at all; regions overlap."""
    torn = polygons([(100, 100), (140, 140), (140, 100), (100, 140)], [(10, 10), (10.001, 10), (10.001, 10.001)])
    torn = replace(
        torn, class_index=np.array([1, 0], np.int32), measurements={"area": np.zeros(2), "probability": np.zeros(2)}
    )
    tally = SlideTally(places(), INFOS)
    features = publish(tmp_path / "a.geojson", tally, concat([torn, ellipses(4000)]))
    assert len(features) == 4002  # one in two parts, one gone
    names = Counter(map(class_of, features))
    assert tally.count_classes("nuclei") == {name: names[name] for name in NUCLEI.classes}
    areas = [None, *(one.geometry for one in DRAWN), DRAWN[2].geometry, DRAWN[0].geometry.union(DRAWN[1].geometry)]
    for area, found in zip(areas, tally.numbers(1.0), strict=True):
        inside = [f for f in features if area is None or area.intersects(shape(f["geometry"]).centroid)]
        wanted = Counter(map(class_of, inside))
        assert found["nuclei"] == {name: {"count": wanted[name]} for name in NUCLEI.classes}
    levels = [(one.level, one.number, one.name, one.class_name) for one in places()]
    assert levels == [
        ("slide", None, None, None), ("region", 1, "core", "Tumor"), ("region", 2, None, "Tumor"),
        ("region", 3, None, "Stroma"), ("region", 4, None, None), ("class", None, None, "Stroma"),
        ("class", None, None, "Tumor"),
    ]  # fmt: skip


def test_areas_count_as_far_as_they_lie_in_a_region(tmp_path: Path) -> None:
    """Counts and mm² of areas with holes, whole and per region, as shapely measures the file."""
    labels = np.zeros((80, 80), np.int32)
    labels[5:50, 5:60], labels[20:30, 20:30], labels[60:75, :70] = 1, 2, 2
    areas = regions(labels)
    areas = replace(areas, coords=areas.coords * 100, measurements={})
    tally = SlideTally(places(), INFOS)
    features = publish(tmp_path / "a.geojson", tally, areas)
    for place, found in zip(places(), tally.numbers(1e-6), strict=True):
        for name in TISSUE.classes:
            mine = [shape(f["geometry"]) for f in features if class_of(f) == name]
            cut = mine if place.level == "slide" else [one.intersection(place.geometry) for one in mine]
            assert found["tissue"][name]["count"] == sum(one.area > 0 for one in cut)
            assert found["tissue"][name]["area_mm2"] == pytest.approx(sum(one.area for one in cut) / 1e6, rel=1e-8)


def test_tiles_count_where_they_share_area(tmp_path: Path) -> None:
    """Classes, several labels at once, tiles without a class, means of numbers; an edge is no area."""
    tally = SlideTally(places(), INFOS)
    stain = tiles(STAIN, [0, 1, 1, -1, 0, 0], {"H&E": np.linspace(0, 1, 6), "IHC": np.linspace(1, 0, 6)})
    marks = tiles(MARKS, [0, -1, 1, 0, 0, 0], {"a": [0.5, 0.4, 0.6, 1, 1, 1], "b": [0.9, 0.1, 0.5, 0, 0, 0]})
    age = tiles(AGE, [0] * 6, {"age": [10, np.nan, 30, 40, 50, 60]})
    features = publish(tmp_path / "a.geojson", tally, stain, marks, age)
    whole, core, *_ = tally.numbers(1.0)
    assert Counter(class_of(f) for f in features[:6]) == {"H&E": 3, "IHC": 2, "": 1}
    assert whole["stain"] == {"H&E": {"tiles": 3}, "IHC": {"tiles": 2}, "": {"tiles": 1}}
    assert (
        whole["marks"]
        == {"a": {"tiles": 5}, "b": {"tiles": 2}}
        == {name: {"tiles": sum(f["properties"]["measurements"][name] >= 0.5 for f in features[6:12])} for name in "ab"}
    )
    assert whole["age"] == {"": {"mean": 38.0}}
    assert core["stain"] == {"H&E": {"tiles": 2}, "IHC": {"tiles": 2}, "": {"tiles": 1}}  # the sixth begins at 4500
    assert core["age"] == {"": {"mean": 32.5}}
    boxes = np.array([[0, 3500, 900, 4400], [0, 4000, 900, 4400], [4500, 3500, 5400, 4400]], np.float64)
    counts = tally.count_tiles(boxes, np.array([True, False, True]))
    assert counts[:3] == [(3, 2), (1, 1), (1, 1)]


def test_the_size_of_portions_changes_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects given at once, in parts, or looked at one by one."""
    some = ellipses(300)
    found = []
    for cuts, most in (([0, 300], 10**7), ([0, 1, 200, 200, 300], 10**7), ([0, 300], 7)):
        monkeypatch.setattr(tally_module, "_PAIRS", most)
        tally = SlideTally(places(), INFOS)
        for start, stop in pairwise(cuts):
            tally.add(part(some, start, stop))
        found.append(list(tally.numbers(1.0)))
    assert found[0] == found[1] == found[2]
