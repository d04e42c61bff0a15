"""Ragged polygons: taking, joining, thinning, clipping, and rounding that stays valid."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from helpers.shapes import areas, ellipses, polygons, regions
from wsi_mmm.outputs.polygons import clip, concat, empty, part, round_valid, shapes, simplify, take

RING = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 2, 1], [1, 1, 1, 1]])


@given(st.integers(0, 2**32 - 1), st.integers(3, 9), st.sampled_from([0.01, 0.1, 3.0]))
def test_rounded_geometry_is_valid(seed: int, corners: int, size: float) -> None:
    """Whatever goes in (self-crossing scribbles, specks), what comes out is valid with two decimals, turned right."""
    rng = np.random.default_rng(seed)
    some = polygons(*(rng.uniform(0, size, (corners, 2)) + 50 for _ in range(12)))
    done = round_valid(some)
    assert shapely.is_valid(shapes(done.objects)).all()
    np.testing.assert_array_equal(np.round(done.objects.coords, 2), done.objects.coords)
    assert (areas(done.objects) > 0).all()
    assert len(np.unique(done.objects.anchor, axis=0)) + done.dropped == len(some)
    assert (np.diff(done.objects.anchor[:, 0]) >= 0).all()


def test_good_geometry_is_left_alone() -> None:
    """Objects that are fine keep their number, order, holes and measurements."""
    some = ellipses(50)
    done = round_valid(some)
    assert (done.repaired, done.dropped) == (0, 0)
    np.testing.assert_allclose(done.objects.coords, some.coords, atol=0.00501)
    assert done.objects.measurements["area"].tolist() == some.measurements["area"].tolist()
    assert len(round_valid(regions(RING)).objects.ring_offsets) - 1 == 3


def test_a_bow_tie_becomes_its_two_triangles() -> None:
    """A polygon that crosses itself is repaired into valid parts with the same measurement."""
    done = round_valid(polygons([(0, 0), (4, 4), (4, 0), (0, 4)], area=[8.0]))
    assert done.repaired == 1
    assert len(done.objects) == 2
    assert done.objects.measurements["area"].tolist() == [8.0, 8.0]


@pytest.mark.parametrize(
    "bad", [[(0, 0), (1, 0), (1, 0)], [(0, 0), (9, 0), (np.nan, 9)], [(0, 0), (9, 0), (5, 0.001)], []]
)
def test_what_is_no_polygon_is_dropped(bad: list[tuple[float, float]]) -> None:
    """Collapsed, unfinished, sliver-thin and empty outlines go, and are counted."""
    done = round_valid(polygons([(0, 0), (9, 0), (9, 9)], bad))
    assert (len(done.objects), done.dropped) == (1, 1)


def test_nothing_may_be_left() -> None:
    """Objects that all collapse are dropped and counted, and none at all are none."""
    done = round_valid(polygons([(0, 0), (0.001, 0), (0, 0.001)]))
    assert (len(done.objects), done.dropped) == (0, 1)
    assert len(round_valid(empty("t")).objects) == len(shapes(empty("t"))) == 0


def test_clip_cuts_at_the_edge_and_keeps_the_rest() -> None:
    """What crosses the border is cut, what lies beyond goes, what lies inside is untouched; order by anchor stays."""
    box = np.array([(0, 0), (4, 0), (4, 4), (0, 4)])
    some = polygons(box, *(np.add(box, move) for move in ((8, 0), (20, 0), (2, 2))))
    done = clip(some, 10, 10)
    assert done.anchor[:, 0].tolist() == [0, 1, 3]
    assert areas(done).tolist() == [16, 8, 16]
    assert clip(polygons(box), 10, 10).coords.tolist() == box.tolist()


def test_simplify_keeps_shape_within_the_tolerance() -> None:
    """Fewer corners, outlines at most about the tolerance away, the same objects."""
    some = ellipses(40, corners=60)
    thin = simplify(some, 0.5)
    assert len(thin) == 40
    assert len(thin.coords) < 0.8 * len(some.coords)
    assert shapely.hausdorff_distance(shapes(some), shapes(thin)).max() <= 1.0
    assert simplify(some, 0) is some
    assert len(simplify(empty("t"), 1.0)) == 0


def test_take_and_concat_are_inverse() -> None:
    """Taking objects apart and joining them gives the same arrays; a measurement that one part lacks is NaN there."""
    some = regions(RING)
    again = concat([part(some, 0, 1), take(some, np.array([1]))])
    np.testing.assert_array_equal(again.coords, some.coords)
    np.testing.assert_array_equal(again.ring_offsets, some.ring_offsets)
    both = concat([polygons([(0, 0), (1, 0), (1, 1)], a=[1.0]), polygons([(0, 0), (1, 0), (1, 1)])])
    np.testing.assert_array_equal(both.measurements["a"], [1.0, np.nan])
    assert take(some, np.array([False, True])).class_index.tolist() == [1]
