"""Annotations of a slide -> targets of its tiles: labels, numbers, a label or an instance per px, boxes.

What is known: inside use-regions everything (what is not annotated there is background), outside them nothing. On a
slide without use-regions only what the shapes say, or everything where the slide is declared ``complete``. Shapes of
the bucket "ignore", and all beyond the slide, are unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.errors import ConfigError
from wsi_mmm.tasks.targets import Boxes, Target
from wsi_mmm.training.data.buckets import CODES, DROP, IGNORE, USE, Buckets
from wsi_mmm.training.data.points import Points, mark_points
from wsi_mmm.training.data.raster import Coding, Pairs, PixelGrids, ShapeIndex, encode, paint, pairs_of
from wsi_mmm.training.warp import box_areas, rectangles
from wsi_mmm.types import F32, F64, I32, I64, Mask

SAMPLES = 32
"""Points per side of a tile at which it is asked what covers it: shares are known to about 0.1 % of the tile."""

CELL = 8
"""Unknown area is given to detectors in cells of so many px: a cell is unknown when any of its px is."""

UNKNOWN = -1
OUTLINE = 2.5
"""Radii of a point's disc within which the outline of its cell may be."""

_TILES = 1024  # measured together: bounds memory, not the result
TILE_LEVEL_KINDS = ("classify", "multilabel", "regress")
MAP_KINDS = ("segment", "multisegment", "instances", "detect")
_PX = 1 << 20  # drawn together


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
    code = annotated.coding.code
    drawn = (code != CODES[USE]) & (code != CODES[DROP]) & ((values >= 0) | (code == CODES[IGNORE]))
    pairs = annotated.pairs(grids, drawn)
    paint(canvas, annotated.index, grids, pairs, values[pairs.shape])
    canvas[~seen if annotated.coding.has_use else beyond(annotated, grids)] = UNKNOWN
    return canvas


def class_maps(annotated: SlideAnnotations, grids: PixelGrids) -> I32:
    """int32[n, side, side]: the class of each px, -1 unknown. For `segment`."""
    seen = annotated_area_mask(annotated, grids)
    return paint_over(annotated, grids, seen, annotated.background, np.maximum(annotated.coding.code, UNKNOWN))


def label_maps(annotated: SlideAnnotations, grids: PixelGrids) -> npt.NDArray[np.int8]:
    """int8[n, K, side, side]: whether each class is at a px, 1, 0 or -1 unknown. For `multisegment`.

    A class hides no other one; an "ignore" shape hides those of later rules.
    """
    seen = annotated_area_mask(annotated, grids)
    out = np.empty((len(grids.xy), annotated.labels, grids.side, grids.side), np.int8)
    for label in range(annotated.labels):
        values = np.where(annotated.coding.code == label, 1, UNKNOWN).astype(np.int32)
        out[:, label] = paint_over(annotated, grids, seen, 0, values)
    return out


def object_maps(annotated: SlideAnnotations, grids: PixelGrids) -> I32:
    """int32[n, side, side]: 0 where there is no object, its number in the slide + 1 where one is, -1 unknown. For
    `instances`. An object that the square's rim cuts keeps its number, so squares side by side agree."""
    seen = annotated_area_mask(annotated, grids)
    numbers = np.where(annotated.coding.code >= 0, np.arange(1, len(annotated.index) + 1), UNKNOWN).astype(np.int32)
    return paint_over(annotated, grids, seen, 0, numbers)


