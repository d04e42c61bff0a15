"""Ragged-array arithmetic on `Objects`: numpy only, nothing per object in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from wsi_mmm.outputs.trace import Rings
from wsi_mmm.types import F64, I32, I64, Mask, Objects


@dataclass(frozen=True, slots=True)
class Frame:
    """The place of a label image: its pixel (row r, column c) covers target px [x0 + c * step, x0 + (c + 1) * step).

    ``scale_x``/``scale_y``: level-0 px per target px.
    """

    x0: float = 0.0
    y0: float = 0.0
    step: float = 1.0
    scale_x: float = 1.0
    scale_y: float = 1.0


def to_objects(
    rings: Rings,
    frame: Frame,
    *,
    task: str,
    class_index: I32,
    anchor: I64,
    measurements: Mapping[str, F64] | None = None,
) -> Objects:
    """Traced rings, scaled and shifted into level-0 px, as `Objects` (n classes, anchors and measurements given)."""
    coords = np.empty_like(rings.coords)
    coords[:, 0] = (frame.x0 + rings.coords[:, 0] * frame.step) * frame.scale_x
    coords[:, 1] = (frame.y0 + rings.coords[:, 1] * frame.step) * frame.scale_y
    return Objects(
        task,
        coords,
        rings.ring_offsets,
        rings.object_offsets,
        np.asarray(class_index, np.int32),
        np.asarray(anchor, np.int64).reshape(-1, 2),
        dict(measurements or {}),
    )


def empty(task: str, measurements: Sequence[str] = ()) -> Objects:
    """No objects of ``task``."""
    zero = np.zeros(1, np.int64)
    table = {name: np.empty(0) for name in measurements}
    return Objects(task, np.empty((0, 2)), zero, zero, np.empty(0, np.int32), np.empty((0, 2), np.int64), table)


def take(objects: Objects, index: I64 | Mask) -> Objects:
    """The objects at ``index`` (integers in any order, or a mask)."""
    chosen = np.flatnonzero(index) if index.dtype == np.bool_ else np.asarray(index, np.int64)
    ring_index, object_offsets = _gather_groups(objects.object_offsets, chosen)
    coord_index, ring_offsets = _gather_groups(objects.ring_offsets, ring_index)
    return Objects(
        objects.task,
        objects.coords[coord_index],
        ring_offsets,
        object_offsets,
        objects.class_index[chosen],
        objects.anchor[chosen],
        {name: values[chosen] for name, values in objects.measurements.items()},
    )


def part(objects: Objects, start: int, stop: int) -> Objects:
    """Objects ``start`` to ``stop`` as views where possible."""
    rings = objects.object_offsets[start : stop + 1]
    points = objects.ring_offsets[rings[0] : rings[-1] + 1]
    return Objects(
        objects.task,
        objects.coords[points[0] : points[-1]],
        points - points[0],
        rings - rings[0],
        objects.class_index[start:stop],
        objects.anchor[start:stop],
        {name: values[start:stop] for name, values in objects.measurements.items()},
    )


def concat(parts: Sequence[Objects]) -> Objects:
    """All objects of ``parts`` (of one task), in order. A measurement that a part lacks is NaN there."""
    if len(parts) == 1:
        return parts[0]
    names = list(dict.fromkeys(name for p in parts for name in p.measurements))
    if not parts:
        return empty("")
    return Objects(
        parts[0].task,
        np.concatenate([p.coords for p in parts]),
        _join_offsets([p.ring_offsets for p in parts]),
        _join_offsets([p.object_offsets for p in parts]),
        np.concatenate([p.class_index for p in parts]),
        np.concatenate([p.anchor for p in parts]),
        {n: np.concatenate([p.measurements.get(n, np.full(len(p), np.nan)) for p in parts]) for n in names},
    )


def sort_by_anchor(objects: Objects) -> Objects:
    """Objects in the order every published file has: by anchor (y, then x), then class (masks may overlap)."""
    return take(objects, np.lexsort((objects.class_index, objects.anchor[:, 1], objects.anchor[:, 0])))


def ring_areas(objects: Objects) -> F64:
    """Signed area of each ring (shoelace formula; exteriors positive, holes negative)."""
    following = _following_index(objects.ring_offsets, len(objects.coords))
    x, y = objects.coords[:, 0], objects.coords[:, 1]
    cross = x * y[following] - x[following] * y
    return 0.5 * _group_sums(cross, objects.ring_offsets)


def drop_rings(objects: Objects, keep: Mask) -> Objects:
    """``objects`` without the rings that ``keep`` bool[rings] denies; an object goes with its exterior."""
    owner = np.repeat(np.arange(len(objects)), np.diff(objects.object_offsets))
    stays = keep[objects.object_offsets[:-1]]
    chosen = np.flatnonzero(keep & stays[owner])
    coord_index, ring_offsets = _gather_groups(objects.ring_offsets, chosen)
    counts = np.bincount(owner[chosen], minlength=len(objects))[stays]
    return Objects(
        objects.task,
        objects.coords[coord_index],
        ring_offsets,
        offsets_of(counts),
        objects.class_index[stays],
        objects.anchor[stays],
        {name: values[stays] for name, values in objects.measurements.items()},
    )


def take_rings(objects: Objects, rank: I64) -> Objects:
    """Rings in the order ``rank``, a permutation that keeps each object's rings together and its exterior first."""
    coord_index, ring_offsets = _gather_groups(objects.ring_offsets, rank)
    return replace(objects, coords=objects.coords[coord_index], ring_offsets=ring_offsets)


