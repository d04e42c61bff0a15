"""Polygons of objects as ragged arrays (see `Objects`): placed, joined, thinned out, made safe to publish.

Nothing per object lives in Python: index arithmetic is numpy's, geometry is GEOS's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import shapely

from wsi_mmm.outputs.trace import Rings, trace
from wsi_mmm.types import F64, I32, I64, Mask, Objects

__all__ = ["Frame", "Rings", "Rounded", "clip", "round_valid", "simplify", "to_objects", "trace"]

Geometries = npt.NDArray[np.object_]

CHUNK = 20_000  # objects handed to shapely at a time: bounds memory
SLIVER = 0.1  # level-0 px^2: what is smaller after rounding is no object


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
        task, coords, rings.ring_offsets, rings.object_offsets, np.asarray(class_index, np.int32),
        np.asarray(anchor, np.int64).reshape(-1, 2), dict(measurements or {}),
    )  # fmt: skip


# ---------------------------------------------------------------- ragged arrays


def empty(task: str, measurements: Sequence[str] = ()) -> Objects:
    """No objects of ``task``."""
    zero = np.zeros(1, np.int64)
    table = {name: np.empty(0) for name in measurements}
    return Objects(task, np.empty((0, 2)), zero, zero, np.empty(0, np.int32), np.empty((0, 2), np.int64), table)


def take(objects: Objects, index: I64 | Mask) -> Objects:
    """The objects at ``index`` (integers in any order, or a mask)."""
    chosen = np.flatnonzero(index) if index.dtype == np.bool_ else np.asarray(index, np.int64)
    ring_index, object_offsets = gather_groups(objects.object_offsets, chosen)
    coord_index, ring_offsets = gather_groups(objects.ring_offsets, ring_index)
    return _with_outlines(objects, chosen, objects.coords[coord_index], ring_offsets, object_offsets)


def part(objects: Objects, start: int, stop: int) -> Objects:
    """Objects ``start`` to ``stop`` as views where possible."""
    rings = objects.object_offsets[start : stop + 1]
    points = objects.ring_offsets[rings[0] : rings[-1] + 1]
    coords = objects.coords[points[0] : points[-1]]
    return _with_outlines(objects, slice(start, stop), coords, points - points[0], rings - rings[0])


def _with_outlines(
    objects: Objects, chosen: I64 | Mask | slice, coords: F64, ring_offsets: I64, object_offsets: I64
) -> Objects:
    """The chosen objects with outlines of their own."""
    measurements = {name: values[chosen] for name, values in objects.measurements.items()}
    class_index, anchor = objects.class_index[chosen], objects.anchor[chosen]
    return Objects(objects.task, coords, ring_offsets, object_offsets, class_index, anchor, measurements)


def chunks(objects: Objects, count: int = CHUNK) -> Iterator[Objects]:
    """The objects in parts of ``count``; at least one part, which may be empty."""
    for start in range(0, max(len(objects), 1), count):
        yield part(objects, start, min(start + count, len(objects)))


def concat(parts: Sequence[Objects]) -> Objects:
    """All objects of ``parts`` (of one task), in order. A measurement that a part lacks is NaN there."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return empty("")
    names = list(dict.fromkeys(name for p in parts for name in p.measurements))
    return Objects(
        parts[0].task,
        np.concatenate([p.coords for p in parts]),
        offsets_of(np.concatenate([np.diff(p.ring_offsets) for p in parts])),
        offsets_of(np.concatenate([np.diff(p.object_offsets) for p in parts])),
        np.concatenate([p.class_index for p in parts]),
        np.concatenate([p.anchor for p in parts]),
        {n: np.concatenate([p.measurements.get(n, np.full(len(p), np.nan)) for p in parts]) for n in names},
    )


def scaled(objects: Objects, scale_x: float, scale_y: float) -> Objects:
    """Coordinates multiplied: target px -> level-0 px. Anchors stay."""
    return replace(objects, coords=objects.coords * np.array([scale_x, scale_y]))


def sort_by_anchor(objects: Objects) -> Objects:
    """Objects in the order every published file has: by anchor (y, then x), then class (masks may overlap)."""
    return take(objects, np.lexsort((objects.class_index, objects.anchor[:, 1], objects.anchor[:, 0])))


