"""Tiles at listed places: pixels of OpenSlide and PIL, the sequence of the list, what does not fit the slide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from PIL import Image

import wsi_mmm
from helpers.area import area_average
from helpers.tile_lists import clam_file, trident_file
from wsi_mmm.errors import InputError
from wsi_mmm.slides import Slide, open_slide
from wsi_mmm.tiles.grid import make_grid, tile_xy
from wsi_mmm.tiles.listed import corners_of, place_tiles, read_listed
from wsi_mmm.tiles.stream import stream
from wsi_mmm.tiles.tile_file import TileList
from wsi_mmm.types import U8

SIZE = 1536, 1152
SCATTERED = np.array([[901, 333], [0, 0], [1500, 1100], [64, 64], [-20, 5], [901, 333], [700, 2], [333, 901], [65, 64]])
"""Far from any grid, one twice, some that reach beyond the slide, in no sequence."""


@pytest.fixture(scope="module")
def slide(tiny_slide: Path) -> Iterator[Slide]:
    with open_slide(str(tiny_slide)) as opened:
        yield opened


def read_plainly(path: Path, corner: tuple[int, int], wide: int, side: int) -> U8:
    """The tile as a plain script reads it: OpenSlide at level 0, on white, averaged."""
    with openslide.OpenSlide(str(path)) as opened:
        tile = opened.read_region(corner, 0, (wide, wide))
    white = Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile).convert("RGB")
    scale = wide / side
    return np.round(area_average(np.asarray(white), (side, side), (scale, scale), (0, 0))).astype(np.uint8)


def check_like(pixels: U8, wanted: U8, *, exact: bool) -> None:
    """Copied px are the same; averages may use the codec's own halves of level 0, which are off by little."""
    off = np.abs(pixels.astype(int) - wanted)
    assert off.max() == 0 if exact else off.mean() <= 0.6 and np.quantile(off, 0.99) <= 4


@pytest.mark.parametrize(("wide", "side"), [(64, 64), (128, 64), (96, 64), (150, 64), (250, 64), (48, 64)])
def test_tiles_are_those_of_openslide_and_pil(wide: int, side: int, slide: Slide, tiny_slide: Path) -> None:
    """At every corner, by whatever ratio; enlarged tiles, which are interpolated, are not compared."""
    placed = place_tiles(slide.info, TileList(corners=SCATTERED, size=side, size_level0=wide), 2)
    assert np.array_equal(corners_of(placed.grid, placed.places), SCATTERED)
    batch = read_listed(slide.reader, placed.grid, placed.places, placed.index)
    assert np.array_equal(batch.xy, SCATTERED) and not batch.failed.any()
    for pixels, (x, y) in zip(batch.pixels, SCATTERED.tolist(), strict=True):
        inside = 0 <= x <= SIZE[0] - wide and 0 <= y <= SIZE[1] - wide  # px half on the slide are no mean with white
        if wide == side or (wide > side and inside):
            check_like(pixels, read_plainly(tiny_slide, (x, y), wide, side), exact=wide == side)


@pytest.mark.parametrize(("wide", "side"), [(64, 64), (150, 64), (128, 64)])
def test_a_tile_does_not_depend_on_the_others_of_the_list(wide: int, side: int, slide: Slide) -> None:
    """Bit for bit: alone, in reverse, in blocks of any size."""
    tiles = TileList(corners=SCATTERED, size=side, size_level0=wide)
    placed = place_tiles(slide.info, tiles, 2)
    whole = read_listed(slide.reader, placed.grid, placed.places, placed.index).pixels
    for row in range(len(SCATTERED)):
        one = place_tiles(slide.info, replace(tiles, corners=SCATTERED[row : row + 1]), 5)
        assert np.array_equal(read_listed(slide.reader, one.grid, one.places, one.index).pixels[0], whole[row])


@pytest.mark.parametrize("mpp", [0.5, 0.73, 1.0])
def test_a_list_made_of_a_grid_gives_its_pixels(mpp: float, slide: Slide) -> None:
    """Whose corners are rounded to level-0 px: files of ours say the exact resolution."""
    grid = make_grid(slide.info, mpp, tile=64, overlap=24)
    index = np.argwhere(np.ones((grid.rows, grid.columns), bool))[::7]
    want = np.concatenate([b.pixels for b in stream(slide.reader, grid, index, by_row=True, workers=0)])
    tiles = TileList(corners=tile_xy(grid, index)[::-1], size=64, size_level0=round(64 * mpp / 0.5), mpp=mpp)
    placed = place_tiles(slide.info, tiles, 4)
    got = read_listed(slide.reader, placed.grid, placed.places, placed.index)
    assert np.array_equal(got.pixels[::-1], want) and placed.grid.mpp == mpp


