"""Which reader reads what: by content, or by name, never by a second try."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.made_slides import Made, overwrite, tile_at
from wsi_mmm.errors import NotASlide, OptionError, SlideDamaged
from wsi_mmm.slides import open_slide
from wsi_mmm.types import Block


@pytest.mark.parametrize("name", ["slide.svs", "slide.png", "slide"])
def test_the_extension_does_not_matter(small_slide: Made, tmp_path: Path, name: str) -> None:
    """A TIFF is a TIFF under any name, and the reader is recorded."""
    shutil.copy(small_slide.path, tmp_path / name)
    with open_slide(str(tmp_path / name)) as slide:
        assert slide.info.reader == "tiff"


def test_a_reader_can_be_forced_and_unknown_names_list_the_choices(small_slide: Made) -> None:
    """Names are tiff, openslide and tiffslide."""
    for name in ("tiff", "openslide", "tiffslide"):
        with open_slide(str(small_slide.path), reader=name) as slide:
            assert slide.info.reader == name
    with pytest.raises(OptionError, match="tiff, openslide, tiffslide"):
        open_slide(str(small_slide.path), reader="magick")


@pytest.mark.parametrize("name", ["tiff", "openslide", "tiffslide"])
def test_a_forced_reader_that_cannot_read_it_says_so(tmp_path: Path, name: str) -> None:
    """No other reader is tried."""
    (tmp_path / "text.svs").write_text("this is no slide at all, whatever its name")
    with pytest.raises((NotASlide, SlideDamaged)):
        open_slide(str(tmp_path / "text.svs"), reader=name)


def test_openslide_lists_damage_and_goes_on(copy_slide: Path) -> None:
    """After an error OpenSlide refuses everything; the adapter opens it anew, and only the bad chunk is white."""
    at, length = tile_at(copy_slide, 0, 6)
    overwrite(copy_slide, at, bytes(length))
    with open_slide(str(copy_slide), reader="openslide") as slide, open_slide(str(copy_slide)) as ours:
        block = Block(0, 0, 1100, 820, 1.0, 1.0)
        theirs, mine = slide.reader.read(block), ours.reader.read(block)
        assert len(theirs.failed) == 1
        x0, y0, x1, y1 = theirs.failed[0]
        assert x0 <= 256 < 512 <= x1
        assert y0 <= 256 < 512 <= y1
        same = (theirs.pixels == mine.pixels).all(axis=2)
        same[y0:y1, x0:x1] = True
        assert same.all()
        assert not np.array_equal(theirs.pixels[:, 600:], np.full_like(theirs.pixels[:, 600:], 255))


def test_mpp_is_overridden_for_every_reader(small_slide: Made) -> None:
    """The user's mpp replaces the slide's."""
    for name in ("tiff", "openslide", "tiffslide"):
        with open_slide(str(small_slide.path), mpp=0.2, reader=name) as slide:
            assert (slide.info.mpp_x, slide.info.mpp_y) == (0.2, 0.2)
            assert slide.scale(0.5) == pytest.approx((2.5, 2.5))
