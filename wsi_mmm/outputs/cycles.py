"""Rings as cycles of a permutation: edge -> the edge that follows it. Compiled graph walks instead of Python loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from wsi_mmm.types import I32

Int = npt.NDArray[np.integer[Any]]


def cycles(following: I32) -> tuple[int, I32]:
    """(number of rings, int32[edges] ring of each edge)."""
    count, ring = connected_components(_graph(following), directed=True, connection="strong")
    return int(count), ring


def first_of_each(ring: I32, count: int) -> I32:
    """The lowest edge of each ring."""
    first = np.empty(count, np.int32)
    first[ring[::-1]] = np.arange(len(ring), dtype=np.int32)[::-1]  # of repeated indices the last one stays
    return first


def walk(following: I32, starts: I32) -> I32:
    """All edges in ring order, rings in the order of ``starts`` (one edge of each ring).

    The rings are opened and joined into one path, which a breadth-first search then walks in compiled code.
    """
    path = following.copy()
    before = np.empty_like(following)
    before[following] = np.arange(len(following), dtype=np.int32)
    path[before[starts[:-1]]] = starts[1:]
    path[before[starts[-1]]] = starts[0]
    order: I32 = breadth_first_order(_graph(path), int(starts[0]), directed=True, return_predecessors=False)
    return order


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
    return parted, *cycles(parted)


def _graph(following: I32) -> csr_array:
    n = len(following)
    return csr_array((np.ones(n), following, np.arange(n + 1, dtype=np.int32)), shape=(n, n))
