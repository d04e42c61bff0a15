"""Slides that do not say their resolution: why, for every reader, and a way out that exists where it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

import wsi_mmm
from helpers.commands import invoke
from wsi_mmm.errors import MppUnknown
from wsi_mmm.slides import open_slide
from wsi_mmm.training.data.slides import SlideItem, TileSampling, slide_tiles

PIXELS = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
CM, INCH = "CENTIMETER", "INCH"


def slide(path: Path, value: float, unit: str) -> Path:
    """A tiled picture with resolution tags."""
    more = {"resolution": (value, value), "resolutionunit": unit, "metadata": None}
    tifffile.imwrite(path, PIXELS, tile=(64, 64), photometric="rgb", **more)
    return path


@pytest.mark.parametrize("reader", ["tiff", "openslide", "tiffslide"])
@pytest.mark.parametrize(
    ("value", "unit", "dpi"), [(300, INCH, 300), (600, INCH, 600), (72, INCH, 72), (118.11, CM, 300), (236.22, CM, 600)]
)
def test_a_print_resolution_is_named(tmp_path: Path, reader: str, value: float, unit: str, dpi: int) -> None:
    """Whichever library reads the tags, they are no resolution of a slide."""
    with open_slide(str(slide(tmp_path / "a.tif", value, unit)), reader=reader) as opened:
        assert opened.info.mpp_x is None
        with pytest.raises(MppUnknown, match=rf"\(its tags say {dpi} dpi, a resolution of print\); open it with"):
            opened.scale(0.5)


@pytest.mark.parametrize("reader", ["tiff", "openslide", "tiffslide"])
def test_a_resolution_of_a_slide_is_one(tmp_path: Path, reader: str) -> None:
    """20,000 px per cm are 0.5 um."""
    with open_slide(str(slide(tmp_path / "a.tif", 20000, CM)), reader=reader) as opened:
        assert opened.info.mpp_x == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('<OME><Image><Pixels SizeC="3" PhysicalSizeX="1" PhysicalSizeXUnit="pixel"/></Image></OME>', "in 'pixel'"),
        ("<OME><Image></OME>", "its OME-XML cannot be read"),
        ("Aperio Image\r\n512x512 [0,0 512x512] (64x64) -> 128x128 - |MPP = 0.25", "of which this is a part"),
    ],
)
def test_why_a_description_gives_none(tmp_path: Path, text: str, why: str) -> None:
    """The error says it."""
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, tile=(64, 64), photometric="rgb", description=text, metadata=None)
    with open_slide(str(tmp_path / "a.tif")) as opened, pytest.raises(MppUnknown, match=why):
        opened.scale(0.5)


@pytest.mark.parametrize("command", [["run", "--task", "stain"], ["embed"]])
def test_commands_name_their_own_option(in_tmp: Path, command: list[str]) -> None:
    """With it the slide can be read."""
    slide(in_tmp / "a.tif", 300, INCH)
    said = invoke(*command, "a.tif", "--dry-run", "--mpp", "0.5").stderr
    assert "its tags say 300 dpi, a resolution of print); give --mpp-override 0.25 (Python: mpp_override=0.25)" in said
    assert invoke(*command, "a.tif", "--dry-run", "--mpp", "0.5", "--mpp-override", "0.25").exit_code == 0


def test_info_says_why(in_tmp: Path) -> None:
    """And by which option it can be set."""
    slide(in_tmp / "a.tif", 300, INCH)
    text = invoke("info", "a.tif").stdout
    assert "unknown: its tags say 300 dpi, a resolution of print (--mpp-override 0.25 sets it)" in text


def test_python_and_training_name_what_they_have(tmp_path: Path) -> None:
    """`stream_tiles` has no option for it, [[data]] has one."""
    path = str(slide(tmp_path / "a.tif", 300, INCH))
    with pytest.raises(MppUnknown, match=r"open_slide\(uri, mpp=0\.25\)"):
        next(wsi_mmm.stream_tiles(path, 0.5))
    with pytest.raises(MppUnknown, match=r"300 dpi.*set mpp_override = 0\.25 in its \[\[data\]\]"):
        slide_tiles("d", [SlideItem("a", path)], TileSampling(0.5, 64))