def classed_object_maps(annotated: SlideAnnotations, grids: PixelGrids) -> npt.NDArray[np.int32]:
    """int32[n, 2, side, side]: objects as `object_maps` numbers them, and their classes (-1: unknown). For `instances`
    with several classes. Points teach their class in their disc, and nothing of outlines within `OUTLINE` radii."""
    index, code = annotated.index, annotated.coding.code
    outlined = np.arange(len(index)) < len(index) - index.dots
    radius = _dot_radius(annotated)
    margin = int(np.ceil(OUTLINE * radius)) if index.dots else 0
    wide = PixelGrids(grids.xy - margin, grids.side + 2 * margin, grids.scale_x, grids.scale_y)
    seen = annotated_area_mask(annotated, wide)
    numbers = np.where(outlined & (code >= 0), np.arange(1, len(index) + 1), UNKNOWN).astype(np.int32)
    labels = paint_over(annotated, wide, seen, 0, numbers)
    classes = np.where(labels > 0, np.maximum(code, UNKNOWN)[np.maximum(labels, 1) - 1], UNKNOWN).astype(np.int32)
    pairs = annotated.pairs(wide, ~outlined & (code >= 0))
    at = middles(annotated)[pairs.shape] - wide.xy[pairs.grid]
    for number in range(len(wide.xy) if len(pairs.shape) else 0):
        mine = pairs.grid == number
        inside = mine & ((at >= 0) & (at < wide.side)).all(axis=1)
        if annotated.coding.has_use:
            column, row = at[inside].astype(np.int64).T
            inside[inside] = seen[number, row, column]
        points = Points(at[inside], code[pairs.shape[inside]])
        mark_points(labels[number], classes[number], points, radius, OUTLINE * radius)
    crop = slice(margin, margin + grids.side)
    return np.stack([labels[:, crop, crop], classes[:, crop, crop]], axis=1)


def _dot_radius(annotated: SlideAnnotations) -> float:
    """Target px of the discs that stand for points."""
    boxes = annotated.index.boxes[len(annotated.index) - annotated.index.dots :][:1]
    return float(((boxes[:, 2] - boxes[:, 0]) / (2 * annotated.scale_x)).sum())


def object_boxes(annotated: SlideAnnotations, grids: PixelGrids, min_visible: float) -> list[Boxes]:
    """The boxes of each square, cut at its rim. Labelled -1: boxes of which less than the share ``min_visible`` is
    inside, those whose middle is unknown, and the rectangles of area in which nothing is known."""
    maps = object_maps(annotated, grids)
    pairs = annotated.pairs(grids, annotated.coding.code >= 0)
    scale = (annotated.scale_x, annotated.scale_y) * 2
    corner = grids.xy[pairs.grid]
    whole = annotated.index.boxes[pairs.shape] / scale - np.concatenate([corner, corner], axis=1)
    cut = np.clip(whole, 0, grids.side)
    labels = annotated.coding.code[pairs.shape].copy()
    at = np.minimum((cut[:, :2] + cut[:, 2:]) / 2, grids.side - 1).astype(np.int64)
    hidden = maps[pairs.grid, at[:, 1], at[:, 0]] < 0
    labels[hidden | (box_areas(cut) < min_visible * box_areas(whole))] = UNKNOWN
    keep = box_areas(cut) > 0
    out = []
    for number in range(len(grids.xy)):
        mine = keep & (pairs.grid == number)
        unknown = _unknown_boxes(maps[number])
        xyxy = np.concatenate([cut[mine].astype(np.float32), unknown])
        both = np.concatenate([labels[mine], np.full(len(unknown), UNKNOWN, np.int32)])
        out.append(Boxes(xyxy, both, grids.side, grids.side))
    return out


def _unknown_boxes(labels: I32) -> F32:
    """Rectangles float32[k, 4] of cells that hold an unknown px."""
    side = len(labels)
    starts = np.arange(0, side, CELL)
    mask = np.logical_or.reduceat(np.logical_or.reduceat(labels < 0, starts, axis=0), starts, axis=1)
    return np.asarray(np.minimum(rectangles(mask) * CELL, side), np.float32)


# ---------------------------------------------------------------- whole tiles


def tile_labels(annotated: SlideAnnotations, xy: I64, tile: int, min_share: float) -> I32:
    """int32[n]: the class that covers at least ``min_share`` of each tile of ``tile`` target px, or -1."""
    shares = _class_shares(annotated, xy, tile)
    return np.where(shares.max(axis=1) >= min_share, shares.argmax(axis=1), UNKNOWN).astype(np.int32)