def ring_areas(objects: Objects) -> F64:
    """Signed area of each ring (shoelace formula; exteriors positive, holes negative).

    bincount adds in order, so equal rings give equal areas wherever they lie.
    """
    (x, y), following = objects.coords.T, following_points(objects)
    count = len(objects.ring_offsets) - 1
    ring = np.repeat(np.arange(count), np.diff(objects.ring_offsets))
    doubled = np.bincount(ring, weights=x * y[following] - x[following] * y, minlength=count)
    return np.asarray(0.5 * doubled, np.float64)


def drop_rings(objects: Objects, keep: Mask) -> Objects:
    """``objects`` without the rings that ``keep`` bool[rings] denies; an object goes with its exterior."""
    owner = np.repeat(np.arange(len(objects)), np.diff(objects.object_offsets))
    stays = keep[objects.object_offsets[:-1]]
    chosen = np.flatnonzero(keep & stays[owner])
    coord_index, ring_offsets = gather_groups(objects.ring_offsets, chosen)
    counts = np.bincount(owner[chosen], minlength=len(objects))[stays]
    return _with_outlines(objects, stays, objects.coords[coord_index], ring_offsets, offsets_of(counts))


def drop_points(objects: Objects, keep: Mask) -> Objects:
    """``objects`` without the points that ``keep`` bool[m] denies (rings may become empty)."""
    if keep.all():
        return objects
    return replace(objects, coords=objects.coords[keep], ring_offsets=offsets_of(keep)[objects.ring_offsets])


def offsets_of(counts: npt.NDArray[np.integer] | Mask) -> I64:
    """int64[n + 1] offsets of n consecutive groups of ``counts`` members."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def gather_groups(offsets: I64, chosen: I64) -> tuple[I64, I64]:
    """(indices of the members of the chosen groups, offsets of those groups among them)."""
    start, length = offsets[chosen], offsets[chosen + 1] - offsets[chosen]
    out = offsets_of(length)
    return np.repeat(start - out[:-1], length) + np.arange(out[-1], dtype=np.int64), out


def following_points(objects: Objects) -> I64:
    """int64[m]: index of the next point of the same ring (the last point's is the first)."""
    following = np.arange(1, len(objects.coords) + 1, dtype=np.int64)
    filled = np.diff(objects.ring_offsets) > 0
    following[objects.ring_offsets[1:][filled] - 1] = objects.ring_offsets[:-1][filled]
    return following


# ---------------------------------------------------------------- shapely


def shapes(objects: Objects) -> Geometries:
    """object[n]: shapely polygons."""
    if not len(objects):  # shapely takes no empty arrays
        return np.empty(0, np.object_)
    source = np.insert(np.arange(len(objects.coords)), objects.ring_offsets[1:], objects.ring_offsets[:-1])
    offsets = (offsets_of(np.diff(objects.ring_offsets) + 1), objects.object_offsets)
    polygons: Geometries = shapely.from_ragged_array(shapely.GeometryType.POLYGON, objects.coords[source], offsets)
    return polygons


def _replace_shapes(objects: Objects, polygons: Geometries) -> Objects:
    """``objects`` with the outlines of shapely polygons, their rings open."""
    _, coords, (ring_offsets, object_offsets) = shapely.to_ragged_array(polygons, include_z=False)
    keep = np.ones(len(coords), np.bool_)
    keep[ring_offsets[1:] - 1] = False
    return replace(
        objects, coords=coords[keep], ring_offsets=offsets_of(np.diff(ring_offsets) - 1),
        object_offsets=np.asarray(object_offsets, np.int64),
    )  # fmt: skip


def from_parts(objects: Objects, geometries: Geometries) -> Objects:
    """The polygons found in ``geometries`` (any type), each with the class, anchor and measurements of its object."""
    once, first = shapely.get_parts(geometries, return_index=True)
    parts, second = shapely.get_parts(once, return_index=True)  # a collection may hold multi-polygons
    polygon = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)
    if not polygon.any():
        return empty(objects.task, list(objects.measurements))
    return _orient_rings(_replace_shapes(take(objects, first[second][polygon]), parts[polygon]))


def simplify(objects: Objects, tolerance: float) -> Objects:
    """Fewer corners, the outline moving by about ``tolerance`` px at most; topology is kept."""
    if tolerance <= 0 or not len(objects):
        return objects
    return _replace_shapes(objects, shapely.simplify(shapes(objects), tolerance))


