"""Parity with OpenSlide and with area averages on real slides; skipped where they are absent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers.area import area_average
from helpers.stored import stored
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.registry import READERS
from wsi_mmm.types import U8, Block

JPEG = (
    "cmu-1-small-region.svs", "crohn_HE4_1.21Gpx.svs", "hpylori_giemsa.svs", "metaplasia_HE.svs",
    "metaplasia_trypsin_IHC.svs",
)  # fmt: skip
J2K = "tcga-cr-7395-01a-01-ts1.svs"
TISSUE = {
    "cmu-1-small-region.svs": (200, 603), "crohn_HE4_1.21Gpx.svs": (32001, 22000), "hpylori_giemsa.svs": (5200, 18401),
    "metaplasia_HE.svs": (2401, 6401), "metaplasia_trypsin_IHC.svs": (5001, 2003),
}  # fmt: skip


def openslide_region(path: Any, x: int, y: int, *, size: tuple[int, int], level: int = 0) -> U8:
    """Return OpenSlide's pixels, transparent as white."""
    import openslide

    with openslide.OpenSlide(str(path)) as slide:
        rgba = np.asarray(slide.read_region((x, y), level, size))
    return np.where(rgba[..., 3:] == 0, 255, rgba[..., :3]).astype(np.uint8)


@pytest.mark.parametrize("name", JPEG)
def test_level_0_equals_openslide_exactly(real_data: Any, name: str) -> None:
    """Every pixel of JPEG slides, RGB-stored ones included, edges and outside too."""
    path = real_data.slide(name)
    with open_slide(str(path)) as slide:
        width, height = slide.info.width, slide.info.height
        x, y = TISSUE[name]
        corners = [
            (x, y),
            (-100, -90),
            (width - 400, height - 300),
            (width // 2 + 7, height // 2 - 3),
            (0, height - 200),
        ]
        for left, top in corners:
            want = openslide_region(path, left, top, size=(700, 500))
            assert np.array_equal(slide.read_region(left, top, 700, 500), want)


def test_jpeg_2000_is_within_two_grey_levels(real_data: Any) -> None:
    """JPEG 2000 may round differently; the mean difference is bounded."""
    path = real_data.slide(J2K)
    with open_slide(str(path)) as slide:
        for x, y in [(0, 0), (1800, 1800), (4000, 3300)]:
            want = openslide_region(path, x, y, size=(700, 500)).astype(int)
            assert np.abs(slide.read_region(x, y, 700, 500) - want).mean() <= 2


@pytest.mark.parametrize("name", [*JPEG, J2K])
def test_geometry_is_openslides(real_data: Any, name: str) -> None:
    """The same levels with the same sizes, the same mpp and objective, whichever reader is forced."""
    path = str(real_data.slide(name))
    ours, theirs = READERS["tiff"](path), READERS["openslide"](path)
    assert [(v.width, v.height) for v in ours.info.levels] == [(v.width, v.height) for v in theirs.info.levels]
    assert ours.info.levels == theirs.info.levels
    assert ours.info.mpp_x == pytest.approx(theirs.info.mpp_x)
    assert (ours.info.objective, ours.info.fingerprint) == (theirs.info.objective, theirs.info.fingerprint)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("name", JPEG)
def test_stored_levels_are_read_pixel_for_pixel(real_data: Any, name: str) -> None:
    """A stored level, read where its own tiles start, equals what OpenSlide finds in it."""
    path = real_data.slide(name)
    reader = READERS["tiff"](str(path))
    for source in reader._sources:  # type: ignore[attr-defined]
        if source.shrink == 1:
            size = min(200, source.width), min(200, source.height)
            got, _ = stored(reader, source, (0, 0, *size))
            assert np.array_equal(got, openslide_region(path, 0, 0, size=size, level=source.level))
    reader.close()


@pytest.mark.parametrize("name", JPEG)
@pytest.mark.parametrize("scale", [1.3, 1.9011, 2.0, 2.6, 3.9, 4.0, 6.1, 8.0, 11.4, 15.9])
def test_other_scales_are_the_area_average_of_level_0(real_data: Any, name: str, scale: float) -> None:
    """Within 2 grey levels on average, on tissue, from an odd corner."""
    path, (x, y) = real_data.slide(name), TISSUE[name]
    count = int(min(160, 1400 / scale))
    side = int(np.ceil(count * scale)) + 1
    top = openslide_region(path, x, y, size=(side, side))
    want = area_average(top, (count, count), (scale, scale), (0, 0))
    with open_slide(str(path)) as slide:
        got = slide.reader.read(Block(0, 0, count, count, scale, scale, x, y)).pixels
    assert np.abs(got - want).mean() <= 2


def test_dicom_slides_open_through_openslide(real_data: Any) -> None:
    """DICOM whole-slide images are found by content, with their resolution."""
    for name in ("multi_frame_jpeg_camelyon_challenge_image.dcm", "multi_frame_jpeg2000_camelyon_challenge_image.dcm"):
        with open_slide(str(real_data.file(f"dicom/{name}"))) as slide:
            assert (slide.info.reader, slide.info.vendor) == ("openslide", "dicom")
            assert slide.info.mpp_x == pytest.approx(28.969)
            assert slide.thumbnail(200).std() > 5
