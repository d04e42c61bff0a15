"""Regions cut by block borders become whole again, however they were cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from helpers.shapes import polygons, regions
from wsi_mmm.outputs.merge import canonical, merge_regions
from wsi_mmm.outputs.polygons import empty, sort_by_anchor
from wsi_mmm.types import I32, Objects

label_images = arrays(
    np.int32, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=18), elements=st.integers(0, 2)
)
cuts = st.sets(st.integers(1, 17), max_size=4)


def assert_same(a: Objects, b: Objects) -> None:
    for name in ("coords", "ring_offsets", "object_offsets", "class_index", "anchor"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.measurements.keys() == b.measurements.keys()
    for name, values in a.measurements.items():
        np.testing.assert_array_equal(values, b.measurements[name])


@given(label_images, cuts, cuts, st.randoms(use_true_random=False))
def test_the_cut_leaves_no_trace(labels: I32, rows: set[int], columns: set[int], random: object) -> None:
    """Any partition in blocks, in any order, gives the very arrays that tracing the whole image gives."""
    height, width = labels.shape
    ys, xs = ([0, *sorted(c for c in cut if c < n), n] for cut, n in ((rows, height), (columns, width)))
    parts = [regions(labels[a:b, c:d], c, a) for a, b in pairwise(ys) for c, d in pairwise(xs)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    whole = sort_by_anchor(canonical(regions(labels)))
    assert_same(merge_regions(parts), whole)


def test_anchors_are_the_first_pixels() -> None:
    """An anchor is the (y, x) of the region's topmost, then leftmost pixel, and objects are sorted by it."""
    labels = np.zeros((6, 6), np.int32)
    labels[1:3, 2:5] = 1
    labels[4, 1] = 2
    merged = merge_regions([regions(labels[:, :3]), regions(labels[:, 3:], 3)])
    assert merged.anchor.tolist() == [[1, 2], [4, 1]]
    assert merged.measurements["pixels"].tolist() == [6, 1]


def test_nothing_to_merge() -> None:
    """No parts and empty parts give no objects."""
    assert len(merge_regions([])) == 0
    assert len(merge_regions([empty("t"), empty("t")])) == 0


def test_what_is_not_on_whole_pixels_is_refused() -> None:
    """Scaled or slanted outlines are a mistake of the caller and are named."""
    with pytest.raises(ValueError, match="whole target pixels"):
        merge_regions([polygons([(0, 0), (2.5, 0), (2.5, 2), (0, 2)])])
