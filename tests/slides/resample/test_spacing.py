"""Levels whose size is no whole fraction of the slide's: every n-th pixel, or the slide resized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from wsi_mmm.slides import open_slide
from wsi_mmm.storage.local import LocalStore
from wsi_mmm.storage.ranges import Buffer, Ranges
from wsi_mmm.types import U8, Block

WIDTH, HEIGHT = 1031, 771
FACTORS = (2, 4, 8, 16, 32)


def picture() -> U8:
    """Coloured waves and many dark dots."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    image = np.stack([190 + 45 * np.sin(x / (40 + 9 * c) + c) * np.cos(y / (35 - 4 * c)) for c in range(3)], axis=-1)
    for cx, cy in np.random.default_rng(0).integers(9, 760, (500, 2)) * (WIDTH / HEIGHT, 1):
        image[int(cy) - 6 : int(cy) + 6, int(cx) - 6 : int(cx) + 6] = (90, 40, 140)
    return image.clip(0, 255).astype(np.uint8)


IMAGE = picture()


def resized(factor: int, up: bool) -> U8:
    """All of the slide at a rounded size, as PIL and GDAL make it."""
    size = tuple(-(-side // factor) if up else side // factor for side in (WIDTH, HEIGHT))
    return np.asarray(Image.fromarray(IMAGE).resize(size, Image.Resampling.BOX))


def averaged(factor: int, up: bool) -> U8:
    """The means of squares; the last, partial ones repeat their edge, or are left out."""
    sides = [-(-side // factor) if up else side // factor for side in (HEIGHT, WIDTH)]
    more = [max(0, side * factor - whole) for side, whole in zip(sides, (HEIGHT, WIDTH), strict=True)]
    full = np.pad(IMAGE, ((0, more[0]), (0, more[1]), (0, 0)), mode="edge")[: sides[0] * factor, : sides[1] * factor]
    return full.reshape(sides[0], factor, sides[1], factor, 3).mean(axis=(1, 3)).round().astype(np.uint8)


@pytest.mark.parametrize("compression", [None, "jpeg"])
@pytest.mark.parametrize("up", [True, False], ids=["rounded up", "rounded down"])
@pytest.mark.parametrize("make", [resized, averaged])
def test_a_level_lies_where_its_writer_put_it(tmp_path: Path, make: object, up: bool, compression: str | None) -> None:
    """At every scale the slide is the average of level 0, to the far edge, and in the same place in any block."""
    assert callable(make)
    more: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "compression": compression, "metadata": None}
    more |= {"compressionargs": {"level": 95}, "subsampling": (1, 1)} if compression else {}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(IMAGE, **more)
        for factor in FACTORS:
            tiff.write(make(factor, up), subfiletype=1, **more)
    with open_slide(str(tmp_path / "a.tif")) as slide:
        assert len(slide.info.levels) == 1 + len(FACTORS)
        for scale in (8, 16, 20, 32):
            width, height = WIDTH // scale, HEIGHT // scale
            canvas = slide.reader.read(Block(0, 0, width, height, float(scale), float(scale))).pixels
            want = IMAGE[: height * scale, : width * scale].reshape(height, scale, width, scale, 3).mean(axis=(1, 3))
            off = np.abs(canvas - want)
            assert off.mean() < 3.2
            assert off[:, -8:].mean() < 4, f"at the right edge of 1/{scale}"
            part = slide.reader.read(Block(width // 2, 3, 5, 5, float(scale), float(scale))).pixels
            assert np.array_equal(part, canvas[3:8, width // 2 : width // 2 + 5])


def test_blank_levels_are_taken_as_every_nth_pixel(tmp_path: Path) -> None:
    """Nothing speaks for the other."""
    blank = np.full((HEIGHT, WIDTH, 3), 240, np.uint8)
    more = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(blank, **more)
        tiff.write(blank[: -(-HEIGHT // 16), : -(-WIDTH // 16)], subfiletype=1, **more)
    with open_slide(str(tmp_path / "a.tif")) as slide:
        assert (slide.thumbnail(60) == 240).all()


def test_a_level_is_settled_in_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From remote storage each step waits: what is compared is fetched together."""
    steps = []
    read = LocalStore.get_ranges

    def counted(store: LocalStore, ranges: Ranges) -> list[Buffer]:
        steps.append(len(ranges))
        return read(store, ranges)

    more: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(IMAGE, **more)
        tiff.write(resized(8, up=True), subfiletype=1, **more)
    with open_slide(str(tmp_path / "a.tif")) as slide:
        monkeypatch.setattr(LocalStore, "get_ranges", counted)
        slide.reader.read(Block(0, 0, 4, 4, 8.0, 8.0))
    assert sum(steps) > 9, "nothing was compared"
    assert len(steps) <= 4