def test_blocks_are_neighbours_and_hold_each_tile_once(slide: Slide) -> None:
    """Whatever the sequence of the list: a block of the made-up grid is a small part of the slide."""
    corners = np.random.default_rng(0).permutation(np.argwhere(np.ones((17, 23), bool)) * 64)[:, ::-1]
    placed = place_tiles(slide.info, TileList(corners=corners, size=64, size_level0=64), 4)
    assert len(np.unique(placed.index, axis=0)) == len(corners)
    assert placed.grid.columns == 4 and placed.index[:, 0].max() < placed.grid.rows
    spans = [np.ptp(corners[placed.index[:, 0] // 4 == n], axis=0).max() for n in range(17 * 23 // 16)]
    assert np.median(spans) <= 8 * 64  # two cells of four tiles


def test_an_empty_list_is_no_tile(slide: Slide) -> None:
    """As TRIDENT writes where it found no tissue."""
    placed = place_tiles(slide.info, TileList(corners=np.zeros((0, 2), np.int64), size=64, size_level0=64), 4)
    assert placed.index.shape == (0, 2) and placed.places.shape == (0, 4)
    assert len(read_listed(slide.reader, placed.grid, placed.places, placed.index).pixels) == 0


GOOD: dict[str, Any] = {"corners": np.array([[0, 0]]), "size": 64, "size_level0": 128}


@pytest.mark.parametrize(
    ("facts", "said", "words"),
    [
        ({"width": 3072, "height": 1152}, {}, "for a slide of 3072 x 1152 px, and this has 1536 x 1152"),
        ({"magnification": 40.0}, {}, "slide of 40x, and this has 0.5 mpp: .*--mpp-override"),
        ({"slide_mpp": (0.25, 0.25)}, {}, "slide of 0.25 mpp, and this has 0.5: |0.5 mpp.*--mpp-override"),
        ({"corners": np.array([[0, 0], [1536, 0]])}, {}, r"1 of 2 tiles .* lie off the slide .*\(1536, 0\)"),
        ({"corners": np.array([[-128, 0]])}, {}, r"1 of 1 tiles .*\(-128, 0\)"),
        ({}, {"size": 256}, "tiles of 64 px, not 256: use --tile-size 64, or leave it out"),
        ({}, {"mpp": 0.5}, "are of 1 mpp on this slide, not 0.5: leave --mpp out"),
        ({"overlap": 16}, {"overlap": 0}, "overlap by 16 px, not 0: leave --overlap out"),
        ({"size": None, "size_level0": None}, {"size": 64}, "give --tile-size .px. and --mpp"),
        ({"size_level0": None}, {}, "give --tile-size .px. and --mpp"),
        ({"size_level0": 1 << 20}, {}, "no resolution of this slide"),
        ({"size_level0": 2}, {}, "no resolution of this slide"),
    ],
)
def test_what_does_not_fit_the_slide_is_refused(
    facts: dict[str, Any], said: dict[str, Any], words: str, slide: Slide
) -> None:
    """One line that names the fix."""
    with pytest.raises(InputError, match=words):
        place_tiles(slide.info, TileList(**GOOD | facts), 4, **said)


def test_what_a_user_says_stands_in_for_what_the_file_does_not_say(slide: Slide) -> None:
    """Features of CLAM hold coordinates and nothing else; nominal magnifications agree with the mpp they stand for."""
    placed = place_tiles(slide.info, TileList(corners=np.array([[4, 4]])), 4, size=64, mpp=1.0)
    assert (placed.grid.tile, placed.grid.scale_x, placed.grid.mpp) == (64, 2.0, 1.0)
    place_tiles(slide.info, TileList(**GOOD, magnification=20.0, target=10.0), 4, mpp=1.05, size=64)
    wide = replace(slide.info, mpp_x=0.3, mpp_y=0.3)  # TRIDENT calls this 20x
    place_tiles(wide, TileList(**GOOD, magnification=20.0, target=10.0), 4)


def test_stream_tiles_gives_the_list_in_its_sequence(tiny_slide: Path, tmp_path: Path) -> None:
    """Batches of any size, with threads or without."""
    corners = SCATTERED[[0, 1, 2, 3, 6]]
    path = trident_file(tmp_path / "a.h5", corners, size=64, slide=SIZE, target=10)
    for workers, batch_size in ((0, 2), (2, 3)):
        found = list(wsi_mmm.stream_tiles(tiny_slide, tiles=path, workers=workers, batch_size=batch_size))
        assert np.array_equal(np.concatenate([batch.xy for batch in found]), corners)
        assert [row for batch in found for row, _ in batch.index.tolist()] == [*range(5)]
        for pixels, (x, y) in zip(np.concatenate([batch.pixels for batch in found]), corners.tolist(), strict=True):
            if x + 128 <= SIZE[0] and y + 128 <= SIZE[1]:
                check_like(pixels, read_plainly(tiny_slide, (x, y), 128, 64), exact=False)


def test_tiles_of_clam_at_a_level_are_as_wide_as_its_px(tiny_slide: Path, tmp_path: Path) -> None:
    """64 px of a level of downsample 2 are 128 px of level 0."""
    path = clam_file(tmp_path / "a.h5", [[33, 61]], size=64, level=1, downsample=2.0, level_size=(768, 576))
    [batch] = wsi_mmm.stream_tiles(tiny_slide, tiles=path)
    check_like(batch.pixels[0], read_plainly(tiny_slide, (33, 61), 128, 64), exact=False)
    clam_file(tmp_path / "b.h5", [[33, 61]], size=64, level=1, downsample=2.0, level_size=(800, 576))
    with pytest.raises(InputError, match="written for a slide of 1600 x 1152 px"):
        next(wsi_mmm.stream_tiles(tiny_slide, tiles=tmp_path / "b.h5"))
