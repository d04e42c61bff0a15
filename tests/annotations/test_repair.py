"""Outlines that cross themselves, have millions of corners or lie too close: thinned, repaired, or refused in time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import shapely

from wsi_mmm.annotations import parse_shapes, rasterise
from wsi_mmm.annotations import repair as repairs
from wsi_mmm.errors import AnnotationError
from wsi_mmm.outputs.inside import regions_of
from wsi_mmm.types import F64

TURN = 2 * np.pi


def outline(xy: F64, *holes: F64) -> bytes:
    """A file of one polygon."""
    rings = [np.concatenate([ring, ring[:1]]).tolist() for ring in (xy, *holes)]
    return json.dumps({"type": "Polygon", "coordinates": rings}).encode()


def circle(corners: int, radius: float, at: float = 500.0) -> F64:
    angle = np.arange(corners) * TURN / corners
    return np.stack([at + radius * np.cos(angle), at + radius * np.sin(angle)], axis=1)


def scribble(corners: int) -> F64:
    """Random corners: the outline crosses itself about every second time that it may."""
    return np.random.default_rng(corners).random((corners, 2)) * 900


def test_an_outline_that_crosses_itself_a_million_times_is_refused_in_time() -> None:
    """The line says how often it may."""
    with pytest.raises(AnnotationError, match=r"^x: outlines cross themselves more than 50,000 times.*object 0"):
        parse_shapes(outline(scribble(3000)), "x")


def test_the_crossings_of_all_outlines_of_a_file_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many scribbles are as much work as a large one."""
    monkeypatch.setattr(repairs, "_FEW", 10)
    one = json.loads(outline(scribble(40)))
    count = repairs.count_crossings([shapely.from_geojson(json.dumps(one))])
    monkeypatch.setattr(repairs, "MAX_CROSSINGS", 3 * count)
    assert parse_shapes(json.dumps([one] * 3).encode(), "x").repaired == 3
    with pytest.raises(AnnotationError, match="object 3"):
        parse_shapes(json.dumps([one] * 4).encode(), "x")


def test_crossings_are_counted_as_shapely_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """All edges, or a sample of them, against every pair."""
    monkeypatch.setattr(repairs, "_FEW", 10)
    xy = scribble(120)
    edges = shapely.linestrings(np.stack([xy, np.roll(xy, -1, axis=0)], axis=1))
    true = int(shapely.crosses(edges[:, None], edges[None]).sum()) // 2
    assert repairs.count_crossings([shapely.polygons(xy)]) == true
    monkeypatch.setattr(repairs, "_SAMPLE", 60)
    assert repairs.count_crossings([shapely.polygons(xy)]) == pytest.approx(true, rel=0.25)
    assert repairs.count_crossings([shapely.polygons(circle(120, 400.0)), None]) == 0


def test_regions_that_cross_each_other_too_often_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is valid by itself; uniting them would be the work."""
    monkeypatch.setattr(repairs, "MAX_CROSSINGS", 1000)
    bars = [shapely.box(0, n, 500, n + 0.5) for n in range(60)] + [shapely.box(n, 0, n + 0.5, 500) for n in range(60)]
    data = json.dumps([json.loads(shapely.to_geojson(bar)) for bar in bars]).encode()
    assert len(parse_shapes(data, "x")) == 120
    with pytest.raises(AnnotationError, match=r"^x: its outlines cross each other some"):
        regions_of(data, "x")


def test_an_outline_of_many_vertices_is_thinned_by_less_than_half_a_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holes, too; where they are smaller than that, they go."""
    monkeypatch.setattr(repairs, "MANY_VERTICES", 1000)
    rings = circle(20_000, 300.0), circle(9000, 50.0), circle(1000, 0.01, at=700.1)
    (item,) = parse_shapes(outline(*rings), "x")
    assert shapely.get_num_coordinates(item.geometry) < 12_000
    true = shapely.polygons(rings[0], [rings[1]])
    assert item.geometry.area == pytest.approx(true.area, rel=1e-3)
    away = shapely.distance(item.geometry.boundary, shapely.points(np.concatenate(rings[:2])[::200]))
    assert away.max() < 0.5 and shapely.get_num_interior_rings(item.geometry) == 1
    assert item.geometry.is_valid


def test_fewer_vertices_than_many_stay_as_they_are() -> None:
    """Not one of 5,000 is moved."""
    xy = circle(5000, 10.0)
    (item,) = parse_shapes(outline(xy), "x")
    assert np.array_equal(shapely.get_coordinates(item.geometry)[:-1], xy)


@pytest.mark.parametrize(("bound", "value", "named"), [
    ("MAX_VERTICES", 500, "more than 500 vertices"),
    ("MAX_NEAR", 10_000, "too close together"),
])  # fmt: skip
def test_what_cannot_be_thinned_is_refused(monkeypatch: pytest.MonkeyPatch, bound: str, value: int, named: str) -> None:
    """A comb whose slanting teeth lie on each other's extents: valid, and a search for crossings visits all pairs."""
    monkeypatch.setattr(repairs, "MANY_VERTICES", 500)
    monkeypatch.setattr(repairs, bound, value)
    teeth = np.arange(1000.0)
    comb = np.stack([teeth + np.where(teeth % 2, 600, 0), np.where(teeth % 2, 10.0, 900.0)], axis=1)
    with pytest.raises(AnnotationError, match=f"^x: object 0 .*{named}"):
        parse_shapes(outline(np.concatenate([comb, [[2000.0, 1000.0], [-5.0, 1000.0]]])), "x")


def test_a_hundred_thousand_corners_are_drawn_at_once() -> None:
    """Every px was asked about every corner."""
    shapes = parse_shapes(outline(circle(100_000, 400.0)), "x")
    mask = rasterise(shapes, (1000, 1000), scale_x=1.0, scale_y=1.0)
    assert mask.sum() == pytest.approx(np.pi * 400**2, rel=0.01)


def test_outlines_longer_than_a_mask_is_wide_a_thousand_times_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the length, and the way out."""
    monkeypatch.setattr("wsi_mmm.annotations.fill.MAX_OUTLINE_PX", 3000)
    small = parse_shapes(outline(circle(64, 100.0)), "x")
    assert rasterise(small, (1000, 1000), scale_x=1.0, scale_y=1.0).any()
    large = parse_shapes(outline(circle(64, 490.0)), "x")
    with pytest.raises(AnnotationError, match=r"^x: its outlines are 3.1e\+03 px long .*mask picture"):
        rasterise(large, (1000, 1000), scale_x=1.0, scale_y=1.0, name="x")


def test_rings_in_the_wrong_sequence_are_a_ring_with_a_hole() -> None:
    """The hole first, then the outline: nothing would be left of it."""
    inner, outer = shapely.box(20, 20, 60, 60), shapely.box(0, 0, 100, 100)
    rings: list[Any] = [list(one.exterior.coords) for one in (inner, outer)]
    (item,) = parse_shapes(json.dumps({"type": "Polygon", "coordinates": rings}).encode(), "x")
    assert item.geometry.equals(outer - inner)
