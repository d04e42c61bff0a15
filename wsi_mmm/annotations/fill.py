"""Shapes -> a mask of px."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi_mmm.annotations.shapes import Shape, Shapes
from wsi_mmm.errors import AnnotationError
from wsi_mmm.types import F64, Mask

MAX_OUTLINE_PX = 1 << 25
"""Length of all outlines in px of the mask: twice the px of the largest mask that they are drawn into."""

_STEP = 0.5  # px between the points at which an outline is looked at
_TOGETHER = 1 << 21  # px of outlines drawn together: bounds memory, not the result


def rasterise(
    shapes: Shapes, size: tuple[int, int], *, scale_x: float, scale_y: float, name: str = "annotations"
) -> Mask:
    """A mask bool[height, width] of ``size`` (height, width) px of ``scale`` level-0 px, True where a shape is.

    A pixel is set when its centre is inside a shape or an outline passes through it, so no shape vanishes. Raises
    AnnotationError, with ``name``, for outlines that are too long to be drawn.
    """
    height, width = size
    whole = np.array([item.geometry for item in shapes], object)
    parts = shapely.get_parts(shapely.transform(whole, lambda xy: xy / (scale_x, scale_y)))
    bounds = np.floor(shapely.bounds(parts).reshape(-1, 4))
    there = (bounds[:, 0] < width) & (bounds[:, 1] < height) & (bounds[:, 2] >= 0) & (bounds[:, 3] >= 0)
    parts, bounds = parts[there], bounds[there]
    winding = np.zeros((height, width + 1), np.int32)
    _count_windings(winding, parts, name)
    mask = np.asarray(np.cumsum(winding, axis=1, out=winding)[:, :width] > 0, bool)
    _draw_lines(mask, _lines_within(parts, bounds, size), name)
    return mask


@dataclass(frozen=True, slots=True)
class DrawnShape:
    """A polygon drawn into a mask that just holds it: px (i, j) covers level-0 px from (x0 + j * step, y0 + i * step)
    on. ``area``: its level-0 px²."""

    mask: Mask
    x0: float
    y0: float
    step: float
    area: float


def draw_shape(geometry: Any, width: float, height: float, side: int) -> DrawnShape | None:
    """The part of a polygon on a slide of ``width`` x ``height`` level-0 px, in a mask of at most ``side`` px a side.
    None when nothing of it lies there."""
    cut = shapely.intersection(geometry, shapely.box(0, 0, width, height))
    if not cut.area > 0:
        return None
    x0, y0, x1, y1 = cut.bounds
    step = max(x1 - x0, y1 - y0) / side
    size = max(1, math.ceil((y1 - y0) / step)), max(1, math.ceil((x1 - x0) / step))
    moved = Shape(shapely.transform(cut, lambda xy: xy - (x0, y0)))
    mask = rasterise(Shapes((moved,)), size, scale_x=step, scale_y=step)
    return DrawnShape(mask, x0, y0, step, cut.area)


def _count_windings(winding: npt.NDArray[np.int32], parts: Any, name: str) -> None:
    """Add to ``winding`` int32[h, w + 1] what, summed along rows, is the number of ``parts`` round each px centre."""
    height, width = winding.shape[0], winding.shape[1] - 1
    rings, part = shapely.get_rings(parts, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    if not len(xy):
        return
    keep = ring[1:] == ring[:-1]
    a, b, ring = xy[:-1][keep], xy[1:][keep], ring[1:][keep]
    twice = np.bincount(ring, a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1], len(rings))
    is_hole = np.append(False, part[1:] == part[:-1])
    sign = (np.where(is_hole, 1, -1) * np.sign(twice)).astype(np.int32)[ring]
    top, end = (
        np.clip(np.ceil(side(a[:, 1], b[:, 1]) - 0.5), 0, height).astype(np.int64) for side in (np.minimum, np.maximum)
    )
    some = np.flatnonzero(end > top)
    a, b, top, rows = a[some], b[some], top[some], (end - top)[some]
    sign = sign[some] * np.sign(b[:, 1] - a[:, 1]).astype(np.int32)
    _check_length(float(rows.sum()), name)
    for chunk in _chunks(rows.astype(np.float64)):
        edge = np.repeat(np.arange(chunk.start, chunk.stop), rows[chunk])
        first = np.cumsum(rows[chunk]) - rows[chunk]
        row = np.arange(len(edge)) - np.repeat(first - top[chunk], rows[chunk])
        slope = (b[edge, 0] - a[edge, 0]) / (b[edge, 1] - a[edge, 1])
        x = a[edge, 0] + (row + 0.5 - a[edge, 1]) * slope
        column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        np.add.at(winding, (row, column), sign[edge])


def _lines_within(parts: Any, bounds: F64, size: tuple[int, int]) -> Any:
    """The outlines of ``parts``, of floored ``bounds``; those that reach beyond the mask are cut to it: what lies
    outside takes no memory."""
    height, width = size
    lines = shapely.boundary(parts)
    out = (bounds[:, :2] < 0).any(axis=1) | (bounds[:, 2] >= width) | (bounds[:, 3] >= height)
    for number in np.flatnonzero(out).tolist():
        x0, y0, x1, y1 = bounds[number]
        box = max(x0, 0), max(y0, 0), min(x1 + 1, width), min(y1 + 1, height)
        lines[number] = shapely.clip_by_rect(lines[number], *box)
    return lines


def _draw_lines(mask: Mask, lines: Any, name: str) -> None:
    """Set the px of ``mask`` that lines pass through."""
    length = shapely.length(lines)
    _check_length(float(length.sum()), name)
    for number in np.flatnonzero(length > _TOGETHER).tolist():
        xy, line = shapely.get_coordinates(shapely.get_parts(lines[number]), return_index=True)
        pairs = np.stack([xy[:-1], xy[1:]], axis=1)[line[1:] == line[:-1]]
        for chunk in _chunks(np.hypot(*(pairs[:, 1] - pairs[:, 0]).T)):
            _draw_points(mask, shapely.linestrings(pairs[chunk]))
    short = np.flatnonzero(length <= _TOGETHER)
    for chunk in _chunks(length[short] + shapely.get_num_coordinates(lines[short])):
        _draw_points(mask, lines[short[chunk]])


def _draw_points(mask: Mask, lines: Any) -> None:
    at = shapely.get_coordinates(shapely.segmentize(lines, _STEP))
    x, y = np.floor(at).astype(np.int64).T
    keep = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
    mask[y[keep], x[keep]] = True


def _chunks(cost: F64) -> Iterator[slice]:
    """Runs of items that cost about `_TOGETHER`, at least one."""
    before: F64 = np.concatenate([np.zeros(1), np.cumsum(cost)])
    begin = 0
    while begin < len(cost):
        end = max(begin + 1, int(np.searchsorted(before, before[begin] + _TOGETHER, "right")) - 1)
        yield slice(begin, end)
        begin = end


def _check_length(length: float, name: str) -> None:
    if not math.isfinite(length) or length > MAX_OUTLINE_PX:
        raise AnnotationError(
            f"{name}: its outlines are {length:.1e} px long in the mask, at most {MAX_OUTLINE_PX:.1e}: simplify them, "
            "or give a mask picture"
        )
