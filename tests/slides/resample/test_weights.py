"""Area averaging: exact values, and pixels that do not depend on how the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.area import area_average
from helpers.resampled import resample
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.slides.resample.weights import Taps, taps
from wsi_mmm.types import U8, Block


def picture(height: int, width: int, seed: int = 0) -> U8:
    """Return noise, the hardest picture to average."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=30)
@given(st.floats(1.0, 9.0), st.floats(1.0, 9.0), st.floats(0, 3))
def test_averages_are_close_to_the_float_integral(sy: float, sx: float, origin: float) -> None:
    """Weights of 1/256 and one rounding cost half a grey level on average, a quarter on the mean."""
    image = picture(130, 140)
    y, x = taps(0, int(120 / sy), sy, origin), taps(0, int(130 / sx), sx, origin)
    got = resample(image[y.first : y.stop, x.first : x.stop], y, x)
    want = area_average(image, (int(120 / sy), int(130 / sx)), (sy, sx), (origin, origin))
    assert np.abs(got - want).max() < 2.5  # noise is the worst case
    assert np.abs(got - want).mean() < 0.6
    assert abs((got - want).mean()) < 0.3


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_powers_of_two_are_the_exact_mean_rounded_half_up(factor: int) -> None:
    """The general path gives what a reshape and a mean would."""
    image = picture(64, 96)
    y, x = taps(0, 64 // factor, factor), taps(0, 96 // factor, factor)
    boxes = image.reshape(64 // factor, factor, 96 // factor, factor, 3).sum(axis=(1, 3), dtype=np.int64)
    assert np.array_equal(resample(image, y, x), (boxes + factor**2 // 2) // factor**2)


@settings(max_examples=60)
@given(st.floats(0.3, 12.0), st.integers(-50, 200), st.integers(1, 40), st.floats(0, 5000))
def test_weights_of_a_pixel_sum_to_one_and_depend_on_its_absolute_index_only(
    scale: float, start: int, count: int, origin: float
) -> None:
    """Every output pixel has whole weight, and the same taps in whatever block it is read."""
    block, single = taps(start, count, scale, origin), taps(start + count - 1, 1, scale, origin)
    assert (block.weight.sum(axis=1) == 256).all()
    for axis in (block, single):
        assert axis.begin.min() >= axis.first
        assert axis.begin.max() + axis.taps <= max(axis.stop, axis.first + axis.taps)
    assert weights_of_last(block) == weights_of_last(single)


def weights_of_last(axis: Taps) -> dict[int, int]:
    """Source px and weight of the last output pixel."""
    weight = axis.weight[-1].tolist()
    return {int(axis.begin[-1]) + t: w for t, w in enumerate(weight) if w}


@settings(max_examples=25)
@given(st.data())
def test_any_block_has_the_same_bits_as_the_whole(data: st.DataObject) -> None:
    """A pixel does not depend on the block it is read in, nor do white borders."""
    reader = ArrayReader(picture(97, 113))
    sx, sy = data.draw(st.floats(0.6, 5.0)), data.draw(st.floats(0.6, 5.0))
    ox, oy = data.draw(st.integers(-20, 40)), data.draw(st.integers(-20, 40))
    whole = reader.read(Block(-5, -5, 60, 60, sx, sy, ox, oy)).pixels
    x, y = data.draw(st.integers(-5, 50)), data.draw(st.integers(-5, 50))
    width, height = data.draw(st.integers(1, 55 - x)), data.draw(st.integers(1, 55 - y))
    part = reader.read(Block(x, y, width, height, sx, sy, ox, oy)).pixels
    assert np.array_equal(part, whole[y + 5 : y + 5 + height, x + 5 : x + 5 + width])


def test_large_reads_are_cut_into_parts_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounding the memory of a read changes no pixel."""
    reader, block = ArrayReader(picture(300, 400)), Block(0, 0, 130, 90, 2.7, 3.1)
    whole = reader.read(block).pixels
    monkeypatch.setattr("wsi_mmm.slides.resample.scaled._CANVAS_PIXELS", 2000)
    assert np.array_equal(reader.read(block).pixels, whole)


def test_outside_is_white_and_the_edge_mixes_by_area() -> None:
    """A target pixel half on the slide is half white."""
    reader = ArrayReader(np.zeros((10, 10, 3), np.uint8))
    pixels = reader.read(Block(-1, 0, 5, 1, 4.0, 4.0)).pixels[0, :, 0]
    assert pixels.tolist() == [255, 0, 0, 128, 255]


def test_enlarging_interpolates_between_pixel_centres_and_repeats_the_edge() -> None:
    """Bilinear, centres at half px: the first and last pixels are not mixed with the white outside."""
    image = np.repeat(np.array([[0, 100, 200]], np.uint8)[..., None], 3, axis=2)
    pixels = ArrayReader(image).read(Block(0, 0, 6, 2, 0.5, 0.5)).pixels[0, :, 0]
    assert pixels.tolist() == [0, 25, 75, 125, 175, 200]


def test_level_0_is_a_copy() -> None:
    """At scale 1 nothing is resampled."""
    image = picture(50, 60)
    assert np.array_equal(ArrayReader(image).read(Block(3, 4, 40, 30, 1.0, 1.0, 7, 9)).pixels, image[13:43, 10:50])
