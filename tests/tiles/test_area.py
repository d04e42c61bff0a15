"""The area of the tissue that a run looked at, against areas that are known or counted another way."""

from __future__ import annotations

import numpy as np
import pytest
from shapely.geometry import Polygon, box

from wsi_mmm.tiles.area import tissue_area, tissue_areas_within, tissue_of_tiles
from wsi_mmm.tiles.grid import make_grid
from wsi_mmm.tiles.tissue import TissueMask, select_tiles
from wsi_mmm.types import SlideInfo

INFO = SlideInfo("s", 4000, 3000, 0.5, 0.5, (), "v", "r", "f")
WHOLE = TissueMask(np.ones((1, 1), bool), 4000.0, 3000.0)


def blobs(seed: int, scale: float) -> TissueMask:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: int(np.ceil(3000 / scale)), : int(np.ceil(4000 / scale))]
    mask = np.zeros(y.shape, bool)
    for cy, cx, r in rng.uniform(0, 1, (6, 3)):
        mask |= np.hypot(y - cy * y.shape[0], x - cx * y.shape[1]) < r * y.shape[0] / 3
    return TissueMask(mask, scale, scale)


@pytest.mark.parametrize("overlap", [0, 64, 128])
@pytest.mark.parametrize("scale", [16.0, 37.5])
def test_every_px_of_tissue_in_a_tile_counts_once(overlap: int, scale: float) -> None:
    """Overlapping tiles do not count twice, dropped tiles not at all: compared with a look at every 4th px."""
    mask = blobs(3, scale)
    grid = make_grid(INFO, 1.0, tile=256, overlap=overlap)
    index = select_tiles(grid, mask, 0.9)
    y, x = np.mgrid[2:3000:4, 2:4000:4]
    covered = np.zeros(y.shape, bool)
    for row, column in index.tolist():
        top, left = row * grid.stride * 2, column * grid.stride * 2
        covered |= (y >= top) & (y < top + 512) & (x >= left) & (x < left + 512)
    wanted = 16 * np.count_nonzero(covered & mask.mask[(y / scale).astype(int), (x / scale).astype(int)])
    found = tissue_area(tissue_of_tiles(grid, mask, index), INFO)
    assert 0 < found < tissue_area(mask, INFO)
    assert found == pytest.approx(wanted, rel=0.01)


def test_a_slide_without_glass_is_its_own_size() -> None:
    """Exactly: nothing is lost at the far edges, where tiles and px reach beyond."""
    grid = make_grid(INFO, 0.7, tile=256, overlap=32)
    index = select_tiles(grid, WHOLE, 0.0)
    assert tissue_area(tissue_of_tiles(grid, WHOLE, index), INFO) == pytest.approx(4000 * 3000, rel=1e-12)
    assert tissue_area(tissue_of_tiles(grid, WHOLE, index[:0]), INFO) == 0


def test_regions_have_the_tissue_that_lies_in_them() -> None:
    """Wholly in tissue: the polygon's area to the digit, as far as it is on the slide; partly: its share."""
    mask = np.zeros((300, 400), bool)
    mask[:, :200] = True
    half = TissueMask(mask, 10.0, 10.0)
    triangle = Polygon([(100, 100), (1900, 400), (300, 1700)])
    disc = Polygon(
        np.array([2000, 1500]) + 900 * np.stack([f(np.linspace(0, 6.2831, 400)) for f in (np.cos, np.sin)], 1)
    )
    beyond, glass = box(-500, -500, 500, 500), box(2500, 100, 3000, 200)
    tiny = box(1990, 1000, 2010, 1010)
    found = tissue_areas_within(half, [triangle, disc, beyond, glass, tiny, box(9000, 0, 9100, 50)], INFO)
    wanted = [triangle.area, disc.area / 2, 250_000, 0, 100, 0]
    assert found[0] == pytest.approx(wanted[0], rel=1e-12) and found[2] == pytest.approx(250_000, rel=1e-12)
    assert found == pytest.approx(wanted, rel=0.01)
