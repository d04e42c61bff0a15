"""Commands that look at one slide: info, thumbnail, tissue."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from helpers.commands import invoke, json_lines
from wsi_mmm.cli import slide


def test_info_lists_every_image_of_a_tiff(tmp_path: Path) -> None:
    """A label in the file is shown as what it was taken for."""
    import tifffile

    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(np.full((512, 512, 3), 200, np.uint8), tile=(128, 128), photometric="rgb", metadata=None)
        tiff.write(np.zeros((90, 200, 3), np.uint8), photometric="rgb", metadata=None, subfiletype=1)
    done = invoke("info", str(tmp_path / "a.tif"))
    assert re.search(r"image\[0\] +slide, 512 x 512 px", done.stdout)
    assert re.search(r"image\[1\] +label, macro or thumbnail, 200 x 90 px", done.stdout)


def test_info_shows_a_slide_and_goes_on_after_a_missing_one(tiny_slide: Path) -> None:
    """Facts as text or JSON; a missing slide is one error line and exit code 3."""
    text = invoke("info", tiny_slide).stdout
    assert "1536 x 1152 px" in text
    assert "0.5 x 0.5" in text
    result = invoke("info", "missing.svs", tiny_slide, "--json")
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert json_lines(result)[0]["width"] == 1536


def test_thumbnail_writes_a_picture(tiny_slide: Path, in_tmp: Path) -> None:
    """The longer side is as asked; an unknown format is refused in words."""
    from PIL import Image

    assert invoke("thumbnail", tiny_slide, "-o", "t.jpg", "--max-size", "300").exit_code == 0
    with Image.open("t.jpg") as picture:
        assert picture.size == (300, 225)
    result = invoke("thumbnail", tiny_slide, "-o", "t.xyz")
    assert (result.exit_code, "end it in .png or .jpg" in result.stderr) == (1, True)


def test_tissue_writes_mask_and_overlay_and_says_how_much(tiny_slide: Path, in_tmp: Path) -> None:
    """Two pictures and a coverage between 0 and 1."""
    (line,) = json_lines(invoke("tissue", tiny_slide, "-o", "m.png", "--json"))
    assert 0 < line["coverage"] <= 1
    assert (in_tmp / "m.png").exists()
    assert (in_tmp / "m-overlay.png").exists()


def test_shading_greys_what_is_outside_and_lines_the_border() -> None:
    """Inside unchanged, outside pale, a green line between."""
    picture = np.full((40, 60, 3), 30, np.uint8)
    mask = np.zeros((4, 6), bool)
    mask[1:3, 1:4] = True
    shaded = slide.shade(picture, mask)
    assert shaded[20, 25].tolist() == [30, 30, 30]
    assert shaded[2, 2].tolist() == [160, 160, 160]
    assert shaded[10, 25].tolist() == [0, 150, 60]
