"""Tissue is found whatever the stain; glass, shade, dust and ink are not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from conftest import RealData
from wsi_mmm.errors import AnnotationError, OptionError
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.base import ReadStats, Slide
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.slides.resample.scaled import NO_FAILURES, Source, Window, read_scaled, sources_of
from wsi_mmm.tiles.find import find_tissue
from wsi_mmm.tiles.grid import make_grid, tile_boxes
from wsi_mmm.tiles.tissue import TissueMask, select_tiles, tissue_mask
from wsi_mmm.types import Block, Canvas, Level, SlideInfo

SIZE = (240, 320)
STAINS = {"haematoxylin-eosin": (0.35, 0.8, 0.45), "giemsa": (1.6, 1.5, 0.6), "pale grey": (0.14, 0.15, 0.12)}
INKS = {"green": (20, 120, 80), "blue": (30, 60, 190), "black": (30, 30, 35), "red": (200, 30, 40)}


def picture(density: np.ndarray, glass: float = 245.0) -> np.ndarray:
    return np.clip(glass * np.exp(-density), 0, 255).astype(np.uint8)


def blob(cy: float, cx: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.hypot(y - cy, x - cx) < radius


def tissue(where: np.ndarray, stain: str, seed: int = 0) -> np.ndarray:
    """Density float[h, w, 3] of tissue: a stain that varies from pixel to pixel and from gland to gland."""
    rng = np.random.default_rng(seed)
    fine, coarse = rng.normal(size=SIZE), ndimage.gaussian_filter(rng.normal(size=SIZE), 4)
    amount = np.clip(1 + 0.35 * fine + 0.3 * coarse / coarse.std(), 0.1, 3) * where
    return amount[..., None] * np.array(STAINS[stain])


def stroke(name: str, y: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """(density, where) of a pen stroke along a row: dense, streaky along its length, soft at its rim."""
    rng = np.random.default_rng(3)
    rows = np.arange(SIZE[0])
    profile = 1 / (1 + np.exp(np.clip(np.abs(rows - y) - width / 2, -40, 40)))
    streaks = 1 + 0.1 * ndimage.gaussian_filter1d(rng.normal(size=SIZE[0]), 3)
    amount = np.repeat((profile * streaks)[:, None], SIZE[1], axis=1) * (1 + 0.02 * rng.normal(size=SIZE))
    return amount[..., None] * -np.log(np.array(INKS[name]) / 256), np.repeat((profile > 0.2)[:, None], SIZE[1], axis=1)


@pytest.mark.parametrize("stain", STAINS)
def test_tissue_of_every_stain_is_found_to_its_edge(stain: str) -> None:
    where = blob(120, 160, 70)
    mask = find_tissue(picture(tissue(where, stain)))
    assert mask[where].mean() > 0.98
    assert not mask[~ndimage.binary_dilation(where, iterations=4)].any()


@pytest.mark.parametrize("glass", [190, 225, 245, 255])
@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_empty_glass_has_no_tissue(glass: int, noise: float) -> None:
    rgb = glass + np.random.default_rng(0).normal(0, noise, (*SIZE, 3)) if noise else np.full((*SIZE, 3), glass)
    assert not find_tissue(np.clip(rgb, 0, 255).astype(np.uint8)).any()


@pytest.mark.parametrize("depth", [0.05, 0.12, 0.25])
def test_shading_and_stitching_steps_are_glass(depth: float) -> None:
    where = blob(120, 100, 50)
    shade = np.linspace(0, depth, SIZE[1])[None, :, None] + np.zeros((*SIZE, 3))
    shade[:, 200:] += 0.05
    mask = find_tissue(picture(tissue(where, "haematoxylin-eosin") + shade))
    assert mask[where].mean() > 0.97
    assert mask[~ndimage.binary_dilation(where, iterations=4)].mean() < 0.001
    assert not find_tissue(picture(shade)).any()


def test_unscanned_white_around_grey_glass_is_glass() -> None:
    """A scanner fills what it skipped with pure white; the step to real glass is no tissue."""
    where = blob(120, 160, 50)
    rgb = picture(tissue(where, "haematoxylin-eosin"), glass=236)
    rgb[:40] = 255
    rgb[:, :60] = 255
    mask = find_tissue(rgb)
    assert mask[where].mean() > 0.98
    assert not mask[~ndimage.binary_dilation(where, iterations=4)].any()


@pytest.mark.parametrize("stain", STAINS)
def test_a_picture_full_of_tissue_is_all_tissue(stain: str) -> None:
    everywhere = np.ones(SIZE, bool)
    assert find_tissue(picture(tissue(everywhere, stain))).mean() > 0.99


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("ink", INKS)
def test_ink_on_glass_is_no_tissue_and_tissue_stays(stain: str, ink: str) -> None:
    where = blob(90, 160, 70)
    drawn, stroked = stroke(ink, 200, 30)
    mask = find_tissue(picture(tissue(where, stain) + drawn))
    assert mask[where & ~stroked].mean() > 0.97
    assert mask[stroked & ~ndimage.binary_dilation(where, iterations=4)].mean() < 0.02


def test_tissue_out_of_focus_is_not_taken_for_ink() -> None:
    """Without anything sharp to compare with, smooth is no proof."""
    where = blob(120, 160, 70)
    rgb = ndimage.gaussian_filter(picture(tissue(where, "haematoxylin-eosin")).astype(float), (3, 3, 0))
    assert find_tissue(rgb.astype(np.uint8))[where].mean() > 0.95


def test_dust_and_cover_slip_edges_are_out() -> None:
    """Specks of a few pixels and a long thin grey line are no tissue beside a stained section."""
    where = blob(120, 100, 60)
    density = tissue(where, "haematoxylin-eosin")
    density[:, 280:282] += 0.5
    for y, x in [(20, 20), (200, 230), (50, 240)]:
        density[y : y + 4, x : x + 4] += 1.0
    mask = find_tissue(picture(density))
    assert mask[where].mean() > 0.98
    assert not mask[:, 200:].any()
    assert not mask[:30, :30].any()


def test_finding_is_deterministic_and_takes_any_size() -> None:
    """Same pixels, same mask; one pixel is enough of a picture."""
    rgb = picture(tissue(blob(120, 160, 70), "pale grey"))
    assert (find_tissue(rgb) == find_tissue(rgb.copy())).all()
    for size in [(1, 1), (1, 50), (3, 2), (9, 9)]:
        assert find_tissue(np.full((*size, 3), 250, np.uint8)).shape == size
        assert find_tissue(np.full((*size, 3), (180, 90, 150), np.uint8)).all()


# --------------------------------------------------------------------------------------------- masks of slides


def array_slide(rgb: np.ndarray, mpp: float | None = 8.0) -> Slide:
    return Slide(ArrayReader(rgb, mpp))


@pytest.mark.parametrize("mpp", [None, 0.5, 8.0])
def test_auto_covers_the_slide_whatever_its_resolution(mpp: float | None) -> None:
    slide = array_slide(picture(tissue(np.ones(SIZE, bool), "haematoxylin-eosin")), mpp)
    found = tissue_mask(slide)
    assert found.mask.shape[1] * found.scale_x >= SIZE[1]
    assert found.mask.shape[0] * found.scale_y >= SIZE[0]


class Pyramid:
    """A Reader of one colour, whose levels of sizes rounded up are fetched from; ``fetched``: which of them."""

    def __init__(self, colour: tuple[int, int, int]) -> None:
        self.colour = colour
        width, height = 13198, 11685  # a real slide's
        sizes = [(math.ceil(width / down), math.ceil(height / down)) for down in (1, 4, 16, 32)]
        levels = tuple(Level(w, h, width / w, height / h, 256, 256) for w, h in sizes)
        self.info = SlideInfo("memory", width, height, 0.2528, 0.2528, levels, "array", "array", "0" * 32)
        self.fetched: set[int] = set()

    def read(self, block: Block) -> Canvas:
        return read_scaled(block, sources_of(self.info.levels), self._fetch)

    def stats(self) -> ReadStats:
        return ReadStats()

    def close(self) -> None:
        pass

    def _fetch(self, source: Source, window: Window, out: np.ndarray) -> np.ndarray:
        self.fetched.add(source.level)
        out[...] = self.colour
        return NO_FAILURES


def test_tissue_is_looked_for_on_the_level_that_is_coarse_enough() -> None:
    """Its px are spaced as the level's are, not by the ratio of rounded sizes: then a finer one would be fetched. Where
    there is tissue nothing finer is looked at; on bare glass cells are, on a level of two micrometres."""
    reader = Pyramid((180, 90, 150))
    found = tissue_mask(Slide(reader))
    assert reader.fetched == {3} and (found.scale_x, found.scale_y) == (32.0, 32.0)
    glass = Pyramid((245, 245, 245))
    assert not tissue_mask(Slide(glass)).mask.any() and glass.fetched == {3, 1}


def test_what_cannot_be_decoded_counts_as_tissue() -> None:
    """Otherwise a damaged tile would be skipped in silence."""
    reader = ArrayReader(np.full((*SIZE, 3), 245, np.uint8), 8.0, failed=np.array([[64, 64, 128, 128]], np.int64))
    found = tissue_mask(Slide(reader))
    assert found.mask[64:128, 64:128].all()
    assert found.mask.sum() == 64 * 64


def test_none_takes_every_tile() -> None:
    slide = array_slide(np.full((*SIZE, 3), 255, np.uint8))
    grid = make_grid(slide.info, 8.0, tile=32, overlap=8)
    assert len(select_tiles(grid, tissue_mask(slide, "none"))) == grid.rows * grid.columns


def test_polygons_select_the_tiles_they_touch(tmp_path: Path) -> None:
    """A square of one tile, in level-0 px, selects that tile only."""
    ring = [[64, 32], [96, 32], [96, 64], [64, 64], [64, 32]]
    path = tmp_path / "tissue.geojson"
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    slide = array_slide(np.full((*SIZE, 3), 255, np.uint8))
    grid = make_grid(slide.info, 8.0, tile=32, overlap=0)
    mask = tissue_mask(slide, str(path))
    assert [1, 2] in select_tiles(grid, mask).tolist()
    assert select_tiles(grid, mask, 0.5).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("1", "png"), ("P", "png"), ("RGB", "png"), ("RGBA", "png"), ("L", "tiff"), ("I;16", "tiff")],
)
def test_a_mask_picture_of_any_kind_is_scaled_to_the_slide(tmp_path: Path, mode: str, suffix: str) -> None:
    values = np.zeros((60, 80), np.uint8)
    values[15:30, 40:60] = 1
    picture_ = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values)
    if mode == "1":
        picture_ = Image.fromarray(values * 255).convert("1")
    elif mode == "P":
        picture_.putpalette([0, 0, 0, 9, 9, 9])
    elif mode in ("RGB", "RGBA"):
        picture_ = picture_.convert(mode)
    picture_.save(tmp_path / f"mask.{suffix}")
    found = tissue_mask(array_slide(np.full((*SIZE, 3), 255, np.uint8)), str(tmp_path / f"mask.{suffix}"))
    assert (found.mask == (values > 0)).all()
    assert (found.scale_x, found.scale_y) == (4.0, 4.0)


def test_what_is_no_mask_of_the_slide_is_refused(tmp_path: Path) -> None:
    """Wrong aspect, unknown words, and files that are something else each get a line."""
    slide = array_slide(np.full((*SIZE, 3), 255, np.uint8))
    Image.new("L", (100, 100)).save(tmp_path / "square.png")
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    (tmp_path / "broken.geojson").write_text('{"type": ')
    for name, error, named in [
        ("square.png", AnnotationError, "aspect"),
        ("text.png", AnnotationError, "no GeoJSON"),
        ("empty.geojson", AnnotationError, "no polygon"),
        ("broken.geojson", AnnotationError, "neither GeoJSON"),
        ("otsu", OptionError, "neither 'auto'"),
    ]:
        with pytest.raises(error, match=named) as caught:
            tissue_mask(slide, str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_black_on_transparent_is_a_mask_of_what_is_drawn(tmp_path: Path) -> None:
    """Drawing programs save outlines filled black on nothing."""
    drawn = np.zeros((60, 80, 4), np.uint8)
    drawn[15:30, 40:60, 3] = 255
    Image.fromarray(drawn).save(tmp_path / "m.png")
    found = tissue_mask(array_slide(np.full((*SIZE, 3), 255, np.uint8)), str(tmp_path / "m.png"))
    assert (found.mask == (drawn[..., 3] > 0)).all()


@pytest.mark.parametrize("alpha", [False, True])
def test_a_mask_that_selects_nothing_is_an_error(tmp_path: Path, alpha: bool) -> None:
    """All zero would end as an empty slide, exit code 0."""
    Image.fromarray(np.zeros((60, 80, 4 if alpha else 3), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(AnnotationError, match="no pixel of the mask is set"):
        tissue_mask(array_slide(np.full((*SIZE, 3), 255, np.uint8)), str(tmp_path / "m.png"))


def test_a_thumbnail_is_no_mask(tmp_path: Path) -> None:
    """White glass and coloured tissue are nonzero both: taken as a mask it would select everything."""
    picture_ = np.full((60, 80, 3), 250, np.uint8)
    picture_[15:30, 40:60] = (200, 50, 120)
    Image.fromarray(picture_).save(tmp_path / "m.png")
    with pytest.raises(AnnotationError, match=r"no mask \(a thumbnail\?\)"):
        tissue_mask(array_slide(np.full((*SIZE, 3), 255, np.uint8)), str(tmp_path / "m.png"))


def test_outlines_off_the_slide_are_an_error_that_says_where_they_lie(tmp_path: Path) -> None:
    """Outlines of another slide, or in µm, lie wholly beside it."""
    ring = [[5000, 6000], [7000, 6000], [7000, 8000], [5000, 6000]]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    with pytest.raises(AnnotationError, match=r"x 5000 to 7000, y 6000 to 8000.*px of level 0") as caught:
        tissue_mask(array_slide(np.full((*SIZE, 3), 255, np.uint8)), str(tmp_path / "a.geojson"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_of_a_viewer_is_a_mask_and_what_it_does_not_use_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str
) -> None:
    """Half of a square is on the slide, another one off it; a ruler has no area."""
    squares = [(0, 0, 0), (0, -16, 0), (0, 9000, 0), (4, 0, 0)]
    regions = "".join(
        f'<Region Type="{kind}">'
        + "".join(f'<Vertex X="{x + dx}" Y="{y + dy}"/>' for dx, dy in ((0, 0), (32, 0), (32, 32), (0, 32)))
        + "</Region>"
        for kind, x, y in squares
    )
    text = f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    found = tissue_mask(array_slide(np.full((*SIZE, 3), 255, np.uint8)), str(tmp_path / "a.xml"))
    assert found.mask[:32, :32].all() and found.mask.sum() <= 33 * 33
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "1 objects in it are no polygon" in said and "1 objects in it lie off the slide, 1 reach beyond it" in said


# --------------------------------------------------------------------------------------------- selecting tiles


@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99)
)
def test_selection_equals_counting_mask_pixels(
    height: int, width: int, tile: int, factor: int, share: float, seed: int
) -> None:
    """With a mask as fine as the grid, coverage is a count; any coarser mask is the same mask with repeated pixels."""
    coarse = np.random.default_rng(seed).random((-(-height // factor), -(-width // factor))) < 0.3
    fine = np.repeat(np.repeat(coarse, factor, axis=0), factor, axis=1)[:height, :width]
    slide = array_slide(np.zeros((height, width, 3), np.uint8))
    grid = make_grid(slide.info, 8.0, tile=tile, overlap=tile // 3)
    boxes = tile_boxes(grid, np.argwhere(np.ones((grid.rows, grid.columns), bool))).astype(int)
    means = np.array([fine[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in boxes]).reshape(grid.rows, grid.columns)
    sure, possible = means >= share + 1e-4, means >= share - 1e-4
    if share > 0:
        sure, possible = sure & (means > 0), possible & (means > 0)
    found = np.zeros((grid.rows, grid.columns), bool)
    selected = select_tiles(grid, TissueMask(coarse, float(factor), float(factor)), share)
    found[tuple(selected.T)] = True
    assert selected.dtype == np.int64
    assert selected.tolist() == np.argwhere(found).tolist()
    assert (sure <= found).all()
    assert (found <= possible).all()


def test_a_share_out_of_range_is_refused() -> None:
    slide = array_slide(np.zeros((10, 10, 3), np.uint8))
    grid = make_grid(slide.info, 8.0, tile=4, overlap=0)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(OptionError, match="min_tissue"):
            select_tiles(grid, tissue_mask(slide, "none"), share)


# --------------------------------------------------------------------------------------------- real slides


@pytest.mark.parametrize(
    ("name", "coverage", "tissue_at", "glass_at"),
    [
        ("cmu-1-small-region", (0.38, 0.46), [(0.9, 0.4), (0.36, 0.3)], [(0.5, 0.1), (0.21, 0.94)]),
        ("crohn_HE4_1.21Gpx", (0.20, 0.27), [(0.3, 0.62), (0.69, 0.46)], [(0.48, 0.83), (0.09, 0.48)]),
        ("hpylori_giemsa", (0.36, 0.45), [(0.2, 0.55), (0.85, 0.35)], [(0.55, 0.04), (0.95, 0.89), (0.3, 0.1)]),
        ("metaplasia_HE", (0.58, 0.68), [(0.45, 0.2), (0.6, 0.06)], [(0.05, 0.1), (0.97, 0.75)]),
        ("metaplasia_trypsin_IHC", (0.52, 0.61), [(0.55, 0.55), (0.67, 0.63)], [(0.2, 0.1), (0.05, 0.05)]),
        ("tcga-cr-7395-01a-01-ts1", (0.60, 0.70), [(0.6, 0.1), (0.5, 0.8)], [(0.2, 0.06), (0.93, 0.3), (0.02, 0.5)]),
    ],
)
def test_on_real_slides_tissue_is_kept_and_glass_is_not(
    real_data: RealData,
    name: str,
    coverage: tuple[float, float],
    tissue_at: list[tuple[float, float]],
    glass_at: list[tuple[float, float]],
) -> None:
    """Points (y, x) as shares of the slide were marked by eye: pale strands and pigment in, smudges and shade out."""
    with open_slide(str(real_data.slide(f"{name}.svs"))) as slide:
        mask = tissue_mask(slide).mask
    height, width = mask.shape
    assert coverage[0] < mask.mean() < coverage[1]
    assert all(mask[int(y * height), int(x * width)] for y, x in tissue_at)
    assert not any(mask[int(y * height), int(x * width)] for y, x in glass_at)
