"""Cells scattered on glass are found where there is hardly any tissue; dust, fibres, ink and noise are none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from conftest import RealData
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.base import Slide
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.tiles import cells, tissue
from wsi_mmm.tiles.cells import dense_enough, find_cells, split_picture
from wsi_mmm.tiles.find import find_tissue
from wsi_mmm.tiles.grid import make_grid
from wsi_mmm.tiles.tissue import select_tiles, tissue_mask
from wsi_mmm.types import Block

GLASS = (236.0, 233.0, 238.0)
STAINS = {"giemsa": (1.1, 1.5, 0.7), "haematoxylin": (0.7, 0.75, 0.35), "papanicolaou": (0.9, 0.6, 0.3)}


def glass(side: int, noise: float = 2.0) -> np.ndarray:
    """Density float[side, side, 3] of bare glass with the noise of a camera, in grey levels."""
    return np.random.default_rng(1).normal(0, noise / 240, (side, side, 3))


def rgb(density: np.ndarray) -> np.ndarray:
    return np.clip(np.array(GLASS) * np.exp(-density), 0, 255).astype(np.uint8)


def dots(side: int, places: np.ndarray, radius: float) -> np.ndarray:
    """float[side, side]: 1 in discs round ``places`` int[n, 2] (x, y)."""
    far = np.ones((side, side), bool)
    far[places[:, 1], places[:, 0]] = False
    return (ndimage.distance_transform_edt(far) <= radius).astype(float)


def scattered(
    side: int, per_mm2: float, mpp: float = 1.0, stain: str = "giemsa", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Cells of 13 um with a nucleus of 8 um: (density, their places int[n, 2])."""
    rng = np.random.default_rng(seed)
    count = round(per_mm2 * (side * mpp / 1000) ** 2)
    places = rng.integers(20, side - 20, (count, 2))
    amount = dots(side, places, 4.0 / mpp) + 0.25 * dots(side, places, 6.5 / mpp)
    return ndimage.gaussian_filter(amount, 0.5)[..., None] * np.array(STAINS[stain]), places


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("mpp", [1.0, 2.0])
def test_scattered_cells_are_found_with_what_is_around_them(stain: str, mpp: float) -> None:
    """Eighty cells on a square millimetre, which the usual look does not see; tiles with cells are chosen."""
    side = round(1200 / mpp)
    density, places = scattered(side, 80, mpp, stain)
    picture = rgb(density + glass(side))
    coarse = round(8 / mpp)
    small = picture[: side // coarse * coarse, : side // coarse * coarse].reshape(side // coarse, coarse, -1, coarse, 3)
    assert find_tissue(small.mean(axis=(1, 3)).round().astype(np.uint8), 8.0).mean() < tissue.HARDLY_ANY
    slide = Slide(ArrayReader(picture, mpp))
    found = tissue_mask(slide)
    at = (places / (found.scale_x, found.scale_y)).astype(int)
    assert found.mask[at[:, 1], at[:, 0]].mean() > 0.97
    assert 0.2 < found.mask.mean() < 0.6
    chosen = {tuple(one) for one in select_tiles(make_grid(slide.info, mpp, tile=64, overlap=0), found, 0.02).tolist()}
    assert np.mean([(y // 64, x // 64) in chosen for x, y in places.tolist()]) > 0.97


@pytest.mark.parametrize(("darkest", "closely"), [(0.1, False), (0.2, True), (0.3, True), (0.6, True)])
def test_bare_glass_is_told_at_once(darkest: float, closely: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture without a px as dark as a cell's darkest is not looked at closely: a close look finds nothing there."""
    density, _ = scattered(300, 300, 2.0)
    picture = rgb(density * (darkest / density.mean(axis=2).max()) + glass(300, 0.2))
    looks: list[int] = []
    real = cells._local_glass
    monkeypatch.setattr(cells, "_local_glass", lambda given: looks.append(1) or real(given))
    found = find_cells(picture, 2.0)
    assert bool(looks) == closely
    monkeypatch.setattr(cells, "_may_hold_cells", lambda _: True)
    assert np.array_equal(find_cells(picture, 2.0).px, found.px)
    assert bool(len(found.places)) == (darkest > 0.25)


@pytest.mark.parametrize("noise", [1.0, 8.0, 15.0])
def test_noise_on_glass_is_no_cell(noise: float) -> None:
    """Of a camera, of many kinds."""
    assert not len(find_cells(rgb(glass(600, noise)), 2.0).places)
    assert not tissue_mask(Slide(ArrayReader(rgb(glass(600, noise)), 1.0))).mask.any()


@pytest.mark.parametrize("what", ["dust", "black dust", "pigment", "fibres", "ink", "shade", "precipitate"])
def test_what_lies_on_glass_is_no_cell(what: str) -> None:
    """Grey or brown specks of a cell's size, long blue things, large blue things with splashes round them, stain of a
    micrometre."""
    side = 1000
    _, places = scattered(side, 60, seed=2)
    colours = {"dust": (0.4, 0.41, 0.39), "black dust": (2.0, 2.1, 1.9), "pigment": (0.5, 0.8, 1.4)}
    blue = np.array(STAINS["giemsa"])
    if what in colours:
        density = dots(side, places, 5.0)[..., None] * np.array(colours[what])
    elif what == "fibres":
        lines = np.zeros((side, side))
        for n, (x, y) in enumerate(places[:40].tolist()):
            lines[max(y - 3, 0) : y + 4, x : x + 120] += n % 2
            lines[y : y + 120, max(x - 3, 0) : x + 4] += (n + 1) % 2
        density = np.minimum(lines, 1)[..., None] * blue
    elif what == "ink":
        stroke, splash = dots(side, np.array([[500, 500]]), 120.0), dots(side, np.array([[500, 640]]), 9.0)
        density = (stroke + splash)[..., None] * blue
    elif what == "shade":
        step = np.linspace(0, 0.4, side)[:, None] + 0.2 * (np.arange(side) > 400)
        density = np.repeat(step[..., None], 3, axis=2)
    else:
        density = dots(side, places, 0.7)[..., None] * blue
    picture = rgb(density + glass(side))
    assert len(find_cells(picture, 1.0).places) <= 1
    if what not in (
        "fibres",
        "ink",
        "shade",
    ):  # on so small a slide the usual look takes these for tissue
        assert not tissue_mask(Slide(ArrayReader(picture, 1.0))).mask.any()


def test_few_cells_are_chance_unless_they_are_asked_for() -> None:
    """Nine on a square millimetre and a half."""
    density, places = scattered(1200, 6)
    slide = Slide(ArrayReader(rgb(density + glass(1200)), 1.0))
    assert not tissue_mask(slide).mask.any()
    asked = tissue_mask(slide, "cells")
    at = (places / (asked.scale_x, asked.scale_y)).astype(int)
    assert asked.mask[at[:, 1], at[:, 0]].all() and asked.mask.mean() < 0.05


def test_cells_beside_tissue_are_looked_for_when_they_are_asked_for() -> None:
    """`auto` does not look twice at a slide with tissue."""
    density, places = scattered(1500, 60)
    rng = np.random.default_rng(0)
    density[:400, :400] = (0.3 + 0.25 * rng.random((400, 400, 1))) * np.array(STAINS["haematoxylin"])
    slide = Slide(ArrayReader(rgb(density + glass(1500)), 1.0))
    auto, both = tissue_mask(slide), tissue_mask(slide, "cells")
    away = places[(places > 480).any(axis=1)]
    at = (away / (both.scale_x, both.scale_y)).astype(int)
    assert 0.05 < auto.mask.mean() < 0.15 and (both.mask >= auto.mask).all()
    assert auto.mask[at[:, 1], at[:, 0]].mean() < 0.1 and both.mask[at[:, 1], at[:, 0]].mean() > 0.95


def test_clusters_do_not_hide_the_cells_around_them() -> None:
    """Forty cells on a square millimetre, and one cluster that the usual look takes for tissue."""
    density, places = scattered(1200, 40, 2.0)
    texture = np.random.default_rng(0).random((60, 60, 1))
    density[600:660, 600:660] = (0.3 + 0.25 * texture) * np.array(STAINS["giemsa"])
    slide = Slide(ArrayReader(rgb(density + glass(1200)), 2.0))
    assert 0 < tissue._find_tissue(slide).mask.mean() < tissue.HARDLY_ANY
    found = tissue_mask(slide)
    at = (places / (found.scale_x, found.scale_y)).astype(int)
    assert found.mask[at[:, 1], at[:, 0]].mean() > 0.95


def test_pieces_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells on the seams are found once, whole."""
    density, _ = scattered(1200, 60)
    slide = Slide(ArrayReader(rgb(density + glass(1200)), 1.0))
    scale = np.array([2.0, 2.0])
    whole = tissue._cells_of(slide, scale, 2.0)
    monkeypatch.setattr(tissue, "_CORE_PX", 256)
    parts = tissue._cells_of(slide, scale, 2.0)
    assert abs(len(parts.places) - len(whole.places)) <= 0.02 * len(whole.places) > 0
    assert len(np.unique(parts.owner)) == len(parts.places) and parts.owner.max() == len(parts.places) - 1


def test_pieces_cover_a_picture_once() -> None:
    """Their cores, each inside of what is read for it."""
    seen = np.zeros((70, 130), int)
    for core, wide in split_picture(130, 70, 48, 10):
        seen[core[1] : core[3], core[0] : core[2]] += 1
        assert wide[0] >= 0 and wide[1] >= 0 and wide[2] <= 130 and wide[3] <= 70
        assert wide[0] <= core[0] and wide[2] >= core[2]
    assert (seen == 1).all()


def test_cells_are_dense_enough_by_their_neighbourhood() -> None:
    """A cluster on a large slide counts, the same number all over it does not; more are needed beside tissue."""
    rng = np.random.default_rng(0)
    size = (20_000.0, 10_000.0)
    cluster, strewn = rng.uniform(4000, 6000, (100, 2)), rng.uniform(0, 1, (100, 2)) * size
    assert dense_enough(np.concatenate([cluster, strewn]), size)[:100].all()
    assert not dense_enough(strewn, size).any()
    assert not dense_enough(cluster, size, 10).any()
    assert dense_enough(rng.uniform(0, 500, (20, 2)), (500.0, 500.0)).all()


def test_real_cells_on_glass_are_found(real_data: RealData) -> None:
    """Cells of May-Gruenwald-Giemsa cut out of their picture and laid on glass, 80 on a square millimetre."""
    with open_slide(real_data.file("stains/csf_mgg.tif")) as slide:
        pixels = slide.reader.read(Block(0, 0, 1152, 1152, 4.0, 4.0)).pixels
    labels, _ = ndimage.label(ndimage.binary_opening(pixels.mean(axis=2) < 190))
    area = np.bincount(labels.ravel())
    boxes = ndimage.find_objects(labels)
    single = [
        (n, box)
        for n, box in enumerate(boxes, start=1)
        if 80 < area[n] < 350 and max(s.stop - s.start for s in box) < 26
    ]
    assert len(single) > 20
    side, rng = 1500, np.random.default_rng(0)
    picture = rgb(glass(side))
    places = rng.integers(30, side - 60, (180, 2))
    for k, (x, y) in enumerate(places.tolist()):
        number, box = single[k % len(single)]
        cell, where = pixels[box], ndimage.binary_dilation(labels[box] == number)
        picture[y : y + cell.shape[0], x : x + cell.shape[1]][where] = cell[where]
    found = tissue_mask(Slide(ArrayReader(picture, 1.0112)))
    at = ((places + 6) / (found.scale_x, found.scale_y)).astype(int)
    assert found.mask[at[:, 1], at[:, 0]].mean() > 0.97
