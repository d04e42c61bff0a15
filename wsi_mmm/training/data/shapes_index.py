"""The annotations of a slide as arrays with a spatial index: 100,000 objects are no Python objects while training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.annotations import Shapes, box_index, ring_arrays
from wsi_mmm.training.data.buckets import CODES, DROP, USE, Buckets
from wsi_mmm.types import F64, I32, I64, Mask

DOT_CORNERS = 24  # of the polygon that stands for a point
_PACK = 8


@dataclass(frozen=True, slots=True)
class ShapeIndex:
    """n shapes in level-0 px. Points of shape i: ``xy[start[i]:start[i + 1]]`` float64[m, 2], its rings one after the
    other, each closed; ``closing`` bool[m]: the last point of a ring. ``boxes`` float64[n, 4] (x0, y0, x1, y1);
    ``areas`` float64[n]. ``name_of`` int32[n]: place in ``names``. ``values``: name of a number -> float64[n], NaN
    where there is none. ``touching``: boxes float64[k, 4] -> pairs (box, shape) whose extents touch."""

    xy: F64
    start: I64
    closing: Mask
    boxes: F64
    areas: F64
    names: tuple[str | None, ...]
    name_of: I32
    values: Mapping[str, F64]
    touching: Callable[[F64], tuple[I64, I64]]

    def __len__(self) -> int:
        return len(self.name_of)


def index_shapes(shapes: Shapes, values: Sequence[str] = (), *, dot_radius: tuple[float, float] = (0, 0)) -> ShapeIndex:
    """Index what a file holds; ``values`` as it was parsed with. Points become discs of ``dot_radius`` level-0 px
    (x, y), or are left out where that is 0."""
    dots = shapes.dots if min(dot_radius) > 0 else ()
    xy, ends, owner, areas = ring_arrays([item.geometry for item in shapes])
    closing = np.zeros(len(xy) + len(dots) * (DOT_CORNERS + 1), bool)
    closing[ends[1:] - 1] = True
    closing[len(xy) + DOT_CORNERS :: DOT_CORNERS + 1] = True
    counts = np.bincount(owner, weights=np.diff(ends), minlength=len(shapes)).astype(np.int64)
    counts = np.concatenate([counts, np.full(len(dots), DOT_CORNERS + 1, np.int64)])
    xy = np.concatenate([xy, _disc_outlines(np.array([(dot.x, dot.y) for dot in dots]).reshape(-1, 2), dot_radius)])
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    boxes = _ring_boxes(xy, start)
    listed = [*shapes, *dots]
    names: dict[str | None, int] = {}
    name_of = np.array([names.setdefault(one.class_name, len(names)) for one in listed], np.int32)
    numbers = np.array([one.values for one in listed], np.float64).reshape(len(listed), len(values))
    kept = {name: numbers[:, column] for column, name in enumerate(values)}
    disc = DOT_CORNERS / 2 * math.sin(2 * math.pi / DOT_CORNERS) * dot_radius[0] * dot_radius[1]
    areas = np.concatenate([areas, np.full(len(dots), disc)])
    return ShapeIndex(xy, start, closing, boxes, areas, tuple(names), name_of, kept, packed_index(boxes))


def _disc_outlines(middles: F64, radius: tuple[float, float]) -> F64:
    angles = np.append(np.arange(DOT_CORNERS), 0) * (2 * math.pi / DOT_CORNERS)
    ring = np.stack([np.cos(angles) * radius[0], np.sin(angles) * radius[1]], axis=1)
    return np.asarray((middles[:, None] + ring[None]).reshape(-1, 2), np.float64)


def _ring_boxes(xy: F64, start: I64) -> F64:
    if len(start) < 2:
        return np.zeros((0, 4))
    low, high = np.minimum.reduceat(xy, start[:-1]), np.maximum.reduceat(xy, start[:-1])
    return np.concatenate([low, high], axis=1)


def packed_index(boxes: F64) -> Callable[[F64], tuple[I64, I64]]:
    """As `box_index`, with a tree over packs of neighbours of alike size: a tree of single objects takes twice the
    memory of the objects."""
    count = len(boxes)
    if not count:
        return box_index(boxes)
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).T
    size = np.frexp((boxes[:, 2:] - boxes[:, :2]).max(axis=1))[1] // 2
    slices = math.ceil(math.sqrt(count / _PACK))
    strip = np.argsort(np.argsort(x, kind="stable"), kind="stable") * slices // count
    ranking = np.lexsort((y, strip, size))
    starts = np.arange(0, count, _PACK)
    low, high = np.minimum.reduceat(boxes[ranking, :2], starts), np.maximum.reduceat(boxes[ranking, 2:], starts)
    packs = box_index(np.concatenate([low, high], axis=1))

    def touching(asked: F64) -> tuple[I64, I64]:
        number, pack = packs(asked)
        place = (pack[:, None] * _PACK + np.arange(_PACK)).ravel()
        number = np.repeat(number, _PACK)[place < count]
        found = ranking[place[place < count]]
        hit = (boxes[found, :2] <= asked[number, 2:]) & (boxes[found, 2:] >= asked[number, :2])
        keep = hit.all(axis=1)
        return number[keep], found[keep]

    return touching


# ---------------------------------------------------------------- what a task makes of them


@dataclass(frozen=True, slots=True)
class Coding:
    """The shapes of an index, sorted by a bucket table: ``code`` int32[n], the class index or the code of a bucket;
    ``order`` int64[n]: who lies on top of whom (higher: on top), all different."""

    code: I32
    ranking: I64

    @property
    def has_use(self) -> bool:
        """True when the annotator drew use-regions."""
        return bool((self.code == CODES[USE]).any())


def encode(index: ShapeIndex, buckets: Buckets) -> Coding:
    """Apply a table: earlier rules on top, among equals what comes later in the file."""
    placed = np.array([buckets.place(name) for name in index.names], np.int64).reshape(-1, 2)[index.name_of]
    ranking = np.empty(len(index), np.int64)
    ranking[np.lexsort((np.arange(len(index)), -placed[:, 1]))] = np.arange(len(index))
    return Coding(placed[:, 0].astype(np.int32), ranking)


def painted(code: I32) -> Mask:
    """Shapes that are drawn: those with a label, and those in which nothing is known."""
    return np.asarray((code != CODES[USE]) & (code != CODES[DROP]), bool)
