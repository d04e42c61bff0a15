"""Choosing one of several images of a file: `scene`, in Python, in commands, in manifests and in data for training."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from helpers.commands import invoke, json_lines
from wsi_mmm.engine.executors.wire import pack_unit, recipe_json, unpack_unit
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import WorkUnit
from wsi_mmm.errors import NotASlide, OptionError
from wsi_mmm.inputs import expand_inputs
from wsi_mmm.options import RunOptions
from wsi_mmm.requests import request_run
from wsi_mmm.slides import open_slide
from wsi_mmm.types import U8

TILES: dict[str, Any] = {"tile": (64, 64), "metadata": None}
IMAGE = (
    '<Image ID="Image:{n}" Name="{name}"><Pixels ID="Pixels:{n}" DimensionOrder="XYCZT" Type="uint8" SizeX="{side}" '
    'SizeY="{side}" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}">'
    '<Channel ID="C:{n}" SamplesPerPixel="3"/><TiffData IFD="{ifd}" PlaneCount="1"/></Pixels></Image>'
)


def noise(side: int, seed: int) -> U8:
    """uint8[side, side, 3] in squares of 8 px."""
    squares = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return np.kron(squares, np.ones((8, 8, 1), np.uint8))


FIRST, SECOND, THIRD = noise(256, 1), noise(192, 2), noise(128, 3)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A slide with a level, and two other pictures, the last of them in grey."""
    with tifffile.TiffWriter(tmp_path / "album.tif") as tiff:
        for image in (FIRST, FIRST.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3)).astype(np.uint8), SECOND):
            tiff.write(image, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER", **TILES)
        tiff.write(THIRD[..., 0], photometric="minisblack", **TILES)
    return tmp_path / "album.tif"


@pytest.fixture
def two_scans(tmp_path: Path) -> Path:
    """An OME-TIFF whose XML names the small scan first and the large one, which is directory 0, second."""
    images = [("left", 192, 0.25, 1), ("right", 256, 0.5, 0)]
    parts = (IMAGE.format(n=n, name=a, side=s, mpp=m, ifd=i) for n, (a, s, m, i) in enumerate(images))
    text = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{"".join(parts)}</OME>'
    with tifffile.TiffWriter(tmp_path / "two.ome.tif") as tiff:
        tiff.write(FIRST, photometric="rgb", description=text, **TILES)
        tiff.write(SECOND, photometric="rgb", **TILES)
    return tmp_path / "two.ome.tif"


def shown(path: Path, scene: int | None) -> tuple[U8, float | None, str]:
    """All of level 0, the resolution and the fingerprint."""
    with open_slide(str(path), scene=scene) as slide:
        info = slide.info
        return slide.read_region(0, 0, info.width, info.height), info.mpp_x, str(info.fingerprint)


def test_pages_are_chosen_by_the_number_of_their_directory(album: Path) -> None:
    """Each is another slide; the usual one is the same whether it is chosen or not."""
    usual, _, mark = shown(album, None)
    again, _, same = shown(album, 0)
    other, mpp, another = shown(album, 2)
    grey, unknown, _ = shown(album, 3)
    assert np.array_equal(usual, FIRST)
    assert np.array_equal(again, FIRST)
    assert np.array_equal(other, SECOND)
    assert np.array_equal(grey[..., 1], THIRD[..., 0])
    assert (mpp, unknown) == (pytest.approx(0.5), None)
    assert mark == same != another


def test_a_level_chosen_as_the_slide_has_its_own_levels_alone(album: Path) -> None:
    """The finer image is none of its levels."""
    with open_slide(str(album), scene=1) as slide:
        assert (slide.info.width, len(slide.info.levels)) == (128, 1)


def test_ome_images_are_chosen_as_the_xml_numbers_them(two_scans: Path) -> None:
    """As Bio-Formats numbers its series; each with its own resolution."""
    for scene, image, mpp in ((None, FIRST, 0.5), (0, SECOND, 0.25), (1, FIRST, 0.5)):
        pixels, found, _ = shown(two_scans, scene)
        assert np.array_equal(pixels, image)
        assert found == mpp


@pytest.mark.parametrize("scene", [1, 4, 99])
def test_a_scene_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, album: Path, scene: int) -> None:
    """Of a file of one image the error says that there is nothing to choose."""
    tifffile.imwrite(tmp_path / "one.tif", FIRST, photometric="rgb", **TILES)
    with pytest.raises(OptionError, match=rf"one.tif has no scene {scene}; it holds one image, 0: choose none"):
        open_slide(str(tmp_path / "one.tif"), scene=scene)
    assert np.array_equal(shown(tmp_path / "one.tif", 0)[0], FIRST)
    if scene > 3:
        with pytest.raises(OptionError, match=rf"no scene {scene}; choose scene 0, 1, 2, 3"):
            open_slide(str(album), scene=scene)


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_readers_of_one_image_say_that_there_is_nothing_to_choose(album: Path, reader: str) -> None:
    """The only image is scene 0."""
    open_slide(str(album), reader=reader, scene=0).close()
    with pytest.raises(OptionError, match=f"reader {reader}.*no scene 2: this reader gives one image"):
        open_slide(str(album), reader=reader, scene=2)
    with open_slide(str(album), reader="tiff", scene=2) as slide:
        assert slide.info.width == 192


