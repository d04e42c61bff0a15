"""Label images become valid polygons, and the polygons are the label image."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.ndimage import label

from wsi_mmm.outputs.polygons import following_points, ring_areas, shapes
from wsi_mmm.outputs.trace import Style, trace
from wsi_mmm.types import I32, Objects

label_images = arrays(
    np.int32, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14), elements=st.integers(0, 2)
)


def as_objects(labels: I32, style: Style) -> Objects:
    rings = trace(labels, style)
    n = len(rings)
    return Objects(
        "t", rings.coords, rings.ring_offsets, rings.object_offsets, rings.labels, np.zeros((n, 2), np.int64)
    )


@given(label_images)
def test_exact_polygons_cover_exactly_their_pixels(labels: I32) -> None:
    """Exact polygons are valid, hold the middle of every pixel of their label and of no other, and conserve area."""
    found = as_objects(labels, "exact")
    polygons = shapes(found)
    assert shapely.is_valid(polygons).all()
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
    for value in (1, 2):
        mine = polygons[found.class_index == value]
        assert len(mine) == label(labels == value)[1]
        inside = [shapely.contains_xy(polygon, x, y) for polygon in mine]
        np.testing.assert_array_equal(
            np.any(inside, axis=0) if len(mine) else np.zeros_like(labels, bool), labels == value
        )
        assert shapely.area(mine).sum() == (labels == value).sum()


@given(label_images)
def test_smooth_polygons_are_valid_and_never_overlap(labels: I32) -> None:
    """Smooth polygons: one per 4-connected component, valid, disjoint."""
    found = as_objects(labels, "smooth")
    polygons = shapes(found)
    assert len(polygons) == sum(label(labels == value)[1] for value in (1, 2))
    assert shapely.is_valid(polygons).all()
    assert shapely.union_all(polygons).area == pytest.approx(shapely.area(polygons).sum())


@given(label_images, st.sampled_from(["exact", "smooth"]))
def test_rings_are_written_as_the_format_wants(labels: I32, style: Style) -> None:
    """Exteriors are counter-clockwise, holes clockwise, rings open, without collinear points; sorted by label."""
    found = as_objects(labels, style)
    hole = np.ones(len(found.ring_offsets) - 1, bool)
    hole[found.object_offsets[:-1]] = False
    np.testing.assert_array_equal(ring_areas(found) < 0, hole)
    following = following_points(found)
    step = found.coords[following] - found.coords
    assert (step[:, 0] * step[following, 1] - step[:, 1] * step[following, 0] != 0).all()
    assert (np.sort(following) == np.arange(len(following))).all()
    assert (np.diff(found.class_index) >= 0).all()


def test_a_single_pixel() -> None:
    """One pixel is a unit square (exact) or the diamond of its sides' middles (smooth)."""
    labels = np.zeros((3, 3), np.int32)
    labels[1, 1] = 7
    assert trace(labels, "exact").coords.tolist() == [[1, 1], [2, 1], [2, 2], [1, 2]]
    assert trace(labels).coords.tolist() == [[1.5, 1], [2, 1.5], [1.5, 2], [1, 1.5]]
    assert trace(labels).labels.tolist() == [7]


def test_a_hole_in_a_hole() -> None:
    """A ring, a ring inside its hole, a dot inside that one's hole: each object gets its own hole only."""
    labels = np.ones((9, 9), np.int32)
    labels[1:8, 1:8] = 0
    labels[2:7, 2:7] = 1
    labels[3:6, 3:6] = 0
    labels[4, 4] = 1
    rings = trace(labels, "exact")
    assert np.diff(rings.object_offsets).tolist() == [2, 2, 1]


@pytest.mark.parametrize("labels", [np.zeros((4, 5), np.int32), np.zeros((0, 0), np.int32), -np.ones((2, 2), np.int32)])
def test_no_object(labels: I32) -> None:
    """Background, an empty image and negative labels give no rings."""
    assert len(trace(labels)) == 0