def clip(objects: Objects, width: float, height: float) -> Objects:
    """Objects cut to [0, width] x [0, height]; what lies wholly outside goes. One cut in several keeps them all."""
    outside = (objects.coords.min(axis=1) < 0) | (objects.coords > (width, height)).any(axis=1)
    counts = offsets_of(outside)[objects.ring_offsets[objects.object_offsets]]
    beyond = np.diff(counts) > 0
    if not beyond.any():
        return objects
    some = take(objects, beyond)
    cut = shapely.intersection(shapely.make_valid(shapes(some)), shapely.box(0, 0, width, height))
    parts = concat([take(objects, ~beyond), from_parts(some, cut)])
    return take(parts, np.lexsort((parts.anchor[:, 1], parts.anchor[:, 0])))


@dataclass(frozen=True, slots=True)
class Rounded:
    """`round_valid`'s answer: the safe objects and how many were repaired or dropped on the way."""

    objects: Objects
    repaired: int
    dropped: int


def round_valid(objects: Objects, decimals: int = 2) -> Rounded:
    """Coordinates rounded to ``decimals`` and geometry that is valid *after* rounding.

    Repeated points, collapsed holes and slivers go; exteriors become counter-clockwise and holes clockwise;
    what rounding made invalid is repaired (several parts become several objects) or, failing that, dropped.
    Give many objects in `chunks`: shapely holds them all.
    """
    if not len(objects):
        return Rounded(objects, 0, 0)
    thin = _thin_out(objects, decimals)
    valid = shapely.is_valid(shapes(thin))
    mended = take(thin, ~valid)
    if not len(mended):
        sound = _without_slivers(thin)
        return Rounded(_orient_rings(sound), 0, len(objects) - len(sound))
    mended = _thin_out(from_parts(mended, shapely.make_valid(shapes(mended))), decimals)
    mended = _without_slivers(take(mended, shapely.is_valid(shapes(mended))))
    saved = len(np.unique(_object_keys(mended), axis=0))
    sound = concat([_without_slivers(take(thin, valid)), mended])
    sound = take(sound, _rank_like(objects, sound))
    return Rounded(_orient_rings(sound), saved, len(objects) - len(np.unique(_object_keys(sound), axis=0)))


def _object_keys(objects: Objects) -> I64:
    """int64[n, 3]: what no two objects of a task have in common."""
    return np.column_stack([objects.anchor, objects.class_index.astype(np.int64)])


def _rank_like(objects: Objects, some: Objects) -> I64:
    """Order that puts ``some`` (a subset, perhaps in parts) back into the order of ``objects``."""
    both = np.concatenate([_object_keys(objects), _object_keys(some)])
    _, number = np.unique(both, axis=0, return_inverse=True)
    place = np.zeros(number.max() + 1, np.int64)
    place[number[: len(objects)]] = np.arange(len(objects))
    return np.argsort(place[number[len(objects) :]], kind="stable")


def _thin_out(objects: Objects, decimals: int) -> Objects:
    """Rounded, without repeated points, rings of less than three, and rings that are not finite."""
    rounded = replace(objects, coords=np.round(objects.coords, decimals) + 0.0)  # + 0.0: no minus zero
    keep = (rounded.coords != rounded.coords[following_points(rounded)]).any(axis=1)
    infinite = ~np.isfinite(rounded.coords).all(axis=1)
    if infinite.any():
        ring = np.repeat(np.arange(len(rounded.ring_offsets) - 1), np.diff(rounded.ring_offsets))
        keep &= ~np.isin(ring, ring[infinite])
    thin = drop_points(rounded, keep)
    return drop_rings(thin, np.diff(thin.ring_offsets) >= 3)


def _without_slivers(objects: Objects) -> Objects:
    """Valid objects whose rings are large enough (the signed area of a ring that crosses itself says nothing)."""
    return drop_rings(objects, np.abs(ring_areas(objects)) >= SLIVER)


def _orient_rings(objects: Objects) -> Objects:
    hole = np.ones(len(objects.ring_offsets) - 1, np.bool_)
    hole[objects.object_offsets[:-1]] = False
    wrong = (ring_areas(objects) < 0) != hole
    if not wrong.any():
        return objects
    index = np.arange(len(objects.coords))
    start, stop = objects.ring_offsets[:-1], objects.ring_offsets[1:]
    turned = np.repeat(wrong, stop - start)
    index[turned] = np.repeat(start + stop - 1, stop - start)[turned] - index[turned]
    return replace(objects, coords=objects.coords[index])
