"""Cells that lie scattered on glass, as in cytology: a second, finer look at a slide on which the usual one finds
hardly any tissue. Pure functions of pixels, deterministic, nothing learned.

In the picture in which tissue is looked for a cell is a pixel or two, and no more than dust. In a finer one it is a
coloured thing of a cell's size that absorbs more light than the glass around it; dust, scratches and bubbles are grey,
fibres long, ink large, pigment and rust brown. A few such things are chance; many are cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from wsi_mmm.tiles.find import OPTICAL_DENSITY, grow_mask, mean_of, spread_of
from wsi_mmm.types import F32, F64, I64, U8, Mask

CELL_MPP = 2.0
"""Resolution at which cells are looked for, where the slide's size allows."""

COARSEST_MPP = 5.0
"""Cells are not looked for coarser than this: they would be single pixels."""

LEAST_CELLS, LEAST_PER_MM2 = 20, 5.0
"""Fewer things that look like cells, within a millimetre or two, are chance: glass beside tissue has up to three."""

BESIDE_TISSUE = 10
"""Times as many are needed on a slide that has more tissue than cells, for that sheds cells."""

REACH_UM = 40.0
"""What lies within this of a cell is looked at with it, so that tiles that a cell is in are chosen."""

MARGIN_UM = 150.0
"""Context of a piece of a slide; nearer than this to something large and coloured nothing is a scattered cell."""

_DEPTH, _CHROMA, _CORE = 0.12, 0.06, 0.25  # of a px of a cell; the depth of its darkest px
_SMALLEST, _LARGEST = 25.0, 20_000.0  # um²: a small nucleus, a clump of some sixty cells
_COLOUR = 0.2  # of the depth, at least: the colour of a thing that is not grey
_LONG = 0.12  # area by squared length of what is too thin for a cell
_SHARP_MPP = 3.0  # from here on a px is as large as a nucleus: averaging would lose it
_GLASS_PX = 64  # side of the squares whose median is the glass there

PxBox = tuple[int, int, int, int]
"""x0, y0, x1, y1, px."""


@dataclass(frozen=True, slots=True)
class FoundCells:
    """Things that look like cells: ``places`` float64[n, 2], their middles (x, y) in px. ``px`` int64[m, 2]: the px
    (x, y) that they consist of, ``owner`` int64[m]: of which of them."""

    places: F64
    px: I64
    owner: I64


_NO_CELLS = FoundCells(np.zeros((0, 2)), np.zeros((0, 2), np.int64), np.zeros(0, np.int64))


def find_cells(rgb: U8, um_per_px: float) -> FoundCells:
    """Find what looks like scattered cells in uint8[h, w, 3]."""
    density = OPTICAL_DENSITY[rgb]
    if not _may_hold_cells(density):
        return _NO_CELLS
    density -= _local_glass(density)
    if um_per_px < _SHARP_MPP:
        for channel in range(3):
            density[..., channel] = ndimage.uniform_filter(density[..., channel], 3)
    depth, chroma = mean_of(density), spread_of(density)
    labels, count = ndimage.label((depth > _DEPTH) & (chroma > _CHROMA), np.ones((3, 3), bool))
    if not count:
        return _NO_CELLS
    ids = np.arange(1, count + 1)
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:] * um_per_px**2
    means = np.stack([ndimage.mean(density[..., channel], labels, ids) for channel in range(3)], axis=1)
    boxes = ndimage.find_objects(labels)
    length = np.array([np.hypot(y.stop - y.start, x.stop - x.start) for y, x in boxes]) * um_per_px
    is_cell = (
        (area >= _SMALLEST) & (area <= _LARGEST) & (area >= _LONG * length**2)
        & (ndimage.maximum(depth, labels, ids) >= _CORE)
        & (means.max(axis=1) - means.min(axis=1) >= _COLOUR * means.mean(axis=1))
        & (means[:, 2] < means[:, :2].max(axis=1))
    )  # fmt: skip
    large = np.append(False, area > _LARGEST)[labels]
    if large.any():
        beside = grow_mask(large, MARGIN_UM / um_per_px)
        is_cell &= ~np.asarray(ndimage.maximum(beside, labels, ids), bool)
    middles = np.array(ndimage.center_of_mass(labels > 0, labels, ids[is_cell])).reshape(-1, 2)[:, ::-1]
    number = np.where(np.append(False, is_cell), np.append(0, np.cumsum(is_cell)) - 1, -1)[labels]
    row, column = np.nonzero(number >= 0)
    return FoundCells(middles, np.stack([column, row], axis=1), number[row, column])


def _may_hold_cells(density: F32) -> bool:
    """Whether some px is as dark as the darkest of a cell, quickly: the glass taken off and averaging make it paler."""
    return bool(mean_of(density).max(initial=0.0) > _CORE - 1e-3)


def _local_glass(density: F32) -> F32:
    """The median density of squares, or of brighter ones nearby (a square may lie in ink), smoothly between them:
    scattered cells leave most px bare."""
    height, width = density.shape[:2]
    rows, columns = (max(1, -(-side // _GLASS_PX)) for side in (height, width))
    padded = np.pad(density, ((0, rows * _GLASS_PX - height), (0, columns * _GLASS_PX - width), (0, 0)), mode="edge")
    cut = padded.reshape(rows, _GLASS_PX, columns, _GLASS_PX, 3).swapaxes(1, 2).reshape(rows, columns, -1, 3)
    medians = ndimage.percentile_filter(np.median(cut, axis=2).astype(np.float32), 25, size=(7, 7, 1))
    y, x = ((np.arange(side) + 0.5) / _GLASS_PX - 0.5 for side in (height, width))
    at = np.meshgrid(y, x, indexing="ij")
    layers = [ndimage.map_coordinates(medians[..., channel], at, order=1, mode="nearest") for channel in range(3)]
    return np.stack(layers, axis=2).astype(np.float32)


def dense_enough(places: F64, size: tuple[float, float], factor: float = 1.0) -> Mask:
    """Choose those of ``places`` float64[n, 2] (x, y), micrometres on a slide of ``size`` (width, height), that have so
    many others within the nine square millimetres around that these are no chance: bool[n]."""
    columns, rows = (max(1, math.ceil(side / 1000)) for side in size)
    column, row = np.minimum((places / 1000).astype(np.int64), (columns - 1, rows - 1)).T
    counts = np.zeros((rows, columns))
    np.add.at(counts, (row, column), 1.0)
    area = np.outer(
        *(np.minimum(np.arange(n) + 1, side / 1000) - np.arange(n) for n, side in ((rows, size[1]), (columns, size[0])))
    )
    around = [ndimage.uniform_filter(one, 3, mode="constant") * 9 for one in (counts, area)]
    needed = factor * np.maximum(LEAST_CELLS, LEAST_PER_MM2 * around[1])
    return np.asarray((around[0] + 1e-6 >= needed)[row, column], bool)


def split_picture(width: int, height: int, side: int, margin: int) -> Iterator[tuple[PxBox, PxBox]]:
    """Yield squares of ``side`` px that together cover a picture, and each with what the picture has within ``margin``
    px of it."""
    for y in range(0, height, side):
        for x in range(0, width, side):
            core = x, y, min(x + side, width), min(y + side, height)
            wide = max(x - margin, 0), max(y - margin, 0), min(core[2] + margin, width), min(core[3] + margin, height)
            yield core, wide
