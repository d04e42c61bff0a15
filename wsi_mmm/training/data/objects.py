"""Objects of a slide -> target of its tiles: an instance per px, or boxes; and the tiles that cover the objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wsi_mmm.tasks.targets import Boxes
from wsi_mmm.training.data.raster import PixelGrids
from wsi_mmm.training.data.regions import UNKNOWN, SlideAnnotations, annotated_area_mask, looked_at_share, paint_over
from wsi_mmm.types import F32, F64, I32, I64, Mask

CELL = 8
"""Unknown area is given to detectors in cells of so many px: a cell is unknown when any of its px is."""


def object_maps(annotated: SlideAnnotations, grids: PixelGrids) -> I32:
    """int32[n, side, side]: 0 where there is no object, its number in the slide + 1 where one is, -1 unknown. Truth of
    `instances`. An object that the square's rim cuts keeps its number, so squares side by side agree."""
    seen = annotated_area_mask(annotated, grids)
    numbers = np.where(annotated.coding.code >= 0, np.arange(1, len(annotated.index) + 1), UNKNOWN).astype(np.int32)
    return paint_over(annotated, grids, seen, 0, numbers)


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
    labels[hidden | (_box_areas(cut) < min_visible * _box_areas(whole))] = UNKNOWN
    keep = _box_areas(cut) > 0
    out = []
    for number in range(len(grids.xy)):
        mine = keep & (pairs.grid == number)
        unknown = _unknown_boxes(maps[number])
        xyxy = np.concatenate([cut[mine].astype(np.float32), unknown])
        both = np.concatenate([labels[mine], np.full(len(unknown), UNKNOWN, np.int32)])
        out.append(Boxes(xyxy, both, grids.side, grids.side))
    return out


def _box_areas(boxes: F64) -> F64:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), np.float64)


def _unknown_boxes(labels: I32) -> F32:
    """Rectangles float32[k, 4] of cells that hold an unknown px."""
    side = len(labels)
    starts = np.arange(0, side, CELL)
    mask = np.logical_or.reduceat(np.logical_or.reduceat(labels < 0, starts, axis=0), starts, axis=1)
    return np.asarray(np.minimum(rectangles(mask) * CELL, side), np.float32)


def rectangles(mask: Mask) -> F32:
    """The True cells of bool[h, w] as disjoint rectangles float32[k, 4] (x0, y0, x1, y1): runs of a row, joined with
    the same run of the rows below."""
    done: list[tuple[int, int, int, int]] = []
    growing: dict[tuple[int, int], int] = {}  # run -> row it begins in
    for row in range(len(mask) + 1):
        line = np.concatenate([[False], mask[row], [False]]) if row < len(mask) else np.zeros(2, bool)
        edges = np.flatnonzero(line[1:] != line[:-1]).reshape(-1, 2)
        runs = {(int(x0), int(x1)) for x0, x1 in edges}
        done += [(x0, top, x1, row) for (x0, x1), top in growing.items() if (x0, x1) not in runs]
        growing = {run: growing.get(run, row) for run in sorted(runs)}
    return np.array(done, np.float32).reshape(-1, 4)


# ---------------------------------------------------------------- which tiles


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
