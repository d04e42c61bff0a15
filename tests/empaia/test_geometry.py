"""Findings become shapes that lie on the slide in whole px, without holes, and keep their area."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from helpers.empaia_schemas import item_problems
from wsi_mmm.empaia import geometry
from wsi_mmm.empaia.bodies import Annotation, Polygon, Wsi, body

WSI = Wsi("w", 100, 60, 250.0)
NUMBERS = st.floats(-50, 200, allow_nan=False)
RINGS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=9)
SQUARE = np.array([[10.0, 10], [50, 10], [50, 50], [10, 50]])


def _area(polygons: list[Polygon]) -> float:
    return float(sum(shapely.Polygon(polygon.corners).area for polygon in polygons))


@given(RINGS, st.booleans())
def test_any_ring_becomes_bodies_the_platform_accepts(ring: list[tuple[float, float]], keep_holes: bool) -> None:
    """Whatever the ring, crossing itself or half outside: polygons are valid, on the slide, and accepted."""
    for polygon in geometry.polygons([np.array(ring)], WSI, keep_holes=keep_holes):
        shape = shapely.Polygon(polygon.corners)
        assert shape.is_valid and shape.area > 0
        assert item_problems(body(Annotation("a", polygon, WSI, 250.0), "job")) == []


@given(st.lists(st.tuples(st.integers(12, 45), st.integers(12, 45), st.integers(1, 6), st.booleans()), max_size=8))
def test_holes_are_cut_open_without_losing_area(holes: list[tuple[int, int, int, bool]]) -> None:
    """A region with holes (squares and triangles, one px wide ones too) becomes polygons without holes: the same px."""
    cut_out = [
        shapely.Polygon([(x, y), (x + size, y), (x + size, y + size)] + ([(x, y + size)] if square else []))
        for x, y, size, square in holes
    ]
    want = shapely.difference(shapely.Polygon(SQUARE), shapely.union_all(cut_out)) if holes else shapely.Polygon(SQUARE)
    for part in shapely.get_parts(want):
        rings = [shapely.get_coordinates(ring)[:-1] for ring in (part.exterior, *part.interiors)]
        found = geometry.polygons(rings, WSI, keep_holes=True)
        union = shapely.union_all([shapely.Polygon(polygon.corners) for polygon in found])
        # a slanted edge may move by half a px where a cut meets it between two px
        slack = 0.0 if all(square for *_, square in holes) else 1.0 + 2.0 * len(holes)
        assert shapely.symmetric_difference(union, part).area <= slack
        assert abs(_area(found) - union.area) < 1e-6


def test_an_object_stays_one_object() -> None:
    """Without keep_holes a nucleus with a hole is filled, and one that the edge cuts in two is its larger part."""
    hole = np.array([[20.0, 20], [30, 20], [30, 30], [20, 30]])
    assert _area(geometry.polygons([SQUARE, hole], WSI, keep_holes=False)) == 1600.0
    horns = np.array([[-10.0, 0], [20, 0], [20, 10], [-5, 10], [-5, 20], [10, 20], [10, 30], [-10, 30]])
    assert [_area(geometry.polygons([horns], WSI, keep_holes=keep)) for keep in (False, True)] == [200.0, 300.0]


@pytest.mark.parametrize(
    "ring",
    [
        np.array([[200.0, 0], [210, 0], [210, 10]]),
        np.array([[0.0, 0], [math.nan, 0], [5, 5]]),
        np.array([[0.0, 0], [0.2, 0], [0.2, 0.2]]),
        np.zeros((2, 2)),
    ],
    ids=["outside", "NaN", "smaller than a px", "two corners"],
)
def test_what_leaves_nothing_is_empty(ring: np.ndarray) -> None:
    """Rings outside the slide, not finite, or without area after rounding give no polygon."""
    assert geometry.polygons([ring], WSI, keep_holes=True) == []
