"""The annotations of a slide as arrays with a spatial index, and shapes -> px of many squares at once.

All arithmetic is on arrays: no Python object per shape, no loop over shapes, tiles or px.

The px (row, column) of a square belongs to a shape when its centre, (column + 0.5, row + 0.5) from the square's corner,
lies in it (even-odd, so holes are left out; of two shapes that share an edge exactly one has a centre on that edge).
Crossings are found in px of the whole slide and only then counted from a square's corner: squares put side by side are
bit for bit the raster of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.annotations import Shapes, box_index, ring_arrays
from wsi_mmm.training.data.buckets import CODES, DROP, USE, Buckets
from wsi_mmm.types import F64, I32, I64, Mask

DOT_CORNERS = 24  # of the polygon that stands for a point
_PACK = 8  # shapes under one leaf of the index
_RUN = 256  # points whose extent is known together
_LONG = 16 * _RUN  # points from which only runs at the height of a square are looked at
_EDGES = 1 << 19  # edges looked at together: bounds memory, not the result
_SLIVER = 1 << 14  # px: longer than a square; a line across a slide without width is no speck
_SPECK = 4.0  # px²: larger shapes always hold the centre of a px, unless they are thinner than anything that is drawn


@dataclass(frozen=True, slots=True)
class ShapeIndex:
    """n shapes in level-0 px. Points of shape i: ``xy[start[i]:start[i + 1]]`` float64[m, 2], its rings one after the
    other, each closed; ``closing`` bool[m]: the last point of a ring. ``boxes`` float64[n, 4] (x0, y0, x1, y1);
    ``areas`` float64[n]. ``name_of`` int32[n]: place in ``names``. ``values``: name of a number -> float64[n], NaN
    where there is none. ``extent`` float64[k, 2]: least and largest y of the edges that begin at each _RUN points.
    ``touching``: boxes float64[k, 4] -> pairs (box, shape) whose extents touch. The last ``dots`` shapes are discs that
    stand for points."""

    xy: F64
    start: I64
    closing: Mask
    boxes: F64
    areas: F64
    names: tuple[str | None, ...]
    name_of: I32
    values: Mapping[str, F64]
    extent: F64
    touching: Callable[[F64], tuple[I64, I64]]
    dots: int = 0

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
    found = packed_index(boxes)
    return ShapeIndex(
        xy, start, closing, boxes, areas, tuple(names), name_of, kept, _run_extents(xy), found, len(dots)
    )  # fmt: skip


def _run_extents(xy: F64) -> F64:
    """Least and largest y float64[k, 2] of the edges that begin at each _RUN points."""
    if not len(xy):
        return np.zeros((0, 2))
    starts = np.arange(0, len(xy), _RUN)
    after = np.append(xy[1:, 1], xy[-1, 1])
    low = np.minimum.reduceat(np.minimum(xy[:, 1], after), starts)
    return np.stack([low, np.maximum.reduceat(np.maximum(xy[:, 1], after), starts)], axis=1)


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
    ``ranking`` int64[n]: who lies on top of whom (higher: on top), all different."""

    code: I32
    ranking: I64

    @property
    def has_use(self) -> bool:
        """True when the annotator drew use-regions."""
        return bool((self.code == CODES[USE]).any())


def encode(index: ShapeIndex, buckets: Buckets) -> Coding:
    """Apply a table: earlier rules on top, among equals what comes later in the file. A point is no use-region: such
    ones are left out."""
    placed = np.array([buckets.place(name) for name in index.names], np.int64).reshape(-1, 2)[index.name_of]
    dots = placed[len(index) - index.dots :, 0]
    dots[dots == CODES[USE]] = CODES[DROP]
    ranking = np.empty(len(index), np.int64)
    ranking[np.lexsort((np.arange(len(index)), -placed[:, 1]))] = np.arange(len(index))
    return Coding(placed[:, 0].astype(np.int32), ranking)


# ---------------------------------------------------------------- squares of px


@dataclass(frozen=True, slots=True)
class PixelGrids:
    """n squares of ``side`` x ``side`` px whose corners lie at target px ``xy`` int64[n, 2] (x, y). A px is ``step``
    target px wide (1 for pictures, more for measuring areas); ``scale``: level-0 px per target px."""

    xy: I64
    side: int
    scale_x: float
    scale_y: float
    step: float = 1.0

    def boxes(self) -> F64:
        """Their extents float64[n, 4] (x0, y0, x1, y1), level-0 px."""
        low = self.xy.astype(np.float64)
        scale = (self.scale_x, self.scale_y)
        return np.concatenate([low * scale, (low + self.side * self.step) * scale], axis=1)


