"""The area of the tissue that a run looks at: on the whole slide and in polygons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.annotations import draw_shape
from wsi_mmm.tiles.tissue import TissueMask
from wsi_mmm.types import F64, I64, Grid, Mask, SlideInfo

FINE = 1024
"""Px of the longer side of a mask in which the tissue of tiles is looked up, at least."""

SAMPLES = 256
"""Px of the longer side of the picture of a polygon in which the share that is tissue is counted."""


def tissue_of_tiles(grid: Grid, mask: TissueMask, index: I64) -> TissueMask:
    """The part of the tissue that lies in tiles ``index`` int64[n, 2] (row, column); px count by their middles."""
    times = math.ceil(FINE / max(mask.mask.shape))
    fine = np.repeat(np.repeat(mask.mask, times, axis=0), times, axis=1)
    found = TissueMask(fine, mask.scale_x / times, mask.scale_y / times)
    rows = _px_between(grid, index[:, 0], grid.scale_y / found.scale_y, fine.shape[0])
    columns = _px_between(grid, index[:, 1], grid.scale_x / found.scale_x, fine.shape[1])
    steps = np.zeros((fine.shape[0] + 1, fine.shape[1] + 1), np.int32)
    for row, sign in zip(rows, (1, -1), strict=True):
        np.add.at(steps, (row, columns[0]), sign)
        np.add.at(steps, (row, columns[1]), -sign)
    covered = steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    return TissueMask(fine & covered, found.scale_x, found.scale_y)


def _px_between(grid: Grid, numbers: I64, ratio: float, limit: int) -> tuple[I64, I64]:
    """First px of a side whose middle lies in tiles ``numbers``, and the first one beyond it."""
    start = numbers.astype(np.float64) * grid.stride * ratio
    ends = (np.ceil(edge - 0.5 - 1e-9) for edge in (start, start + grid.tile * ratio))
    low, high = (np.clip(end, 0, limit).astype(np.int64) for end in ends)
    return low, high


def tissue_area(mask: TissueMask, info: SlideInfo) -> float:
    """Level-0 px² of tissue on the slide; px of the mask that reach beyond its edge count as far as they lie on it."""
    height, width = mask.mask.shape
    edges_y = np.minimum(np.arange(height + 1) * mask.scale_y, info.height)
    edges_x = np.minimum(np.arange(width + 1) * mask.scale_x, info.width)
    return float(np.diff(edges_y) @ (mask.mask @ np.diff(edges_x)))


def tissue_areas_within(mask: TissueMask, geometries: Sequence[Any], info: SlideInfo) -> F64:
    """Level-0 px² of tissue in each polygon: its area on the slide, times the share of its px that are tissue."""
    return np.array([_tissue_within(mask, one, info) for one in geometries], np.float64)


def _tissue_within(mask: TissueMask, geometry: Any, info: SlideInfo) -> float:
    drawn = draw_shape(geometry, info.width, info.height, SAMPLES)
    if drawn is None:
        return 0.0
    height, width = drawn.mask.shape
    rows = _px_at(drawn.y0 + (np.arange(height) + 0.5) * drawn.step, mask.scale_y, mask.mask.shape[0])
    columns = _px_at(drawn.x0 + (np.arange(width) + 0.5) * drawn.step, mask.scale_x, mask.mask.shape[1])
    tissue: Mask = mask.mask[np.ix_(rows, columns)]
    return drawn.area * float(np.count_nonzero(tissue & drawn.mask)) / int(np.count_nonzero(drawn.mask))


def _px_at(places: npt.NDArray[np.floating[Any]], scale: float, limit: int) -> I64:
    found: I64 = np.clip(places / scale, 0, limit - 1).astype(np.int64)
    return found
