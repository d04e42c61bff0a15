"""The compiled averages: the same integers as a plain sum, whatever the number of weights and the memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from helpers.resampled import resample
from wsi_mmm.slides.resample import kernels
from wsi_mmm.slides.resample.weights import average_rows, taps
from wsi_mmm.types import I64, U8


def plain(source: U8, axes: tuple[tuple[I64, I64], tuple[I64, I64]]) -> U8:
    """Two sums of integers, then one rounding."""
    (first_y, weight_y), (first_x, weight_x) = axes
    rows = first_y[:, None] + np.arange(weight_y.shape[1])
    columns = first_x[:, None] + np.arange(weight_x.shape[1])
    down = (source[rows].astype(np.int64) * weight_y[:, :, None, None]).sum(axis=1)
    both = (down[:, columns] * weight_x[None, :, :, None]).sum(axis=2)
    return ((both + (1 << 15)) >> 16).astype(np.uint8)


def weights(rng: np.random.Generator, count: int, number: int, size: int) -> tuple[I64, I64]:
    """Random weights that sum to 256 and random ascending places for them."""
    first = np.sort(rng.integers(0, size - number + 1, count))
    cuts = np.sort(rng.integers(0, 257, (count, number - 1)), axis=1)
    edges = np.concatenate([np.zeros((count, 1), int), cuts, np.full((count, 1), 256)], axis=1)
    return first.astype(np.int64), np.diff(edges, axis=1)


@pytest.mark.parametrize("down", [2, 3, 5, 9])
@pytest.mark.parametrize("across", [2, 3, 4, 5, 6, 7, 11])  # 2, 4 and 6 in vectors
def test_sums_are_exact_for_any_number_of_weights(down: int, across: int) -> None:
    """Vectors, and what is done one pixel at a time, agree with plain integers; bytes beside the target are left."""
    rng = np.random.default_rng(down * 100 + across)
    source = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
    y, x = weights(rng, 21, down, 60), weights(rng, 19, across, 70)
    frame = np.full((21, 19 * 3 + 10), 77, np.uint8)
    target = np.lib.stride_tricks.as_strided(frame[:, 5:], (21, 19, 3), (frame.strides[0], 3, 1))
    sums = np.zeros((kernels.ROWS, 70 * 3 + kernels.PAD), np.uint16)
    band = np.zeros((kernels.ROWS, 19 * 3 + kernels.PAD), np.uint8)
    y32, x32 = y[1].astype(np.uint32), x[1].astype(np.uint32)
    above, edge = np.empty((0, 210), np.uint8), np.empty((21, 0), np.uint16)
    places = kernels.target_places(np.array([[0, 0]]), [target])
    kernels.average_tile(source, above, edge, y[0], y32, x[0], x32, places, (0, 0), (0, 70), sums, band)
    assert np.array_equal(target, plain(source, (y, x)))
    assert (frame[:, :5] == 77).all()
    assert (frame[:, -5:] == 77).all()


def test_pixels_go_to_every_place_that_they_lie_in() -> None:
    """Places overlap, reach beyond what is averaged, or lie aside of it: each gets its part, and no more."""
    rng = np.random.default_rng(4)
    source = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    y, x = taps(0, 20, 1.9), taps(0, 25, 1.9)
    whole = resample(source[: y.stop, : x.stop], y, x)
    xy = np.array([[0, 0], [5, 3], [-4, -6], [18, 12], [40, 2], [3, 30]])
    out = [np.full((13, 13, 3), 77, np.uint8) for _ in xy]
    sums = np.zeros((kernels.ROWS, 50 * 3 + kernels.PAD), np.uint16)
    band = np.zeros((kernels.ROWS, 25 * 3 + kernels.PAD), np.uint8)
    above, edge = np.empty((0, 150), np.uint8), np.empty((20, 0), np.uint16)
    kernels.average_tile(source, above, edge, y.begin, y.weight, x.begin, x.even_weight(),
                         kernels.target_places(xy, out), (0, 0), (0, 50), sums, band)  # fmt: skip
    frame = np.full((60, 70, 3), 77, np.uint8)
    frame[10:30, 10:35] = whole
    for (left, top), one in zip(xy.tolist(), out, strict=True):
        assert np.array_equal(one, frame[10 + top : 23 + top, 10 + left : 23 + left])


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_one_colour_stays_that_colour(value: int) -> None:
    """No weight is lost, and nothing overflows at white."""
    source = np.full((40, 40, 3), value, np.uint8)
    for scale in (0.4, 1.3, 1.9, 3.0, 6.7):
        axis = taps(1, int(30 / scale), scale)
        got = resample(source[axis.first : axis.stop, axis.first : axis.stop], axis, axis)
        assert (got == value).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_pictures_smaller_than_the_weights_are_many_are_read_within_their_bounds(shape: tuple[int, int]) -> None:
    """A picture of one row or column has one weight where two are the rule."""
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    y, x = taps(0, shape[0], 1.0), taps(0, shape[1], 1.0)
    assert np.array_equal(resample(source, y, x), source)


def test_rows_may_come_a_few_at_a_time() -> None:
    """What is complete is written; the rest when its rows are there: the same picture."""
    rng = np.random.default_rng(3)
    source = rng.integers(0, 256, (90, 50, 3), dtype=np.uint8)
    y, x = taps(0, 47, 1.9), taps(0, 26, 1.9)
    out, done = np.zeros((47, 26, 3), np.uint8), 0
    for bottom in (10, 11, 40, 88, y.stop):
        stop = y.count_complete(bottom)
        assert stop >= done
        average_rows(source[:bottom], 0, (y, x), (done, stop), out)
        done = stop
    assert done == 47
    assert np.array_equal(out, resample(source[: y.stop, : x.stop], y, x))


@pytest.mark.parametrize("scale", [1.0, 1.3, 1.9011, 2.0, 2.6, 4.7])
def test_tile_after_tile_is_the_whole_picture(scale: float) -> None:
    """Sums over the edges of tiles are finished by the next tile: right of it, and below."""
    rng = np.random.default_rng(5)
    picture, side = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8), 32
    y, x = taps(1, int(90 / scale), scale), taps(2, int(110 / scale), scale)
    want = resample(picture[y.first : y.stop, x.first : x.stop], y, x)
    out = np.zeros((len(y.begin), len(x.begin), 3), np.uint8)
    places = kernels.target_places(np.array([[0, 0]]), [out])
    band = np.zeros((kernels.ROWS, 3 * len(x.begin) + kernels.PAD), np.uint8)
    sums = np.zeros((kernels.ROWS, 3 * (x.taps + side) + kernels.PAD), np.uint16)
    above = np.zeros((128 // side, y.taps, 3 * side), np.uint8)
    row_stops = [0, *(y.count_complete(bottom) for bottom in (32, 64, 96))]
    column_stops = [0, *(x.count_complete(right) for right in (32, 64, 96, 128))]
    for row, (r0, r1) in enumerate(pairwise(row_stops)):
        edge = np.zeros((r1 - r0, 3 * x.taps), np.uint16)
        for column, (k0, k1) in enumerate(pairwise(column_stops)):
            tile = np.ascontiguousarray(picture[row * side : (row + 1) * side, column * side : (column + 1) * side])
            kernels.average_tile(
                tile, above[column], edge, y.begin[r0:r1] - row * side, y.weight[r0:r1],
                x.begin[k0:k1] - (column * side - x.taps), x.even_weight()[k0:k1], places, (r0, k0), (0, side), sums,
                band,
            )  # fmt: skip
    assert np.array_equal(out, want)