@dataclass(frozen=True, slots=True)
class Pairs:
    """p times "this shape touches the extent of this square", by square, and in a square in the order of painting."""

    grid: I64
    shape: I64


def pairs_of(index: ShapeIndex, grids: PixelGrids, wanted: Mask, ranking: I64) -> Pairs:
    """Pair the shapes ``wanted`` bool[n] with the grids they touch; shapes of a higher ``ranking`` int64[n] come
    later."""
    grid, shape = index.touching(grids.boxes())
    keep = wanted[shape]
    grid, shape = grid[keep], shape[keep]
    turn = np.lexsort((ranking[shape], grid))
    return Pairs(grid[turn], shape[turn])


def paint(
    canvas: npt.NDArray[Any], index: ShapeIndex, grids: PixelGrids, pairs: Pairs, values: npt.NDArray[Any]
) -> None:
    """Write ``values`` [p] into ``canvas`` [n, side, side] where a pair's shape is, later pairs over earlier ones.

    Where ``step`` is 1 a shape so small that it holds no px centre gets the px that its middle lies in.
    """
    flat = canvas.reshape(-1)
    for some in _pair_chunks(index, pairs):
        part = Pairs(pairs.grid[some], pairs.shape[some])
        pair, row, first, stop = _pixel_spans(index, grids, part)
        begin = (part.grid[pair] * grids.side + row) * grids.side + first
        flat[_expand_runs(begin, stop - first)] = np.repeat(values[some][pair], stop - first)


def _pair_chunks(index: ShapeIndex, pairs: Pairs) -> Iterator[slice]:
    """Pairs of about _EDGES edges."""
    before = np.concatenate([[0], np.cumsum(index.start[pairs.shape + 1] - index.start[pairs.shape])])
    begin = 0
    while begin < len(pairs.shape):
        end = max(begin + 1, int(np.searchsorted(before, before[begin] + _EDGES, "right")) - 1)
        yield slice(begin, end)
        begin = end


def _pixel_spans(index: ShapeIndex, grids: PixelGrids, pairs: Pairs) -> tuple[I64, I64, I64, I64]:
    """(pair, row, first column, column after the last) of every run of px, by pair."""
    crossings = _line_crossings(index, grids, pairs)
    side = grids.side
    crossings.sort()  # pair, then row, then column: every second one is a way out
    line, column = np.divmod(crossings.reshape(-1, 2), side + 1)
    keep = column[:, 0] < column[:, 1]
    line, column = line[keep, 0], column[keep]
    pair, row, first, stop = line // side, line % side, column[:, 0], column[:, 1]
    if grids.step != 1.0:
        return pair, row, first, stop
    specks = _tiny_shapes(index, grids, pairs)
    if not len(specks[0]):
        return pair, row, first, stop
    pair, row, first = (np.concatenate(both) for both in zip((pair, row, first), specks, strict=True))
    stop = np.concatenate([stop, specks[2] + 1])
    turn = np.argsort(pair, kind="stable")
    return pair[turn], row[turn], first[turn], stop[turn]


def _line_crossings(index: ShapeIndex, grids: PixelGrids, pairs: Pairs) -> I64:
    """Where outlines cross lines through px centres: (pair * side + row) * (side + 1) + column of the first px whose
    centre is not left of it, columns cut to 0..side."""
    side, step = grids.side, grids.step
    vertex, pair = _edges_near(index, grids, pairs)
    keep = ~index.closing[vertex]
    vertex, pair = vertex[keep], pair[keep]
    per_px = 1.0 / np.array([grids.scale_x * step, grids.scale_y * step])
    a, b = index.xy[vertex] * per_px, index.xy[vertex + 1] * per_px
    down = (a[:, 1] <= b[:, 1])[:, None]
    a, b = np.where(down, a, b), np.where(down, b, a)  # the same edge of two shapes gives the same crossings
    corner = grids.xy / step
    whole = np.floor(corner)
    rest = corner - whole  # 0 where step is 1
    at = pairs.grid[pair]
    top = np.clip(np.ceil(a[:, 1] - 0.5 - rest[at, 1]) - whole[at, 1], 0, side).astype(np.int64)
    end = np.clip(np.ceil(b[:, 1] - 0.5 - rest[at, 1]) - whole[at, 1], 0, side).astype(np.int64)
    edge = np.repeat(np.arange(len(top)), end - top)
    row = _expand_runs(top, end - top)
    at, a, b = at[edge], a[edge], b[edge]
    y = row + whole[at, 1] + (0.5 + rest[at, 1])
    x = a[:, 0] + (y - a[:, 1]) * ((b[:, 0] - a[:, 0]) / (b[:, 1] - a[:, 1]))
    column = np.clip(np.ceil(x - 0.5 - rest[at, 0]) - whole[at, 0], 0, side).astype(np.int64)
    return np.asarray((pair[edge] * side + row) * (side + 1) + column, np.int64)


