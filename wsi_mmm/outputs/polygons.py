"""Polygons of objects: `trace` them, scale them (`to_objects`), thin them out, and make them safe to publish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import shapely

from wsi_mmm.outputs.ragged import (
    Frame,
    concat,
    drop_points,
    drop_rings,
    empty,
    following_points,
    offsets_of,
    part,
    ring_areas,
    take,
    to_objects,
)
from wsi_mmm.outputs.trace import Rings, trace
from wsi_mmm.types import F64, I64, Mask, Objects

__all__ = ["Frame", "Rings", "Rounded", "clip", "round_valid", "simplify", "to_objects", "trace"]

Geometries = npt.NDArray[np.object_]

CHUNK = 20_000  # objects handed to shapely at a time: bounds memory
SLIVER = 0.1  # level-0 px^2: what is smaller after rounding is no object


@dataclass(frozen=True, slots=True)
class Rounded:
    """`round_valid`'s answer: the safe objects and how many were repaired or dropped on the way."""

    objects: Objects
    repaired: int
    dropped: int


def simplify(objects: Objects, tolerance: float) -> Objects:
    """Fewer corners, the outline moving by about ``tolerance`` px at most; topology is kept."""
    if tolerance <= 0:
        return objects
    return _by_chunk(objects, lambda some: _replace_shapes(some, shapely.simplify(shapes(some), tolerance)))


def clip(objects: Objects, width: float, height: float) -> Objects:
    """Objects cut to [0, width] x [0, height]; what lies wholly outside goes. One cut in several keeps them all."""
    low, high = objects.coords.min(axis=1) < 0, (objects.coords > (width, height)).any(axis=1)
    beyond = _objects_with(objects, low | high)
    if not beyond.any():
        return objects
    some = take(objects, beyond)
    cut = shapely.intersection(shapely.make_valid(shapes(some)), shapely.box(0, 0, width, height))
    parts = concat([take(objects, ~beyond), from_parts(some, cut)])
    ranking = np.lexsort((parts.anchor[:, 1], parts.anchor[:, 0]))
    return take(parts, ranking)


def round_valid(objects: Objects, decimals: int = 2) -> Rounded:
    """Coordinates rounded to ``decimals`` and geometry that is valid *after* rounding.

    Repeated points, collapsed holes and slivers go; exteriors become counter-clockwise and holes clockwise;
    what rounding made invalid is repaired (several parts become several objects) or, failing that, dropped.
    """
    done = [_round_chunk(part(objects, *span), decimals) for span in _chunk_spans(len(objects))]
    if not done:
        return Rounded(objects, 0, 0)
    return Rounded(concat([d.objects for d in done]), sum(d.repaired for d in done), sum(d.dropped for d in done))


def _round_chunk(objects: Objects, decimals: int) -> Rounded:
    thin = _thin_out(objects, decimals)
    valid = shapely.is_valid(shapes(thin))
    mended = take(thin, ~valid)
    if len(mended):
        mended = _thin_out(from_parts(mended, shapely.make_valid(shapes(mended))), decimals)
        mended = _without_slivers(take(mended, shapely.is_valid(shapes(mended))))
        saved = len(np.unique(_object_keys(mended), axis=0))
        sound = concat([_without_slivers(take(thin, valid)), mended])
        sound = take(sound, _rank_like(objects, sound))
        return Rounded(_orient_rings(sound), saved, len(objects) - len(np.unique(_object_keys(sound), axis=0)))
    sound = _without_slivers(thin)
    return Rounded(_orient_rings(sound), 0, len(objects) - len(sound))


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
    distinct = (rounded.coords != rounded.coords[following_points(rounded)]).any(axis=1)
    thin = drop_points(rounded, distinct & _finite_points(rounded))
    return drop_rings(thin, np.diff(thin.ring_offsets) >= 3)


def _without_slivers(objects: Objects) -> Objects:
    """Valid objects whose rings are large enough (the signed area of a ring that crosses itself says nothing)."""
    return drop_rings(objects, np.abs(ring_areas(objects)) >= SLIVER)


def _finite_points(objects: Objects) -> Mask:
    """bool[m]: points of rings whose every coordinate is finite."""
    good = np.asarray(np.isfinite(objects.coords).all(axis=1), np.bool_)
    if good.all():
        return good
    bad_ring = np.searchsorted(objects.ring_offsets, np.flatnonzero(~good), side="right") - 1
    keep = np.ones(len(objects.ring_offsets) - 1, np.bool_)
    keep[bad_ring] = False
    return np.repeat(keep, np.diff(objects.ring_offsets))


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


def shapes(objects: Objects) -> Geometries:
    """object[n]: shapely polygons."""
    counts = np.diff(objects.ring_offsets)
    source = np.insert(np.arange(len(objects.coords)), objects.ring_offsets[1:], objects.ring_offsets[:-1])
    closed = objects.coords[source]
    offsets = (offsets_of(counts + 1), objects.object_offsets)
    polygons: Geometries = shapely.from_ragged_array(shapely.GeometryType.POLYGON, closed, offsets)
    return polygons


def _ragged_arrays(polygons: Geometries) -> tuple[F64, I64, I64]:
    """coords, ring offsets and object offsets of shapely polygons, rings open."""
    _, coords, (ring_offsets, object_offsets) = shapely.to_ragged_array(polygons, include_z=False)
    keep = np.ones(len(coords), np.bool_)
    keep[ring_offsets[1:] - 1] = False
    lengths = np.diff(ring_offsets) - 1
    return coords[keep], offsets_of(lengths), np.asarray(object_offsets, np.int64)


def _replace_shapes(objects: Objects, polygons: Geometries) -> Objects:
    coords, ring_offsets, object_offsets = _ragged_arrays(polygons)
    return replace(objects, coords=coords, ring_offsets=ring_offsets, object_offsets=object_offsets)


def from_parts(objects: Objects, geometries: Geometries) -> Objects:
    """The polygons found in ``geometries`` (any type), each with the class, anchor and measurements of its object."""
    once, first = shapely.get_parts(geometries, return_index=True)
    parts, second = shapely.get_parts(once, return_index=True)  # a collection may hold multi-polygons
    polygon = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)
    if not polygon.any():
        return empty(objects.task, list(objects.measurements))
    source = first[second][polygon]
    repeated = take(objects, source)
    return _orient_rings(_replace_shapes(repeated, parts[polygon]))


def _objects_with(objects: Objects, points: Mask) -> Mask:
    """bool[n]: objects that have one of the marked points."""
    total = np.concatenate([[0], np.cumsum(points)])
    ends = total[objects.ring_offsets[objects.object_offsets]]
    return np.asarray(np.diff(ends) > 0)


def _chunk_spans(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def _by_chunk(objects: Objects, change: Callable[[Objects], Objects]) -> Objects:
    spans = _chunk_spans(len(objects))
    return concat([change(part(objects, *span)) for span in spans]) if spans else objects