def tile_multilabels(annotated: SlideAnnotations, xy: I64, tile: int, min_share: float) -> F32:
    """float32[n, K]: 1 where a class covers at least ``min_share`` of a tile, 0 where it cannot, whatever the unknown
    px are; NaN where these decide."""

    def measure(grids: PixelGrids) -> F64:
        maps = label_maps(annotated, grids)
        there, unknown = (maps == 1).mean(axis=(2, 3)), (maps == UNKNOWN).mean(axis=(2, 3))
        return np.where(there >= min_share, 1.0, np.where(there + unknown < min_share, 0.0, np.nan))

    return _measure_tiles(annotated, xy, tile, measure).astype(np.float32)


def tile_values(annotated: SlideAnnotations, xy: I64, tile: int, min_share: float) -> F32:
    """float32[n, K], K the numbers of the index: the mean over the part of a tile in shapes with a label that have the
    number (on top of others), NaN where that part is less than ``min_share``."""

    def measure(grids: PixelGrids) -> F64:
        return np.stack([_mean_value(annotated, grids, name, min_share) for name in annotated.index.values], axis=1)

    return _measure_tiles(annotated, xy, tile, measure).astype(np.float32)


def _mean_value(annotated: SlideAnnotations, grids: PixelGrids, name: str, min_share: float) -> F64:
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
    return np.where(enough, total / np.maximum(known.sum(axis=(1, 2)), 1), np.nan)


def known_share(annotated: SlideAnnotations, xy: I64, tile: int) -> F64:
    """float64[n]: the part of each tile of which the class is known."""
    return _measure_tiles(annotated, xy, tile, lambda some: (class_maps(annotated, some) >= 0).mean(axis=(1, 2)))


def label_share(annotated: SlideAnnotations, xy: I64, tile: int) -> F64:
    """float64[n]: the part of each tile of which it is known for some class whether it is there."""
    return _measure_tiles(
        annotated, xy, tile, lambda some: (label_maps(annotated, some) >= 0).any(axis=1).mean(axis=(1, 2))
    )


def looked_at_share(annotated: SlideAnnotations, xy: I64, tile: int) -> F64:
    """float64[n]: the part of each tile that was looked at."""
    return _measure_tiles(annotated, xy, tile, lambda some: annotated_area_mask(annotated, some).mean(axis=(1, 2)))


def common_labels(annotated: SlideAnnotations, xy: I64, tile: int) -> I32:
    """int32[n]: the class of most px of each tile, the background only where there is no other; -1 where none is."""
    shares = _class_shares(annotated, xy, tile)
    if annotated.background >= 0:
        shares[:, annotated.background] = np.minimum(shares[:, annotated.background], 1e-6)
    return np.where(shares.max(axis=1) > 0, shares.argmax(axis=1), UNKNOWN).astype(np.int32)


def _class_shares(annotated: SlideAnnotations, xy: I64, tile: int) -> F64:
    """float64[n, K]: the part of each tile that each class covers."""

    def measure(grids: PixelGrids) -> F64:
        maps = class_maps(annotated, grids)
        return np.stack([(maps == label).mean(axis=(1, 2)) for label in range(annotated.labels)], axis=1)

    return _measure_tiles(annotated, xy, tile, measure)


def _measure_tiles(
    annotated: SlideAnnotations, xy: I64, tile: int, measure: Callable[[PixelGrids], npt.NDArray[np.float64]]
) -> F64:
    """``measure`` of the tiles as SAMPLES x SAMPLES points, _TILES at a time, one result after the other."""
    side = min(SAMPLES, tile)
    starts = range(0, max(1, len(xy)), _TILES)
    return np.concatenate([measure(annotated.grids(xy[n : n + _TILES], side, tile / side)) for n in starts])


# ---------------------------------------------------------------- which tiles


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


