"""Tiles at any places hold the pixels of the slide, and say which of them could not be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsi_mmm.slides import open_slide
from wsi_mmm.slides.fake import ArrayReader, synthetic_slide
from wsi_mmm.tiles.stream import read_tiles
from wsi_mmm.types import Tiles

PIXELS = np.random.default_rng(5).integers(0, 255, (300, 400, 3), dtype=np.uint8)


def test_places_are_read_in_their_order_and_white_beyond_the_slide() -> None:
    """Also far apart, on each other, and across every edge."""
    xy = np.array([[350, 280], [0, 0], [-20, -30], [0, 0], [120, 77], [2000, 10]])
    pixels, failed = read_tiles(ArrayReader(PIXELS), Tiles(xy, 64, 1.0, 1.0))
    padded = np.full((500, 600, 3), 255, np.uint8)
    padded[100:400, 100:500] = PIXELS
    for (x, y), tile in zip(xy[:5] + 100, pixels, strict=False):
        assert (tile == padded[y : y + 64, x : x + 64]).all()
    assert (pixels[5] == 255).all()
    assert not failed.any()


def test_places_on_a_damaged_tile_are_marked_and_others_are_not() -> None:
    """By area shared with it."""
    reader = ArrayReader(PIXELS, failed=np.array([[100, 100, 150, 150]], np.int64))
    xy = np.array([[120, 120], [0, 0], [150, 100], [90, 90]])
    _, failed = read_tiles(reader, Tiles(xy, 50, 1.0, 1.0))
    assert failed.tolist() == [True, False, False, True]


@pytest.mark.parametrize("scale", [1.0, 1.9011])
def test_a_file_gives_the_same_places_as_its_regions(tiny_slide: Path, scale: float) -> None:
    """The reader that decodes straight into tiles agrees with blocks, byte for byte, at the edges too."""
    rng = np.random.default_rng(1)
    xy = np.concatenate([rng.integers(-60, 900, (12, 2)), [[1450, 1100]]])
    with open_slide(str(tiny_slide)) as slide:
        pixels, failed = read_tiles(slide.reader, Tiles(xy, 96, scale, scale))
        assert not failed.any()
        for (x, y), tile in zip(xy, pixels, strict=True):
            one, _ = read_tiles(slide.reader, Tiles(np.array([[x, y]]), 96, scale, scale))
            assert (one[0] == tile).all()
            if scale == 1.0:
                assert (slide.read_region(int(x), int(y), 96, 96) == tile).all()


def test_no_places_are_no_pixels(tmp_path: Path) -> None:
    """An empty list is answered with empty arrays."""
    synthetic_slide(tmp_path / "s.tiff", width=512, height=512, nuclei=3)
    with open_slide(str(tmp_path / "s.tiff")) as slide:
        pixels, failed = read_tiles(slide.reader, Tiles(np.zeros((0, 2), np.int64), 32, 1.0, 1.0))
    assert pixels.shape == (0, 32, 32, 3) and len(failed) == 0