@pytest.mark.parametrize("kind", ["QPTIFF", "ImageJ"])
def test_a_channel_is_no_slide_though_chosen(tmp_path: Path, kind: str) -> None:
    """Where the file says that its pages are channels, none of them is brightfield."""
    qpi = "<PerkinElmer-QPI-ImageDescription><ImageType>FullResolution</ImageType></PerkinElmer-QPI-ImageDescription>"
    text = qpi if kind == "QPTIFF" else "ImageJ=1.53\nimages=2\nchannels=2\n"
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for n in range(2):
            tiff.write(noise(128, n)[..., 0], photometric="minisblack", description=text, **TILES)
    with pytest.raises(NotASlide, match="2 grey images"):
        open_slide(str(tmp_path / "a.tif"), scene=1)


def test_pages_in_grey_can_be_chosen(tmp_path: Path) -> None:
    """Without a word of the file they are taken for channels, unless somebody chooses one."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for n in range(2):
            tiff.write(noise(128, n)[..., 0], photometric="minisblack", **TILES)
    with pytest.raises(NotASlide, match=r"2 grey images.*choose one of them: scene 0, 1"):
        open_slide(str(tmp_path / "a.tif"))
    assert np.array_equal(shown(tmp_path / "a.tif", 1)[0][..., 0], noise(128, 1)[..., 0])


def test_the_label_of_an_svs_does_not_get_the_resolution_of_its_slide(tmp_path: Path) -> None:
    """Aperio's description tells of the slide alone."""
    with tifffile.TiffWriter(tmp_path / "a.svs") as tiff:
        text = "Aperio Image Library v12\r\n256x256 |AppMag = 20|MPP = 0.5"
        tiff.write(FIRST, photometric="rgb", description=text, **TILES)
        tiff.write(SECOND, photometric="rgb", **TILES)
    assert shown(tmp_path / "a.svs", None)[1] == 0.5
    pixels, mpp, _ = shown(tmp_path / "a.svs", 1)
    assert np.array_equal(pixels, SECOND)
    assert mpp is None


# ------------------------------------------------------------------------------------------------ commands


def test_info_shows_the_number_to_choose_by(album: Path, two_scans: Path) -> None:
    """Beside every image that can be chosen; with --scene the other one is shown."""
    text = invoke("info", album).stdout
    assert re.search(r"image\[0\] +slide, 256 x 256 px, scene 0", text)
    assert re.search(r"image\[1\] +level, 128 x 128 px\n", text)
    assert re.search(r"image\[2\] +other page, 192 x 192 px, scene 2", text)
    assert re.search(r"scene +0 is read; --scene N chooses another", text)
    assert re.search(r"image\[1\] +other page, 192 x 192 px, scene 0 \(left\)", invoke("info", two_scans).stdout)
    [line] = json_lines(invoke("info", two_scans, "--series", "0", "--json"))
    assert (line["width"], line["mpp_x"]) == (192, 0.25)
    assert "choose scene 0, 1" in invoke("info", two_scans, "--scene", "7").stderr


def test_thumbnail_and_tissue_are_those_of_the_scene(two_scans: Path, in_tmp: Path) -> None:
    """Both commands take --scene."""
    from PIL import Image

    assert invoke("thumbnail", two_scans, "--scene", "0", "-o", "t.png").exit_code == 0
    with Image.open("t.png") as picture:
        assert picture.size == (192, 192)
    assert invoke("tissue", two_scans, "--scene", "0", "--tissue", "none", "-o", "m.png").exit_code == 0
    with Image.open("m-overlay.png") as picture:
        assert picture.size == (192, 192)


# ------------------------------------------------------------------------------------------------ runs, training

RECIPE = Recipe("m", "h", (), 0.5, 256, 0)


def test_a_scene_is_a_slide_of_its_own_in_a_run(two_scans: Path, in_tmp: Path) -> None:
    """Its folder, its hash and what is sent to a worker tell it from the file's other scenes."""
    recipe = replace(RECIPE, options=RunOptions(scene=0))
    [chosen] = request_run(str(two_scans), recipe, "out").tasks
    [usual] = request_run(str(two_scans), RECIPE, "out").tasks
    assert (chosen.id, chosen.scene, usual.id, usual.scene) == ("two-scene-0", 0, "two", None)
    assert chosen.result_hash() != usual.result_hash() == RECIPE.result_hash()
    assert recipe.to_json()["scene"] == 0
    sent = unpack_unit(pack_unit(WorkUnit("plan", chosen), "key of scene 0"), lambda _: recipe_json(recipe))
    assert sent.slide.scene == 0


def test_a_manifest_names_scenes(tmp_path: Path, two_scans: Path) -> None:
    """Two rows may name two scenes of one file; --scene holds where a row says nothing."""
    table = tmp_path / "m.csv"
    table.write_text(f"slide,scene\n{two_scans},0\n{two_scans},1\n{two_scans},\n{two_scans},left\n")
    *good, wrong = expand_inputs([table])
    assert [(one.id, one.scene) for one in good] == [("two-scene-0", 0), ("two-scene-1", 1), ("two", None)]
    assert "row 5, column 'scene': 'left'" in wrong.error
    assert [one.scene for one in expand_inputs([table], scene=1) if not one.error] == [0, 1]


def test_data_for_training_names_a_scene(two_scans: Path) -> None:
    """In [[data]] of slides and of tables of slides; a manifest's own column comes first."""
    from wsi_mmm.training.data.slide_entries import SlidesEntry
    from wsi_mmm.training.data.slides import SlideItem

    entry = SlidesEntry(name="d", kind="slides", task="t", slides=("a",), scene=0)
    own, other = entry.of_scene([SlideItem("a", str(two_scans)), SlideItem("b", "b.tif", scene=2)])
    assert (own.scene, other.scene) == (0, 2)
    assert own.slide_key.scene == 0