def middles(annotated: SlideAnnotations) -> F64:
    """Middles float64[n, 2] (x, y) of the boxes of all shapes, target px."""
    boxes = annotated.index.boxes
    return np.asarray((boxes[:, :2] + boxes[:, 2:]) / 2 / (annotated.scale_x, annotated.scale_y), np.float64)


def covering(annotated: SlideAnnotations, xy: I64, tile: int, min_share: float) -> Mask:
    """Choose the tiles of a grid to keep: those of which at least ``min_share`` was looked at, and those that hold the
    middle of an object, so that every object is in a tile."""
    counts = np.bincount(held(annotated, xy, tile)[0], minlength=len(xy))
    return np.asarray((looked_at_share(annotated, xy, tile) >= max(min_share, 1e-6)) | (counts > 0), bool)


def held(annotated: SlideAnnotations, xy: I64, tile: int) -> tuple[I64, I64]:
    """Pairs (tile, object) where the middle of an object lies in a tile."""
    grid, shape = annotated.index.touching(annotated.grids(xy, tile).boxes())
    at = middles(annotated)[shape] - xy[grid]
    keep = ((at >= 0) & (at < tile)).all(axis=1) & (annotated.coding.code[shape] >= 0)
    return grid[keep], shape[keep]


def common_objects(annotated: SlideAnnotations, xy: I64, tile: int) -> I32:
    """int32[n]: the class of most objects whose middle is in each tile, -1 where there is none."""
    grid, shape = held(annotated, xy, tile)
    table = np.zeros((len(xy), max(annotated.labels, 1)), np.int64)
    np.add.at(table, (grid, annotated.coding.code[shape]), 1)
    return np.where(table.max(axis=1) > 0, table.argmax(axis=1), UNKNOWN).astype(np.int32)


def drawn_places(annotated: SlideAnnotations, count: int, tile: int, seed: int | Sequence[int]) -> I64:
    """Corners int64[count, 2] of tiles round objects drawn with replacement, every class as often as any other, each
    somewhere in its tile's middle half. Pure in its arguments; none where there are no objects."""
    rng = np.random.default_rng(seed)
    code = annotated.coding.code
    classes = np.unique(code[code >= 0])
    if not len(classes):
        return np.zeros((0, 2), np.int64)
    wanted = classes[rng.integers(len(classes), size=count)]
    chosen = np.empty(count, np.int64)
    for label in classes:
        mine, of_class = wanted == label, np.flatnonzero(code == label)
        chosen[mine] = of_class[rng.integers(len(of_class), size=int(mine.sum()))]
    at = middles(annotated)[chosen] - tile * (0.25 + 0.5 * rng.random((count, 2)))
    limit = np.maximum([np.ceil(annotated.width) - tile, np.ceil(annotated.height) - tile], 0)
    return np.clip(np.floor(at), 0, limit).astype(np.int64)


# ---------------------------------------------------------------- by kind of task


@dataclass(frozen=True, slots=True)
class AnnotationTarget:
    """``buckets``: its table of class names. ``background``: the label of what is looked at and not annotated (classify
    and segment; None: that is unknown). ``complete``: slides without use-regions were annotated everywhere.

    ``min_share``: of a tile, that a label must cover (tile kinds), that must be known (segment, multisegment) or
    looked at (instances, detect). ``min_visible``: of a box, below which it is not learnt from. ``values``: names of
    the numbers of objects that `regress` learns. Raises ConfigError.
    """

    task: str
    kind: str
    buckets: Buckets
    background: str | None = None
    complete: bool = False
    min_share: float = 0.5
    min_visible: float = 0.3
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"task '{self.task}'"
        if self.kind not in TILE_LEVEL_KINDS + MAP_KINDS:
            known = ", ".join(TILE_LEVEL_KINDS + MAP_KINDS)
            raise ConfigError(f"{where} of kind {self.kind!r} learns from no annotations: give {known}")
        if self.background is not None and self.background not in self.buckets.labels:
            raise ConfigError(f"{where}: background {self.background!r} is no label: {', '.join(self.buckets.labels)}")
        if (self.kind == "regress") != bool(self.values):
            raise ConfigError(f"{where}: name the numbers to learn in values, for kind regress and no other")
        if not (0 < self.min_share <= 1 and 0 <= self.min_visible <= 1):
            raise ConfigError(f"{where}: min_share {self.min_share}, min_visible {self.min_visible}: give shares to 1")


