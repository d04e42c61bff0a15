"""Regions of interest: which tiles touch them, and which findings lie in them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

import wsi_mmm
from wsi_mmm.errors import AnnotationError
from wsi_mmm.outputs.inside import regions_of
from wsi_mmm.outputs.polygons import shapes
from wsi_mmm.types import Objects


def geojson(*boxes: tuple[float, float, float, float]) -> bytes:
    """A collection of rectangles (x0, y0, x1, y1)."""
    return shapely.to_geojson(shapely.geometrycollections([shapely.box(*one) for one in boxes])).encode()


def squares(*corners: tuple[float, float], side: float = 10.0) -> Objects:
    """Squares at upper left corners."""
    coords = np.array([[x + dx, y + dy] for x, y in corners for dx, dy in ((0, 0), (side, 0), (side, side), (0, side))])
    count = len(corners)
    anchor = np.array([[y, x] for x, y in corners], np.int64)
    return Objects(
        "t",
        coords.astype(float),
        np.arange(0, 4 * count + 1, 4),
        np.arange(count + 1),
        np.zeros(count, np.int32),
        anchor,
    )


def test_tiles_touch_a_region_when_they_share_area() -> None:
    """A tile beside a region, edge to edge, has nothing of it."""
    regions = regions_of(geojson((100, 100, 200, 200), (500, 0, 510, 10)), "r")
    boxes = np.array([[0, 0, 100, 100], [0, 0, 101, 101], [200, 100, 300, 200], [400, 0, 600, 600]], float)
    assert regions.touched(boxes).tolist() == [False, True, False, True]
    assert regions.touched(boxes[:0]).tolist() == []


def test_a_single_object_is_kept_whole_by_its_centroid() -> None:
    """On the border counts as inside; a region that is drawn twice keeps an object once."""
    regions = regions_of(geojson((0, 0, 100, 100), (50, 50, 100, 100)), "r")
    kept = regions.single(squares((10, 10), (94, 10), (95, 10), (95.02, 10), (60, 60))).objects
    assert shapely.bounds(shapes(kept))[:, 0].tolist() == [10, 94, 95, 60]
    assert (shapely.area(shapes(kept)) == 100).all()


def test_areas_are_cut() -> None:
    """What of an area lies outside goes; an area between two regions becomes two."""
    regions = regions_of(geojson((0, 0, 4, 100), (6, 0, 100, 100)), "r")
    cut = regions.cut(squares((0, 0), (300, 300)))
    assert sorted(shapely.area(shapes(cut))) == [40, 40]
    assert len(regions.cut(squares())) == 0


def test_a_file_without_polygons_is_refused() -> None:
    """The error says what to draw."""
    with pytest.raises(AnnotationError, match="no polygon"):
        regions_of(b'{"type":"Point","coordinates":[1,2]}', "r")


def features(folder: Path) -> list[dict[str, Any]]:
    """Single objects of a published slide."""
    found = json.loads(gzip.decompress((folder / "result.geojson.gz").read_bytes()))["features"]
    return [one for one in found if one["properties"]["objectType"] == "detection"]


def test_a_run_works_only_in_its_regions(tiny_slide: Path, tmp_path: Path) -> None:
    """Fewer tiles are read, every object's centroid is inside; other regions are another question, the same are not."""
    region = (500, 300, 800, 500)
    file = tmp_path / "regions.geojson"
    file.write_bytes(geojson(region))
    told = {"output": tmp_path / "out", "tasks": "nuclei", "features": False, "regions": file}
    [some] = wsi_mmm.run(tiny_slide, **told).slides
    assert some.status == "done", some.error
    found = shapely.from_geojson([json.dumps(one["geometry"]) for one in features(tmp_path / "out" / some.id)])
    centres = shapely.get_coordinates(shapely.centroid(found))
    assert len(found) > 2 and shapely.intersects_xy(shapely.box(*region), *centres.T).all()
    assert (tmp_path / "out" / some.id / "overlay.png").exists()
    [again] = wsi_mmm.run(tiny_slide, **told).slides
    assert again.extra["resumed"] and again.objects == some.objects
    file.write_bytes(geojson((700, 300, 710, 310)))
    [other] = wsi_mmm.run(tiny_slide, **told, overlay=False).slides
    assert other.status == "done" and other.tiles <= 1 < some.tiles


@pytest.mark.parametrize(
    ("region", "message"),
    [((50_000, 300, 50_800, 800), "hold no pixel of the slide"), ((0, 0, 9, 9), "no tissue lies in its regions")],
    ids=["off the slide", "on glass"],
)
def test_regions_that_select_nothing_fail_the_slide(
    tiny_slide: Path, tmp_path: Path, region: tuple[int, int, int, int], message: str
) -> None:
    """An empty answer would look like a slide without objects; the message says where the regions lie."""
    (tmp_path / "regions.geojson").write_bytes(geojson(region))
    [row] = wsi_mmm.run(
        tiny_slide, output=tmp_path / "out", tasks="nuclei", features=False, regions=tmp_path / "regions.geojson",
        tissue=str(_tissue_file(tmp_path)),
    ).slides  # fmt: skip
    assert row.status == "failed" and message in row.error


def _tissue_file(folder: Path) -> Path:
    """Tissue in the middle of the slide only, so that its corner is glass."""
    (folder / "tissue.geojson").write_bytes(geojson((800, 600, 1000, 800)))
    return folder / "tissue.geojson"