def drop_points(objects: Objects, keep: Mask) -> Objects:
    """``objects`` without the points that ``keep`` bool[m] denies (rings may become empty)."""
    if keep.all():
        return objects
    total = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
    return replace(objects, coords=objects.coords[keep], ring_offsets=total[objects.ring_offsets])


def offsets_of(counts: npt.NDArray[np.integer]) -> I64:
    """int64[n + 1] offsets of n consecutive groups of ``counts`` members."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def following_points(objects: Objects) -> I64:
    """int64[m]: index of the next point of the same ring (the last point's is the first)."""
    return _following_index(objects.ring_offsets, len(objects.coords))


def preceding_points(objects: Objects) -> I64:
    """int64[m]: index of the previous point of the same ring (the first point's is the last)."""
    following = following_points(objects)
    preceding = np.empty_like(following)
    preceding[following] = np.arange(len(following))
    return preceding


def scaled(objects: Objects, scale_x: float, scale_y: float) -> Objects:
    """Coordinates multiplied: target px -> level-0 px. Anchors stay."""
    return replace(objects, coords=objects.coords * np.array([scale_x, scale_y]))


def _following_index(offsets: I64, count: int) -> I64:
    following = np.arange(1, count + 1, dtype=np.int64)
    filled = np.diff(offsets) > 0
    following[offsets[1:][filled] - 1] = offsets[:-1][filled]
    return following


def _group_sums(values: F64, offsets: I64) -> F64:
    """Sum of ``values`` per group. bincount adds in order, so equal groups give equal sums wherever they lie."""
    group = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.asarray(np.bincount(group, weights=values, minlength=len(offsets) - 1), np.float64)


def _gather_groups(offsets: I64, chosen: I64) -> tuple[I64, I64]:
    """(indices of the members of the chosen groups, offsets of those groups among them)."""
    start, length = offsets[chosen], offsets[chosen + 1] - offsets[chosen]
    out = offsets_of(length)
    return np.repeat(start - out[:-1], length) + np.arange(out[-1], dtype=np.int64), out


def _join_offsets(offsets: Sequence[I64]) -> I64:
    return offsets_of(np.concatenate([np.diff(o) for o in offsets]))