def annotations_for_task(
    spec: AnnotationTarget, index: ShapeIndex, *, scale: tuple[float, float], size: tuple[int, int]
) -> SlideAnnotations:
    """The shapes of a slide of ``size`` (width, height) level-0 px as the task sees them, at ``scale`` level-0 px per
    target px (x, y)."""
    labels = spec.buckets.labels
    background = labels.index(spec.background) if spec.background is not None else UNKNOWN
    (width, height), (x, y) = size, scale
    return SlideAnnotations(
        index, encode(index, spec.buckets), x, y, width / x, height / y, len(labels), background, spec.complete
    )


def tile_targets(spec: AnnotationTarget, annotated: SlideAnnotations, xy: I64, tile: int) -> list[Target]:
    """Of a kind with one target per tile: that of each tile of ``tile`` target px."""
    found = _tile_table(spec, annotated, xy, tile)
    return found.tolist() if spec.kind == "classify" else list(found)


def _tile_table(spec: AnnotationTarget, annotated: SlideAnnotations, xy: I64, tile: int) -> npt.NDArray[Any]:
    """Labels int32[n], or float32[n, K]."""
    if spec.kind == "classify":
        return tile_labels(annotated, xy, tile, spec.min_share)
    if spec.kind == "multilabel":
        return tile_multilabels(annotated, xy, tile, spec.min_share)
    columns = [list(annotated.index.values).index(name) for name in spec.values]
    return np.ascontiguousarray(tile_values(annotated, xy, tile, spec.min_share)[:, columns])


def map_targets(spec: AnnotationTarget, annotated: SlideAnnotations, xy: I64, size: int) -> Sequence[Target]:
    """Of a map kind: the target of each square of ``size`` px at target px ``xy``, in its own px."""
    some = max(1, _PX // size**2)  # few enough at a time to stay in the processor's cache: five times faster
    parts = (annotated.grids(xy[start : start + some], size) for start in range(0, len(xy), some))
    return [target for grids in parts for target in _map_targets(spec, annotated, grids)]


def _map_targets(spec: AnnotationTarget, annotated: SlideAnnotations, grids: PixelGrids) -> Sequence[Target]:
    if spec.kind == "segment":
        return list(class_maps(annotated, grids))
    if spec.kind == "multisegment":
        return list(label_maps(annotated, grids))
    if spec.kind == "instances":
        several = len(spec.buckets.labels) > 1
        return list(classed_object_maps(annotated, grids) if several else object_maps(annotated, grids))
    return object_boxes(annotated, grids, spec.min_visible)


def choose(spec: AnnotationTarget, annotated: SlideAnnotations, xy: I64, tile: int) -> tuple[Mask, I32]:
    """Return which tiles have a target, bool[n], and the class int32[n] that balancing goes by (-1: none)."""
    if spec.kind in TILE_LEVEL_KINDS:
        table = _tile_table(spec, annotated, xy, tile)
        if spec.kind == "classify":
            return table >= 0, table
        there = (table == 1) & (spec.kind == "multilabel")
        labels = np.where(there.any(axis=1), there.argmax(axis=1), UNKNOWN).astype(np.int32)
        return np.asarray(np.isfinite(table).any(axis=1), bool), labels
    if spec.kind in ("instances", "detect"):
        keep = covering(annotated, xy, tile, spec.min_share)
        return keep, common_objects(annotated, xy, tile)
    share = label_share if spec.kind == "multisegment" else known_share
    return np.asarray(share(annotated, xy, tile) >= spec.min_share, bool), common_labels(annotated, xy, tile)
