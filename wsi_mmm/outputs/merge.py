"""`merge_regions`: regions that block borders cut apart become whole again, as if there had been no blocks.

Outlines are directed edges on whole pixels with the region on one side. Where two fragments of one class meet at a
seam, their edges run over each other in opposite directions and cancel; what is left are the outlines of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from wsi_mmm.outputs.polygons import (
    concat,
    drop_points,
    following_points,
    gather_groups,
    offsets_of,
    sort_by_anchor,
    take,
)
from wsi_mmm.outputs.trace import find_rings, first_edges, split_touching, walk_rings
from wsi_mmm.types import F64, I32, I64, Mask, Objects

_EAST, _SOUTH, _WEST, _NORTH = range(4)
_STEP = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)], np.int64)


@dataclass(frozen=True, slots=True)
class _Segments:
    """k axis-parallel directed edges: ``tail`` int64[k, 2] (x, y), ``length``, ``direction`` 0..3, own ``fragment``."""

    tail: I64
    length: I64
    direction: I64
    fragment: I64

    def where(self, keep: Mask) -> _Segments:
        return _Segments(self.tail[keep], self.length[keep], self.direction[keep], self.fragment[keep])

    @property
    def head(self) -> I64:
        return self.tail + _STEP[self.direction] * self.length[:, None]


def merge_regions(parts: Sequence[Objects]) -> Objects:
    """Dissolve the regions of ``parts``, one part per block core, into the regions of the whole slide.

    Coordinates are whole target px (`trace` with "exact", not yet scaled), cores tile the plane: then regions of one
    class that share an edge become one, exactly, and the result is the same for every way of cutting: canonical
    rings (no collinear points, first corner topmost then leftmost, holes in that order too), objects sorted by
    ``anchor``, which is the (y, x) of that corner of the exterior. Measurements are summed: give counts, not means.
    """
    parts = [some for some in parts if len(some)] or list(parts[:1])
    fragments = concat(parts)
    if not len(fragments):
        return fragments
    segments = _outline_edges(fragments)
    left, pairs = _cancel_seams(segments, _on_seams(segments, parts), fragments.class_index)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(fragments), len(fragments)))
    group = np.asarray(connected_components(graph.tocsr(), directed=False)[1])
    alone = np.bincount(group)[group] == 1
    done = [take(fragments, alone)]
    if not alone.all():
        done.append(_rebuild_regions(left.where(~alone[left.fragment]), fragments, group))
    return sort_by_anchor(canonical(concat(done)))


def canonical(objects: Objects) -> Objects:
    """The one way to write down each polygon of whole-pixel coordinates (see `merge_regions`); anchors recomputed."""
    corners = drop_points(objects, _turn_directions(objects) != 0)
    rotated = corners.coords[_first_corner_rotation(corners)]
    first = rotated[corners.ring_offsets[:-1]]
    owner = np.repeat(np.arange(len(corners)), np.diff(corners.object_offsets))
    hole = np.ones(len(owner), np.bool_)
    hole[corners.object_offsets[:-1]] = False
    ranking = np.lexsort((first[:, 0], first[:, 1], hole, owner))
    index, ring_offsets = gather_groups(corners.ring_offsets, ranking)
    anchor = np.floor(first[ranking][corners.object_offsets[:-1], ::-1]).astype(np.int64)
    return replace(corners, coords=rotated[index], ring_offsets=ring_offsets, anchor=anchor)


def _outline_edges(fragments: Objects) -> _Segments:
    points = np.rint(fragments.coords).astype(np.int64)
    step = points[following_points(fragments)] - points
    upright = np.where(step[:, 1] > 0, _SOUTH, _NORTH)
    direction = np.where(step[:, 0] > 0, _EAST, np.where(step[:, 0] < 0, _WEST, upright))
    rings = np.repeat(np.arange(len(fragments)), np.diff(fragments.object_offsets))
    fragment = np.repeat(rings, np.diff(fragments.ring_offsets))
    if (points != fragments.coords).any() or ((step != 0).sum(axis=1) != 1).any():
        raise ValueError("regions to merge must have axis-parallel outlines on whole target pixels")
    return _Segments(points, np.abs(step).sum(axis=1), direction, fragment)


def _on_seams(segments: _Segments, parts: Sequence[Objects]) -> Mask:
    """Edges that may lie on a seam: those at the very border of what their part covers."""
    lengths = [len(part.coords) for part in parts]
    low = np.repeat([part.coords.min(axis=0) for part in parts], lengths, axis=0)
    high = np.repeat([part.coords.max(axis=0) for part in parts], lengths, axis=0)
    across = 1 - segments.direction % 2  # the coordinate that stays the same along the edge
    rows = np.arange(len(across))
    at = segments.tail[rows, across]
    return np.asarray((at == low[rows, across]) | (at == high[rows, across]))


def _cancel_seams(segments: _Segments, seam: Mask, class_index: I32) -> tuple[_Segments, I64]:
    """(the edges that remain, int64[k, 2] fragments whose edges cancelled somewhere)."""
    remaining, pairs = [segments.where(~seam)], [np.empty((0, 2), np.int64)]
    for axis in (0, 1):
        some = segments.where(seam & (segments.direction % 2 == axis))
        left, met = _cancel_along(some, axis, class_index)
        remaining.append(left)
        pairs.append(met)
    fields = zip(*((s.tail, s.length, s.direction, s.fragment) for s in remaining), strict=True)
    return _Segments(*(np.concatenate(values) for values in fields)), np.concatenate(pairs)


def _cancel_along(some: _Segments, axis: int, class_index: I32) -> tuple[_Segments, I64]:
    """Cancel edges along ``axis`` (0: x, 1: y) of one class on one line that run over each other.

    Between two neighbouring ends on a line either one edge runs (it stays), or two (they cancel), or none: running
    sums over the sorted ends tell which, and whose.
    """
    forward = some.direction < 2  # east or south
    low = np.minimum(some.tail, some.head)[:, axis]
    line = some.tail[:, 1 - axis] * (int(class_index.max()) + 1) + class_index[some.fragment]
    position = np.concatenate([low, low + some.length])
    lines = np.concatenate([line, line])
    ranking = np.lexsort((position, lines))
    owners = some.fragment * forward, some.fragment * ~forward
    facts = np.stack([np.ones_like(low), forward, *owners], axis=1).astype(np.int64)
    running = np.cumsum(np.concatenate([facts, -facts])[ranking], axis=0)[:-1]
    length = np.diff(position[ranking])
    same_line = np.diff(lines[ranking]) == 0
    one, two = (same_line & (length > 0) & (running[:, 0] == k) for k in (1, 2))
    stays_forward = running[one, 1] > 0
    tail = np.empty((int(one.sum()), 2), np.int64)
    start = position[ranking][:-1][one]
    tail[:, axis] = np.where(stays_forward, start, start + length[one])
    tail[:, 1 - axis] = lines[ranking][:-1][one] // (int(class_index.max()) + 1)
    direction = axis + 2 * (~stays_forward).astype(np.int64)
    return _Segments(tail, length[one], direction, running[one, 2] + running[one, 3]), running[two][:, 2:]


def _rebuild_regions(segments: _Segments, fragments: Objects, group: I32) -> Objects:
    """Rings and regions from the edges that remain."""
    following, corner = _link_edges(segments, fragments.class_index)
    count, ring = find_rings(following)
    following, count, ring = split_touching(following, count, ring, head=corner, among=np.arange(len(ring)))
    start = first_edges(ring, count)
    hole = _twice_area(segments, ring, count) < 0
    owner = group[segments.fragment[start]]
    rank = np.lexsort((hole, owner))
    edge_index = walk_rings(following, start[rank])
    exterior = np.flatnonzero(~hole[rank])
    region = owner[rank][exterior]
    lead = segments.fragment[start[rank][exterior]]
    totals = {
        name: np.asarray(np.bincount(group, weights=values, minlength=len(fragments)), np.float64)[region]
        for name, values in fragments.measurements.items()
    }
    return Objects(
        fragments.task,
        segments.tail[edge_index].astype(np.float64),
        offsets_of(np.bincount(ring, minlength=count)[rank]),
        np.append(exterior, count).astype(np.int64),
        fragments.class_index[lead],
        fragments.anchor[lead],
        totals,
    )


def _link_edges(segments: _Segments, class_index: I32) -> tuple[I32, I64]:
    """(the edge that follows each edge, the corner it ends in). Where two regions meet diagonally, turn inwards."""
    head, tail = (_corner_numbers(ends, segments, class_index) for ends in (segments.head, segments.tail))
    arriving = np.lexsort(((segments.direction + 1) % 4, head))
    leaving = np.lexsort((segments.direction, tail))
    if (head[arriving] != tail[leaving]).any():
        raise ValueError("regions to merge overlap; parts must come from cores that tile the plane")
    following = np.empty(len(head), np.int32)
    following[arriving] = leaving
    return following, head


def _corner_numbers(points: I64, segments: _Segments, class_index: I32) -> I64:
    """A number per (class, point)."""
    low = segments.tail.min(axis=0)
    wide = segments.tail[:, 0].max() - low[0] + 1
    classes = int(class_index.max()) + 1
    number: I64 = ((points[:, 1] - low[1]) * wide + points[:, 0] - low[0]) * classes + class_index[segments.fragment]
    return number


def _twice_area(segments: _Segments, ring: I32, count: int) -> F64:
    """Twice the signed area per ring: whole numbers, exact in float64."""
    x, y = segments.tail.T
    low = segments.tail.min(axis=0)
    step = _STEP[segments.direction] * segments.length[:, None]
    cross = (x - low[0]) * step[:, 1] - (y - low[1]) * step[:, 0]
    return np.asarray(np.bincount(ring, weights=cross.astype(np.float64), minlength=count), np.float64)


def _turn_directions(objects: Objects) -> F64:
    """Cross product of the steps before and after each point: 0 where the outline goes straight on."""
    following = following_points(objects)
    before = objects.coords[following] - objects.coords
    after, turn = before[following], np.empty(len(before))
    turn[following] = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return turn


def _first_corner_rotation(objects: Objects) -> I64:
    """The order of the points that lets each ring begin at its topmost, then leftmost corner."""
    lengths = np.diff(objects.ring_offsets)
    ring = np.repeat(np.arange(len(lengths)), lengths)
    starts = objects.ring_offsets[:-1]
    first = np.lexsort((objects.coords[:, 0], objects.coords[:, 1], ring))[starts] - starts
    within = np.arange(len(ring)) - starts[ring]
    return np.asarray(starts[ring] + (within + first[ring]) % lengths[ring])
