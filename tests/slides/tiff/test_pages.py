"""Which images of a TIFF are the slide and its levels: labels, scenes, channels, masks and pages of every order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from wsi_mmm.errors import NotASlide
from wsi_mmm.slides import open_slide
from wsi_mmm.types import U8, Block

SIDE = 1024
CM = "CENTIMETER"
MPP = {"resolution": (20000, 20000), "resolutionunit": CM}  # 0.5 um


def picture(side: int = SIDE, seed: int = 0) -> U8:
    """Coloured waves with dark discs, another picture for every seed."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    planes = [190 + 40 * np.sin(x / (53 + 7 * seed) + c) * np.cos(y / (41 + 5 * seed) - c) for c in range(3)]
    image = np.stack(planes, axis=-1)
    rng = np.random.default_rng(seed)
    for cx, cy in rng.integers(20, side - 20, (side // 12, 2)):
        image[cy - 7 : cy + 7, cx - 5 : cx + 5] = (90, 40, 140)
    return image.clip(0, 255).astype(np.uint8)


def shrunk(image: U8, factor: int) -> U8:
    side = image.shape[0] // factor
    parts = image[: side * factor, : side * factor].reshape(side, factor, side, factor, 3)
    return parts.mean(axis=(1, 3)).round().astype(np.uint8)


SLIDE = picture()
LABEL = np.full((256, 256, 3), 246, np.uint8)
LABEL[60:180:7, 40:220] = 20


@dataclass
class Written:
    """One image to write: tiled unless ``strips``; ``more`` goes to tifffile."""

    image: np.ndarray
    strips: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    subs: Sequence[np.ndarray] = ()


def write(path: Path, images: Sequence[Written], compression: str | None = "zlib", *, big: bool = False) -> Path:
    with tifffile.TiffWriter(path, bigtiff=big) as tiff:
        for one in images:
            grey = one.image.ndim == 2
            usual: dict[str, Any] = {"photometric": "minisblack" if grey else "rgb", "compression": compression}
            if compression == "jpeg" and not grey:
                usual |= {"compressionargs": {"level": 95}}
            usual |= {"rowsperstrip": 64} if one.strips else {"tile": (128, 128)}
            tiff.write(one.image, metadata=None, subifds=len(one.subs) or None, **(usual | one.more))
            for sub in one.subs:
                tiff.write(sub, metadata=None, subfiletype=1, **usual)
    return path


def averaged(image: U8, scale: int) -> np.ndarray:
    side = image.shape[0] // scale
    return image[: side * scale, : side * scale].reshape(side, scale, side, scale, 3).mean(axis=(1, 3))


def assert_shows(path: Path, image: U8, levels: int | None = None, mpp: float | None = 0.5) -> None:
    """The slide is ``image`` at every scale, with its resolution and so many levels."""
    with open_slide(str(path)) as slide:
        assert (slide.info.width, slide.info.height) == (image.shape[1], image.shape[0])
        assert slide.info.mpp_x == (None if mpp is None else pytest.approx(mpp, rel=1e-3))
        assert levels is None or len(slide.info.levels) == levels, slide.info.properties
        for scale in (1, 4, 8):
            side = image.shape[0] // scale
            canvas = slide.reader.read(Block(0, 0, side, side, float(scale), float(scale)))
            assert len(canvas.failed) == 0
            off = np.abs(canvas.pixels.astype(float) - averaged(image, scale))
            assert off.mean() < 2.5, f"at 1/{scale}"


LEVELS: dict[str, list[Written]] = {
    "no level": [],
    "halves, flagged": [Written(shrunk(SLIDE, n), more={"subfiletype": 1}) for n in (2, 4)],
    "halves, no flag": [Written(shrunk(SLIDE, 2)), Written(shrunk(SLIDE, 4))],
    "a quarter, flagged": [Written(shrunk(SLIDE, 4), more={"subfiletype": 1})],
    "a quarter, no flag": [Written(shrunk(SLIDE, 4))],
    "an eighth, no flag": [Written(shrunk(SLIDE, 8))],
    "pages of an album": [Written(shrunk(SLIDE, 2), more={"subfiletype": 2})],
}  # fmt: skip
BESIDE: dict[str, list[Written]] = {
    "alone": [],
    "tiled label": [Written(LABEL)],
    "tiled label, flagged": [Written(LABEL, more={"subfiletype": 1})],
    "label in strips": [Written(LABEL, strips=True)],
    "other picture of half the size": [Written(picture(SIDE // 2, 3))],
    "thumbnail in strips, flagged": [Written(shrunk(SLIDE, 4), strips=True, more={"subfiletype": 1})],
}
CASES = list(itertools.product(LEVELS, BESIDE, ["before", "after"], [None, "zlib", "jpeg"]))
CASES = [case for case in CASES if case[1] != "alone" or case[2] == "after"]


@pytest.mark.parametrize(("levels", "beside", "where", "compression"), CASES)
def test_levels_are_told_from_other_images(
    tmp_path: Path, levels: str, beside: str, where: str, compression: str | None
) -> None:
    """231 layouts: whatever lies before or behind it, the slide is shown at every scale, with its own resolution."""
    other = BESIDE[beside]
    slide = [Written(SLIDE, more=MPP), *LEVELS[levels]]
    path = write(tmp_path / "a.tif", [*other, *slide] if where == "before" else [*slide, *other], compression)
    assert_shows(path, SLIDE, 1 + len(LEVELS[levels]))


@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
def test_coarse_levels_first(tmp_path: Path, big: bool) -> None:
    """A file whose thumbnail and levels stand before the slide is a slide all the same."""
    flags = {"subfiletype": 1}
    images = [Written(shrunk(SLIDE, 4), more=flags), Written(shrunk(SLIDE, 2), more=flags), Written(SLIDE, more=MPP)]
    assert_shows(write(tmp_path / "a.tif", images, big=big), SLIDE, 3)


def test_a_label_s_resolution_is_not_the_slide_s(tmp_path: Path) -> None:
    """The label stands first, with a resolution of its own."""
    label = Written(LABEL, more={"resolution": (500, 500), "resolutionunit": CM})
    assert_shows(write(tmp_path / "a.tif", [label, Written(SLIDE, more=MPP)]), SLIDE, 1)


def test_levels_padded_to_whole_tiles_are_not_trusted(tmp_path: Path) -> None:
    """Their size is not the slide's divided: read as levels they would shift everything."""

    def padded(image: U8) -> U8:
        full = np.full((-(-image.shape[0] // 512) * 512,) * 2 + (3,), 255, np.uint8)
        full[: image.shape[0], : image.shape[1]] = image
        return full

    image = picture(1300, 2)
    flags = {"subfiletype": 1}
    images = [Written(padded(image), more=MPP), *(Written(padded(shrunk(image, n)), more=flags) for n in (2, 4))]
    assert_shows(write(tmp_path / "a.tif", images), padded(image), 1)


def test_every_image_of_the_file_is_listed(tmp_path: Path) -> None:
    """The properties say what each was taken for."""
    images = [Written(SLIDE, more=MPP), Written(shrunk(SLIDE, 2), more={"subfiletype": 1}), Written(LABEL, strips=True)]
    with open_slide(str(write(tmp_path / "a.tif", images))) as slide:
        roles = [slide.info.properties[f"tiff.image[{n}]"].split(",")[0] for n in range(3)]
    assert roles == ["slide", "level", "other page"]


# ------------------------------------------------------------------------------------------------ OME-TIFF

PIXELS = (
    '<Image ID="Image:{n}" Name="{name}"><Pixels ID="Pixels:{n}" DimensionOrder="XYCZT" Type="uint8" SizeX="{side}" '
    'SizeY="{side}" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}">'
    '<Channel ID="C:{n}" SamplesPerPixel="3"/><TiffData IFD="{ifd}" PlaneCount="1"/></Pixels></Image>'
)


def ome(*images: tuple[str, int, float, int]) -> dict[str, Any]:
    """``images``: name, side, mpp, directory."""
    parts = (PIXELS.format(n=n, name=a, side=s, mpp=m, ifd=i) for n, (a, s, m, i) in enumerate(images))
    text = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{"".join(parts)}</OME>'
    return {"description": text}


def test_of_two_scenes_the_larger_is_the_slide(tmp_path: Path) -> None:
    """The second scan area is no level of the first, whatever its size; both are named."""
    text = ome(("area 1", SIDE, 0.5, 0), ("area 2", SIDE // 2, 0.5, 1))
    first = Written(SLIDE, more=text, subs=[shrunk(SLIDE, 2)])
    path = write(tmp_path / "a.ome.tif", [first, Written(picture(SIDE // 2, 4))])
    assert_shows(path, SLIDE, 2)
    with open_slide(str(path)) as slide:
        assert slide.info.properties["tiff.scenes"] == "area 1, area 2"


@pytest.mark.parametrize("label_first", [True, False])
def test_ome_xml_and_directories_in_different_orders(tmp_path: Path, label_first: bool) -> None:
    """TiffData says which directory an image is; a label is none even when it is named first or lies first."""
    label, slide = Written(LABEL), Written(SLIDE)
    images = [label, slide] if label_first else [slide, label]
    place = {"slide": int(label_first), "label": int(not label_first)}
    images[0].more = ome(("label image", 256, 20, place["label"]), ("slide", SIDE, 0.5, place["slide"]))
    assert_shows(write(tmp_path / "a.ome.tif", images), SLIDE, 1)


def test_ome_xml_with_a_prefix_or_behind_a_comment(tmp_path: Path) -> None:
    """The element may be called ome:OME, and a long comment may stand before it."""
    body = '<ome:Image><ome:Pixels SizeC="3" PhysicalSizeX="0.5" PhysicalSizeY="0.5"/></ome:Image>'
    text = f"<!--{'x' * 5000}--><ome:OME xmlns:ome='http://x'>{body}</ome:OME>"
    assert_shows(write(tmp_path / "a.ome.tif", [Written(SLIDE, more={"description": text})]), SLIDE, 1)


# ------------------------------------------------------------------------------------------------ fluorescence

GREY = SLIDE[..., 0]
QPI = (
    "<PerkinElmer-QPI-ImageDescription><ImageType>FullResolution</ImageType><Name>{}</Name>"
    "</PerkinElmer-QPI-ImageDescription>"
)
COMPANION = '<OME><BinaryOnly MetadataFile="x.companion.ome" UUID="u"/></OME>'


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([Written(GREY)] * 4, "4 grey images"),
        ([Written(GREY, more={"description": "ImageJ=1.53\nimages=3\nchannels=3\n"})], "3 grey images"),
        ([Written(GREY, more={"description": QPI.format(name)}) for name in ("DAPI", "CD8")], r"2 grey.*DAPI, CD8"),
        ([Written(GREY, more={"description": COMPANION})], "x.companion.ome"),
    ],
    ids=["pages", "ImageJ", "QPTIFF", "companion"],
)  # fmt: skip
def test_channels_are_no_slide(tmp_path: Path, images: list[Written], message: str) -> None:
    """The first channel of several is not opened as if it were the slide: the error names what lies there."""
    with pytest.raises(NotASlide, match=message):
        open_slide(str(write(tmp_path / "a.tif", images)))


def test_a_brightfield_qptiff_has_its_levels_and_not_its_label(tmp_path: Path) -> None:
    """PerkinElmer names each directory: FullResolution, ReducedResolution, Thumbnail, Label."""

    def said(kind: str) -> dict[str, Any]:
        return {"description": QPI.format("RGB").replace("FullResolution", kind)}

    images = [
        Written(SLIDE, more=MPP | said("FullResolution")),
        Written(shrunk(SLIDE, 2), more=said("ReducedResolution") | {"subfiletype": 1}),
        Written(LABEL, more=said("Label") | {"subfiletype": 1}),
    ]
    path = write(tmp_path / "a.qptiff", images)
    assert_shows(path, SLIDE, 2)
    with open_slide(str(path)) as slide:
        assert slide.info.vendor == "perkinelmer"


# ------------------------------------------------------------------------------------------------ vendors, resolution


@pytest.mark.parametrize("text", ["converted from Hamamatsu ndpi", "<image><name>leica.device-model</name></image>"])
def test_a_vendor_s_name_does_not_make_a_vendor_s_file(tmp_path: Path, text: str) -> None:
    """Converters pass names on; the pages are judged as in any TIFF."""
    images = [Written(SLIDE, more=MPP | {"description": text}), Written(shrunk(SLIDE, 2)), Written(LABEL)]
    path = write(tmp_path / "a.tif", images)
    assert_shows(path, SLIDE, 2)
    with open_slide(str(path)) as slide:
        assert slide.info.reader == "tiff"


@pytest.mark.parametrize(("value", "unit"), [(300, "INCH"), (118.11, CM), (236.22, CM), (600, "INCH"), (72, "INCH")])
def test_a_print_resolution_is_no_resolution(tmp_path: Path, value: float, unit: str) -> None:
    """72, 300 and 600 dpi are habits of image writers, in inches or centimetres."""
    more = {"resolution": (value, value), "resolutionunit": unit}
    assert_shows(write(tmp_path / "a.tif", [Written(SLIDE, more=more)]), SLIDE, 1, mpp=None)


def test_a_level_cut_from_an_svs_does_not_keep_the_resolution_of_level_0(tmp_path: Path) -> None:
    """Aperio's description of an export says what was cut, and keeps MPP as it was."""
    text = (
        "Aperio Image Library v11.2.1\r\n8192x8192 [0,0 4096x4096] (240x240) -> 1024x1024 - |AppMag = 20|MPP = 0.4990"
    )
    assert_shows(write(tmp_path / "a.svs", [Written(SLIDE, more={"description": text})]), SLIDE, 1, mpp=None)
