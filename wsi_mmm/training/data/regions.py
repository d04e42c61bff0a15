"""Regions of a slide -> target of its tiles: one label, several, numbers, or a label per px.

What is known: inside use-regions everything (what is not annotated there is background), outside them nothing. On a
slide without use-regions only what the shapes say, or everything where the slide is declared ``complete``. Shapes of
the bucket "ignore", and all beyond the slide, are unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsi_mmm.training.data.buckets import CODES, IGNORE, USE
from wsi_mmm.training.data.raster import Pairs, PixelGrids, paint, pairs_of
from wsi_mmm.training.data.shapes_index import Coding, ShapeIndex, painted
from wsi_mmm.types import F32, I32, I64, Mask

SAMPLES = 32
"""Points per side of a tile at which it is asked what covers it: shares are known to about 0.1 % of the tile."""

UNKNOWN = -1
_TILES = 1024  # measured together: bounds memory, not the result


@dataclass(frozen=True, slots=True)
class SlideAnnotations:
    """The annotations of one slide as one task sees them: shapes and what they are to it, at ``scale`` level-0 px per
    target px.

    ``width``, ``height``: the slide in target px. ``labels``: how many classes. ``background``: the class of what is
    not annotated but looked at (-1: it has none, so that is unknown). ``complete``: without use-regions everything was
    looked at.
    """

    index: ShapeIndex
    coding: Coding
    scale_x: float
    scale_y: float
    width: float
    height: float
    labels: int
    background: int = UNKNOWN
    complete: bool = False

    def grids(self, xy: I64, side: int, step: float = 1.0) -> PixelGrids:
        """Squares of ``side`` px of ``step`` target px with corners at target px ``xy``."""
        return PixelGrids(xy, side, self.scale_x, self.scale_y, step)

    def pairs(self, grids: PixelGrids, wanted: Mask) -> Pairs:
        """Pair the shapes ``wanted`` with the grids they touch, in the order of painting."""
        return pairs_of(self.index, grids, wanted, self.coding.ranking)


def annotated_area_mask(annotated: SlideAnnotations, grids: PixelGrids) -> Mask:
    """bool[n, side, side]: px of the slide in which the annotator marked everything that is there."""
    shape = (len(grids.xy), grids.side, grids.side)
    if not annotated.coding.has_use:
        return np.full(shape, annotated.complete) & ~beyond(annotated, grids)
    seen = np.zeros(shape, bool)
    pairs = annotated.pairs(grids, annotated.coding.code == CODES[USE])
    paint(seen, annotated.index, grids, pairs, np.ones(len(pairs.shape), bool))
    return seen & ~beyond(annotated, grids)


def beyond(annotated: SlideAnnotations, grids: PixelGrids) -> Mask:
    """bool[n, side, side]: px whose centre is not on the slide."""
    centre = (np.arange(grids.side) + 0.5) * grids.step
    x, y = grids.xy[:, :1] + centre, grids.xy[:, 1:] + centre
    out_x, out_y = (x < 0) | (x >= annotated.width), (y < 0) | (y >= annotated.height)
    return np.asarray(out_y[:, :, None] | out_x[:, None, :], bool)


def paint_over(annotated: SlideAnnotations, grids: PixelGrids, seen: Mask, base: int, values: I32) -> I32:
    """int32[n, side, side]: ``base`` where ``seen``, over it the shapes whose ``values`` int32[n shapes] is not
    negative, or whose bucket is "ignore" (unknown); outside use-regions and beyond the slide unknown."""
    canvas = np.where(seen, np.int32(base), np.int32(UNKNOWN))
    pairs = annotated.pairs(
        grids, painted(annotated.coding.code) & ((values >= 0) | (annotated.coding.code == CODES[IGNORE]))
    )
    paint(canvas, annotated.index, grids, pairs, values[pairs.shape])
    canvas[~seen if annotated.coding.has_use else beyond(annotated, grids)] = UNKNOWN
    return canvas


def class_maps(annotated: SlideAnnotations, grids: PixelGrids) -> I32:
    """int32[n, side, side]: the class of each px, -1 unknown. Truth of `segment`."""
    seen = annotated_area_mask(annotated, grids)
    return paint_over(annotated, grids, seen, annotated.background, np.maximum(annotated.coding.code, UNKNOWN))


def label_maps(annotated: SlideAnnotations, grids: PixelGrids) -> npt.NDArray[np.int8]:
    """int8[n, K, side, side]: whether each class is at a px, 1, 0 or -1 unknown. Truth of `multisegment`.

    A class hides no other one; an "ignore" shape hides those of later rules.
    """
    seen = annotated_area_mask(annotated, grids)
    out = np.empty((len(grids.xy), annotated.labels, grids.side, grids.side), np.int8)
    for label in range(annotated.labels):
        values = np.where(annotated.coding.code == label, 1, UNKNOWN).astype(np.int32)
        out[:, label] = paint_over(annotated, grids, seen, 0, values)
    return out


# ---------------------------------------------------------------- whole tiles


def tile_labels(annotated: SlideAnnotations, xy: I64, tile: int, min_share: float) -> I32:
    """int32[n]: the class that covers at least ``min_share`` of each tile of ``tile`` target px, or -1."""
    found = []
    for grids in _sample_points(annotated, xy, tile):
        maps = class_maps(annotated, grids).reshape(len(grids.xy), -1)
        shares = np.stack([(maps == label).mean(axis=1) for label in range(annotated.labels)], axis=1)
        best = shares.argmax(axis=1)
        found.append(np.where(shares.max(axis=1) >= min_share, best, UNKNOWN).astype(np.int32))
    return np.concatenate(found) if found else np.zeros(0, np.int32)


def tile_multilabels(annotated: SlideAnnotations, xy: I64, tile: int, min_share: float) -> F32:
    """float32[n, K]: 1 where a class covers at least ``min_share`` of a tile, 0 where it cannot, whatever the unknown
    px are; NaN where these decide."""
    found = []
    for grids in _sample_points(annotated, xy, tile):
        maps = label_maps(annotated, grids).reshape(len(grids.xy), annotated.labels, -1)
        there, unknown = (maps == 1).mean(axis=2), (maps == UNKNOWN).mean(axis=2)
        surely_not = there + unknown < min_share
        found.append(np.where(there >= min_share, 1.0, np.where(surely_not, 0.0, np.nan)).astype(np.float32))
    return np.concatenate(found) if found else np.zeros((0, annotated.labels), np.float32)


def tile_values(annotated: SlideAnnotations, xy: I64, tile: int, min_share: float) -> F32:
    """float32[n, K], K the numbers of the index: the mean over the part of a tile in shapes with a label that have the
    number (on top of others), NaN where that part is less than ``min_share``."""
    found = []
    for grids in _sample_points(annotated, xy, tile):
        columns = [_mean_value(annotated, grids, name, min_share) for name in annotated.index.values]
        found.append(np.stack(columns, axis=1).astype(np.float32))
    return np.concatenate(found) if found else np.zeros((0, len(annotated.index.values)), np.float32)


def _mean_value(annotated: SlideAnnotations, grids: PixelGrids, name: str, min_share: float) -> F32:
    values = np.where(annotated.coding.code >= 0, annotated.index.values[name], np.nan)
    canvas = np.full((len(grids.xy), grids.side, grids.side), np.nan)
    drawn = np.isfinite(values) | (annotated.coding.code == CODES[IGNORE])
    pairs = annotated.pairs(grids, drawn)
    paint(canvas, annotated.index, grids, pairs, values[pairs.shape])
    if annotated.coding.has_use:
        canvas[~annotated_area_mask(annotated, grids)] = np.nan
    known = np.isfinite(canvas)
    total = np.where(known, canvas, 0.0).sum(axis=(1, 2))
    enough = known.mean(axis=(1, 2)) >= min_share
    return np.where(enough, total / np.maximum(known.sum(axis=(1, 2)), 1), np.nan).astype(np.float32)


def known_share(annotated: SlideAnnotations, xy: I64, tile: int) -> F32:
    """float32[n]: the part of each tile of which the class is known."""
    found = [(class_maps(annotated, some) >= 0).mean(axis=(1, 2)) for some in _sample_points(annotated, xy, tile)]
    return np.concatenate(found).astype(np.float32) if found else np.zeros(0, np.float32)


def label_share(annotated: SlideAnnotations, xy: I64, tile: int) -> F32:
    """float32[n]: the part of each tile of which it is known for some class whether it is there."""
    found = [
        (label_maps(annotated, some) >= 0).any(axis=1).mean(axis=(1, 2)) for some in _sample_points(annotated, xy, tile)
    ]
    return np.concatenate(found).astype(np.float32) if found else np.zeros(0, np.float32)


def looked_at_share(annotated: SlideAnnotations, xy: I64, tile: int) -> F32:
    """float32[n]: the part of each tile that was looked at."""
    found = [annotated_area_mask(annotated, some).mean(axis=(1, 2)) for some in _sample_points(annotated, xy, tile)]
    return np.concatenate(found).astype(np.float32) if found else np.zeros(0, np.float32)


def common_labels(annotated: SlideAnnotations, xy: I64, tile: int) -> I32:
    """int32[n]: the class of most px of each tile, the background only where there is no other; -1 where none is."""
    found = []
    for grids in _sample_points(annotated, xy, tile):
        maps = class_maps(annotated, grids).reshape(len(grids.xy), -1)
        counts = np.stack([(maps == label).mean(axis=1) for label in range(annotated.labels)], axis=1)
        if annotated.background >= 0:
            counts[:, annotated.background] = np.minimum(counts[:, annotated.background], 1e-6)
        found.append(np.where(counts.max(axis=1) > 0, counts.argmax(axis=1), UNKNOWN).astype(np.int32))
    return np.concatenate(found) if found else np.zeros(0, np.int32)


def _sample_points(annotated: SlideAnnotations, xy: I64, tile: int) -> Iterator[PixelGrids]:
    """Tiles, some at a time, as SAMPLES x SAMPLES points."""
    side = min(SAMPLES, tile)
    for start in range(0, len(xy), _TILES):
        yield annotated.grids(xy[start : start + _TILES], side, tile / side)


def grid_places(annotated: SlideAnnotations, tile: int, stride: int, *, touched: bool = False) -> I64:
    """Corners int64[n, 2] (x, y) in target px, row-major, of the tiles of a grid from (0, 0) that use-regions touch;
    where there are none those that labelled shapes touch, or, unless ``touched``, all of a slide that is complete."""
    across, down = (max(1, -(-int(np.ceil(side - tile)) // stride) + 1) for side in (annotated.width, annotated.height))
    y, x = np.mgrid[:down, :across].astype(np.int64) * stride
    xy = np.stack([x.ravel(), y.ravel()], axis=1)
    if annotated.complete and not annotated.coding.has_use and not touched:
        return xy
    wanted = annotated.coding.code == CODES[USE] if annotated.coding.has_use else annotated.coding.code >= 0
    grid, shape = annotated.index.touching(annotated.grids(xy, tile).boxes())
    return np.asarray(xy[np.unique(grid[wanted[shape]])], np.int64)