def _edges_near(index: ShapeIndex, grids: PixelGrids, pairs: Pairs) -> tuple[I64, I64]:
    """(first point, pair) of the edges that may cross a line of the pair's square: all, but of long outlines only those
    of runs at its height. An outline of a million points would else be gone through for each square it touches."""
    begin, end = index.start[pairs.shape], index.start[pairs.shape + 1]
    long = end - begin > _LONG
    short = np.flatnonzero(~long)
    vertex = _expand_runs(begin[short], (end - begin)[short])
    pair = np.repeat(short, (end - begin)[short])
    if not long.any():
        return vertex, pair
    some = np.flatnonzero(long)
    first, last = begin[some] // _RUN, -(-end[some] // _RUN)
    run, owner = _expand_runs(first, last - first), np.repeat(some, last - first)
    y0, y1 = grids.boxes()[pairs.grid[owner]][:, [1, 3]].T
    near = (index.extent[run, 0] <= y1) & (index.extent[run, 1] >= y0)
    run, owner = run[near], owner[near]
    start = np.maximum(run * _RUN, begin[owner])
    length = np.minimum((run + 1) * _RUN, end[owner]) - start
    return (
        np.concatenate([vertex, _expand_runs(start, length)]),
        np.concatenate([pair, np.repeat(owner, length)]),
    )


def _tiny_shapes(index: ShapeIndex, grids: PixelGrids, pairs: Pairs) -> tuple[I64, I64, I64]:
    """(pair, row, column) of the px that stand for shapes without a px centre, where they lie in their square."""
    per_px = 1.0 / np.array([grids.scale_x, grids.scale_y])
    small = np.flatnonzero(index.areas[pairs.shape] * per_px.prod() < _SPECK)
    box = index.boxes[pairs.shape[small]]
    short = ((box[:, 2:] - box[:, :2]) * per_px <= _SLIVER).all(axis=1)
    small, box = small[short], box[short]
    at = np.floor((box[:, :2] + box[:, 2:]) / 2 * per_px).astype(np.int64) - grids.xy[pairs.grid[small]]
    inside = ((at >= 0) & (at < grids.side)).all(axis=1)
    small, at = small[inside], at[inside]
    empty = ~_holds_centre(index, grids, pairs.shape[small])
    return small[empty], at[empty, 1], at[empty, 0]


def _holds_centre(index: ShapeIndex, grids: PixelGrids, shapes: I64) -> Mask:
    """Which of these small shapes hold the centre of a px, wherever that is."""
    if not len(shapes):
        return np.zeros(0, bool)
    per_px = 1.0 / np.array([grids.scale_x, grids.scale_y])
    low = np.floor(index.boxes[shapes, :2] * per_px).astype(np.int64)
    side = int((np.ceil(index.boxes[shapes, 2:] * per_px).astype(np.int64) - low).max())
    around = PixelGrids(low, side, grids.scale_x, grids.scale_y)
    crossings = _line_crossings(index, around, Pairs(np.arange(len(shapes)), shapes))
    crossings.sort()
    line, column = np.divmod(crossings.reshape(-1, 2), side + 1)
    full = np.zeros(len(shapes), bool)
    full[line[column[:, 0] < column[:, 1], 0] // side] = True
    return full


def _expand_runs(starts: I64, lengths: I64) -> I64:
    """start, start + 1, ... for ``length`` numbers, for every start."""
    before = np.cumsum(lengths) - lengths
    return np.asarray(np.repeat(starts - before, lengths) + np.arange(int(lengths.sum())), np.int64)
