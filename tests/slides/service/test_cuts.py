"""Cells of a level, and the pictures that bring them."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_mmm.slides.resample.scaled import sources_of
from wsi_mmm.slides.resample.tiled import Tiling
from wsi_mmm.slides.service.cuts import GRID_CUTS, RECTANGLE_CUTS, rectangles
from wsi_mmm.types import Level


def cells(width: int, height: int) -> Tiling:
    return Tiling(sources_of((Level(width, height, 1.0, 1.0, 256, 256),))[0], 256, 256)


@pytest.mark.parametrize("most", [1, 9 * 256**2, 10**9])
def test_cells_are_cut_into_rectangles_that_hold_each_once(most: int) -> None:
    """Whatever their pattern: full rectangles, none larger than allowed, and nothing else in them."""
    tiling = cells(20 * 256, 17 * 256 - 5)
    for seed in range(20):
        numbers = np.flatnonzero(np.random.default_rng(seed).random(20 * 17) < 0.05 * (seed + 1)).tolist()
        found = rectangles(numbers[::-1], tiling, most)
        assert sorted(number for one in found for number in one) == numbers
        for one in found:
            rows, columns = np.divmod(one, tiling.columns)
            assert len(one) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) and one == sorted(one)
            assert len(one) == 1 or len(one) * 256**2 <= most


def test_a_full_block_is_as_few_as_can_be() -> None:
    """8 x 8 cells of 64 Ki px are two pictures of 2 megapixels; with a gap between rows they are not one."""
    numbers = [row * 20 + column for row in range(3, 11) for column in range(5, 13)]
    assert [len(one) for one in rectangles(numbers, cells(5120, 5120), 2 << 20)] == [32, 32]
    assert rectangles([0, 40], cells(5120, 5120), 2 << 20) == [[0], [40]]


def test_small_levels_are_one_picture_and_cells_are_whole_native_tiles() -> None:
    """Up to 4 megapixels; beyond, about 1024 px on the grid and about 256 px in rectangles."""
    for cuts, side, mark in ((GRID_CUTS, 960, 1024), (RECTANGLE_CUTS, 240, 256)):
        assert cuts.sides(Level(2048, 2048, 1, 1, 256, 256)) == (2048, 2048)
        large = Level(9999, 9999, 1, 1, 240, 240)
        assert cuts.sides(large) == (side, side) and cuts.fingerprint_side(large) == mark
    assert GRID_CUTS.pictures([3, 4], cells(5120, 5120)) == [[3], [4]]
    assert RECTANGLE_CUTS.pictures([3, 4], cells(5120, 5120)) == [[3, 4]]
