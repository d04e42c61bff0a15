"""`trace`: label image -> polygons, with no Python per object: contour following via connected components on the
edge-successor graph.

A *crack edge* separates two pixels of different label. Every pixel of an object gives one directed edge
for each of its sides that lies on a crack, with the pixel on the inner side, so the successor of an edge
follows from the two pixels ahead of it and whole rings are cycles of one permutation of the edges
(edge -> the edge that follows it), which compiled graph walks find. `outputs.merge` uses the same cycles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from wsi_mmm.types import F64, I32, I64, Mask

Style = Literal["smooth", "exact"]
Int = npt.NDArray[np.integer[Any]]

# Sides in the order of travel round one pixel: top (heading east), right (south), bottom (west), left (north).
# In (x, y) numbers that is a positive signed area: counter-clockwise in the sense of RFC 7946.
_TOP, _RIGHT, _BOTTOM, _LEFT = range(4)
_TAIL = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float64)  # where a side begins, from the pixel's corner
_MIDDLE = np.array([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)], np.float64)


@dataclass(frozen=True, slots=True)
class Rings:
    """Traced objects as ragged arrays.

    ``coords`` float64[m, 2] (x, y): pixel (row, column) of the label image covers
    [column, column + 1) x [row, row + 1). Ring r is ``coords[ring_offsets[r]:ring_offsets[r + 1]]``, not closed.
    Object i owns rings ``object_offsets[i]:object_offsets[i + 1]``: first its exterior (positive signed area), then
    its holes (negative). ``labels`` int32[n]: the label of each object; objects are sorted by label, then by the
    row-major position of their first pixel.
    """

    coords: F64
    ring_offsets: I64
    object_offsets: I64
    labels: I32

    def __len__(self) -> int:
        return len(self.labels)


class _Edges(NamedTuple):
    """Crack edges sorted by (pixel, side); ``pixel`` indexes the flattened image padded by one pixel all round."""

    pixel: Int
    side: npt.NDArray[np.uint8]
    following: I32


def trace(labels: I32, style: Style = "smooth") -> Rings:
    """Polygons of every 4-connected component of equal label > 0 in ``labels`` int32[h, w].

    "exact": the corners of the component's outline, so areas are pixel counts. "smooth": the middles of its crack
    edges, which takes the stairs out of slanted outlines and never makes two objects overlap. In both, points on
    a straight line between their neighbours are left out and every polygon is valid (holes included).
    A label may have several components (regions): then several objects carry it. Values <= 0 are background.
    """
    padded = np.pad(np.asarray(labels, np.int32), 1)
    width = padded.shape[1]
    edges = _crack_edges(padded)
    if not len(edges.pixel):
        return Rings(np.empty((0, 2)), np.zeros(1, np.int64), np.zeros(1, np.int64), np.empty(0, np.int32))
    count, ring = find_rings(edges.following)
    if style == "exact":
        corners = np.array([1, width + 1, width, 0], edges.pixel.dtype)  # flat steps to where each side ends
        turned = np.flatnonzero(edges.pixel == edges.pixel[edges.following])  # only these meet a diagonal partner
        following, count, ring = split_touching(
            edges.following, count, ring, head=edges.pixel + corners[edges.side], among=turned
        )
        edges = edges._replace(following=following)
    start = first_edges(ring, count)
    hole = _is_hole(edges, ring, count, width)
    parent = _ring_exteriors(edges, ring, start, hole, width)
    label = padded.ravel()[edges.pixel[start]]
    rank = np.lexsort((start, hole, start[parent], label))
    edge_index = walk_rings(edges.following, start[rank])
    lengths = np.bincount(ring, minlength=count)[rank]
    coords, ring_offsets = _ring_points(edges, edge_index, lengths, width=width, style=style)
    exterior = np.flatnonzero(~hole[rank])
    object_offsets = np.append(exterior, count).astype(np.int64)
    return Rings(coords, ring_offsets, object_offsets, label[rank][exterior].astype(np.int32))


def _crack_edges(padded: I32) -> _Edges:
    flat, width = padded.ravel(), padded.shape[1]
    pixel: Int = np.flatnonzero(_on_border(padded))
    if flat.size < 2**31 - 2 * width:
        pixel = pixel.astype(np.int32)
    steps = np.array([-width, 1, width, -1], pixel.dtype)  # to the neighbours across top, right, bottom, left
    own = flat[pixel]
    sides = np.stack([flat[pixel + step] != own for step in steps], axis=1)
    number = (np.cumsum(sides.ravel(), dtype=np.int32) - 1).reshape(sides.shape)
    dense = np.empty(flat.size, np.int32)
    dense[pixel] = np.arange(len(pixel), dtype=np.int32)
    where, side = np.nonzero(sides)
    side8 = side.astype(np.uint8)
    next_pixel, next_side = _next_edges(flat, pixel[where], side8, steps)
    return _Edges(pixel[where], side8, number[dense[next_pixel], next_side])


def _on_border(padded: I32) -> Mask:
    """Object pixels that have a 4-neighbour of another label (flattened, padded frame)."""
    across = padded[:, 1:] != padded[:, :-1]
    down = padded[1:] != padded[:-1]
    out = np.zeros(padded.shape, np.bool_)
    out[:, 1:] |= across
    out[:, :-1] |= across
    out[1:] |= down
    out[:-1] |= down
    out &= padded > 0
    return out.ravel()


def _next_edges(flat: I32, pixel: Int, side: npt.NDArray[np.uint8], steps: Int) -> tuple[Int, Int]:
    """Pixel and side of the edge that follows each edge.

    If the pixel ahead is of another label: turn round the own pixel (also when the diagonal pixel has the same
    label: diagonal contact does not connect). Else straight on, or, if the pixel ahead on the outer side belongs
    too, turn outwards onto it.
    """
    forward = steps[[_RIGHT, _BOTTOM, _LEFT, _TOP]][side]
    own = flat[pixel]
    ahead = pixel + forward
    diagonal = ahead + steps[side]
    blocked = flat[ahead] != own
    outward = ~blocked & (flat[diagonal] == own)
    next_pixel = np.where(blocked, pixel, np.where(outward, diagonal, ahead))
    turn = blocked.astype(np.uint8) + np.uint8(3) * outward
    return next_pixel, (side + turn) & np.uint8(3)


def _is_hole(edges: _Edges, ring: I32, count: int, width: int) -> Mask:
    """Rings of negative signed area: x is summed over south-going edges minus north-going ones (Green)."""
    x = edges.pixel % width
    sign = np.array([0, 1, 0, -1], np.float64)[edges.side]
    area = np.bincount(ring, weights=sign * (x + (edges.side == _RIGHT)), minlength=count)
    return np.asarray(area < 0)


def _ring_exteriors(edges: _Edges, ring: I32, start: I32, hole: Mask, width: int) -> I32:
    """For each ring the exterior of its component (itself, for exteriors).

    From the pixel left of a hole's leftmost edge, walk left inside the component: the run ends at an edge of
    another ring of the component that reaches further left; repeat until that ring is an exterior.
    """
    parent = np.arange(len(start), dtype=np.int32)
    if not hole.any():
        return parent
    lefts = np.flatnonzero(edges.side == _LEFT)
    candidate = np.flatnonzero((edges.side == _RIGHT) & hole[ring])
    column = edges.pixel[candidate] % width
    candidate = candidate[np.lexsort((column, ring[candidate]))]
    rings, first = np.unique(ring[candidate], return_index=True)
    pixel = edges.pixel[candidate[first]]
    run = lefts[np.searchsorted(edges.pixel[lefts], pixel, side="right") - 1]
    parent[rings] = ring[run]
    while hole[parent].any():
        parent = parent[parent]
    return parent


def _ring_points(edges: _Edges, edge_index: I32, lengths: I64, *, width: int, style: Style) -> tuple[F64, I64]:
    """Coordinates and ring offsets, collinear points left out."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    side = edges.side[edge_index]
    previous = np.roll(side, 1)
    previous[offsets[:-1]] = side[offsets[1:] - 1]
    if style == "exact":
        keep = previous != side
    else:
        later = np.roll(side, -1)
        later[offsets[1:] - 1] = side[offsets[:-1]]
        keep = previous != later  # steps between middles are equal exactly when these two sides are
    pixel, side = edges.pixel[edge_index[keep]], side[keep]
    table = _TAIL if style == "exact" else _MIDDLE
    row, column = np.divmod(pixel, width)
    coords = table[side]
    coords[:, 0] += column - 1
    coords[:, 1] += row - 1
    kept = np.concatenate([[0], np.cumsum(keep)])[offsets].astype(np.int64)
    return coords, kept


