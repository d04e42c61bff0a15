"""Blending: integers, order-free, and exact where tiles agree."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wsi_mmm.tasks.window import blend, window_weights


def test_weights_rise_from_one_at_the_rim_to_the_overlap() -> None:
    """The window is symmetric, 1 in the corners and flat in the middle."""
    w = window_weights(8, 3)
    assert w.dtype == np.int32
    assert w[0, 0] == 1
    assert w[4, 4] == 9
    assert (w == w.T).all()
    assert (w == w[::-1]).all()


@given(st.integers(0, 2**32), st.integers(0, 6))
def test_blending_does_not_depend_on_order_or_grouping(seed: int, overlap: int) -> None:
    """Tiles in any order give the same bytes, and a constant stays that constant wherever it is covered."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (7, 2, 12, 12), np.uint8)
    where = rng.integers(-6, 26, (7, 2))
    weights = window_weights(12, overlap)
    one = blend(tiles, where, shape=(30, 28), weights=weights)
    order = rng.permutation(7)
    assert (one == blend(tiles[order], where[order], shape=(30, 28), weights=weights)).all()
    flat = blend(np.full_like(tiles, 77), where, shape=(30, 28), weights=weights)
    assert set(np.unique(flat).tolist()) <= {0, 77}


def test_blending_is_local() -> None:
    """A window of the plane gets the bytes that the whole plane has there."""
    rng = np.random.default_rng(0)
    where = np.array([(r * 9, c * 9) for r in range(4) for c in range(4)])
    tiles = rng.integers(0, 256, (16, 3, 12, 12), np.uint8)
    weights = window_weights(12, 3)
    whole = blend(tiles, where, shape=(39, 39), weights=weights)
    part = blend(tiles, where - (7, 5), shape=(20, 21), weights=weights)
    assert (whole[:, 7:27, 5:26] == part).all()


def test_uncovered_px_are_zero() -> None:
    """No tiles, no values."""
    assert not blend(
        np.zeros((0, 1, 4, 4), np.uint8), np.zeros((0, 2), np.int64), shape=(5, 5), weights=window_weights(4, 1)
    ).any()