# ---------------------------------------------------------------- cycles of the edge-successor permutation


def find_rings(following: I32) -> tuple[int, I32]:
    """(number of rings, int32[edges] ring of each edge)."""
    count, ring = connected_components(_edge_graph(following), directed=True, connection="strong")
    return int(count), ring


def first_edges(ring: I32, count: int) -> I32:
    """The lowest edge of each ring."""
    first = np.empty(count, np.int32)
    first[ring[::-1]] = np.arange(len(ring), dtype=np.int32)[::-1]  # of repeated indices the last one stays
    return first


def walk_rings(following: I32, starts: I32) -> I32:
    """All edges in ring order, rings in the order of ``starts`` (one edge of each ring).

    The rings are opened and joined into one path, which a breadth-first search then walks in compiled code.
    """
    path = following.copy()
    before = np.empty_like(following)
    before[following] = np.arange(len(following), dtype=np.int32)
    path[before[starts[:-1]]] = starts[1:]
    path[before[starts[-1]]] = starts[0]
    edge_index: I32 = breadth_first_order(_edge_graph(path), int(starts[0]), directed=True, return_predecessors=False)
    return edge_index


def split_touching(following: I32, count: int, ring: I32, *, head: Int, among: Int) -> tuple[I32, int, I32]:
    """Part rings that pass twice through one corner, where a hole touches the outline (or another hole).

    Such a ring is no valid polygon with exact corners. Both passes belong to one component, so swapping the two
    successors parts the ring in two that touch in that corner only, which is valid. ``head``: the corner each edge
    ends in; ``among``: the edges that can end in such a corner. Returns following, count, ring.
    """
    by_corner = among[np.lexsort((ring[among], head[among]))]
    a, b = by_corner[:-1], by_corner[1:]
    twice = (head[a] == head[b]) & (ring[a] == ring[b])
    if not twice.any():
        return following, count, ring
    a, b = a[twice], b[twice]
    parted = following.copy()
    parted[a], parted[b] = following[b], following[a]
    return parted, *find_rings(parted)


def _edge_graph(following: I32) -> csr_array:
    n = len(following)
    return csr_array((np.ones(n), following, np.arange(n + 1, dtype=np.int32)), shape=(n, n))
