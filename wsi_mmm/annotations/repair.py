"""Outlines made safe for geometry: thinned, repaired, and refused where that would be work without bound.

GEOS finds where an outline crosses itself in a time that grows with the pairs of its edges that lie near each other,
and repairs it in one that grows with the crossings: three thousand corners may cross a million times. Both numbers are
estimated on a sample of the edges before GEOS is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon

from wsi_mmm.errors import AnnotationError
from wsi_mmm.types import F64, Mask

MANY_VERTICES = 100_000
"""An outline of more vertices is thinned."""

THIN_PX = 0.25
"""Level-0 px: a thinned outline keeps one vertex in a square of this side, so it moves by less than half a px."""

MAX_VERTICES = 2_000_000
"""Vertices of one outline after thinning."""

MAX_CROSSINGS = 50_000
"""Times that the outlines of a file may cross themselves: some three seconds of repair."""

MAX_NEAR = 200_000_000
"""Pairs of edges of one outline whose extents overlap: some ten seconds of looking for crossings."""

_FEW = 300  # edges that cannot cross often enough to matter
_SAMPLE, _NEAR_SAMPLE = 4096, 64  # edges that are looked at in an outline of more


def thin_outlines(polygons: Any, name: str) -> Any:
    """Return ``polygons`` object[n] (None: no polygon) with those of many vertices thinned, and None where nothing is
    left. Raises AnnotationError for one that has too many all the same."""
    many = np.flatnonzero(shapely.get_num_coordinates(polygons) > MANY_VERTICES)
    if not len(many):
        return polygons
    thinned = polygons.copy()
    for number in many.tolist():
        thinned[number] = made = _thin_outline(polygons[number])
        if shapely.get_num_coordinates(made) > MAX_VERTICES:
            raise AnnotationError(
                f"{name}: object {number} has more than {MAX_VERTICES:,} vertices {THIN_PX} px apart: simplify it, or "
                "give the area as a mask picture"
            )
    return thinned


def _thin_outline(geometry: Any) -> Any:
    parts = [part for part in map(_thin_polygon, shapely.get_parts(geometry)) if part is not None]
    return None if not parts else parts[0] if len(parts) == 1 else MultiPolygon(parts)


def _thin_polygon(polygon: Any) -> Any:
    rings = [_thin_ring(shapely.get_coordinates(ring)) for ring in shapely.get_rings(polygon)]
    if len(rings[0]) < 3:
        return None
    return Polygon(rings[0], [ring for ring in rings[1:] if len(ring) >= 3])


def _thin_ring(xy: F64) -> F64:
    """The first vertex of every run in one square of side `THIN_PX`."""
    cell = np.floor(xy / THIN_PX)
    keep = np.append(True, (cell[1:] != cell[:-1]).any(axis=1))
    return np.asarray(xy[keep], np.float64)


def repair_polygons(polygons: Any, name: str) -> tuple[Any, Mask]:
    """Return valid polygons with area, object[n] (None: nothing is left), and which were changed, bool[n].

    Raises AnnotationError for outlines that cross themselves too often to be repaired.
    """
    _check_near(polygons, name)
    mended = ~(shapely.is_valid(polygons) & (shapely.area(polygons) > 0)) & ~shapely.is_missing(polygons)
    made, crossings = polygons.copy(), 0
    for number in np.flatnonzero(mended).tolist():
        crossings += count_crossings([polygons[number]])
        if crossings > MAX_CROSSINGS:
            raise AnnotationError(
                f"{name}: outlines cross themselves more than {MAX_CROSSINGS:,} times, those of object {number} and "
                "before: draw them again, or give the area as a mask picture"
            )
        made[number] = _repair_polygon(polygons[number])
    return made, np.asarray(mended, bool)


def _repair_polygon(geometry: Any) -> Polygon | MultiPolygon | None:
    """The polygon parts with area that are left of an invalid Polygon or MultiPolygon, or None.

    Nothing is left of a ring in its own hole: then the rings stand in the wrong sequence, and the outer one counts.
    """
    kept = polygon_parts(shapely.make_valid(geometry, method="structure", keep_collapsed=False))
    return join_parts(kept or polygon_parts(shapely.make_valid(geometry)))


def polygon_parts(geometry: Any) -> list[Polygon]:
    """The polygons with area in a geometry of any kind."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return [part for part in parts if part.geom_type == "Polygon" and part.area > 0]


def join_parts(parts: list[Polygon]) -> Polygon | MultiPolygon | None:
    """One geometry of polygons that do not overlap; None of none."""
    return None if not parts else parts[0] if len(parts) == 1 else MultiPolygon(parts)


def check_crossings(geometries: Iterable[Any], name: str) -> None:
    """Raise AnnotationError when outlines cross each other too often to be united."""
    if (count := count_crossings(list(geometries))) > MAX_CROSSINGS:
        raise AnnotationError(
            f"{name}: its outlines cross each other some {count:,} times, more than {MAX_CROSSINGS:,}: draw fewer, or "
            "give the area as a mask picture"
        )


def count_crossings(geometries: list[Any]) -> int:
    """How often the outlines of ``geometries`` cross each other and themselves, estimated on a sample of their edges;
    0 where there are too few edges to matter."""
    edges = _edges_of(geometries)
    if len(edges) <= _FEW:
        return 0
    lines = shapely.linestrings(edges)
    tree = shapely.STRtree(lines)
    asked = np.linspace(0, len(lines) - 1, min(len(lines), _SAMPLE)).astype(np.int64)
    most = 2 * MAX_CROSSINGS * len(asked) / len(lines)
    found = seen = 0
    step = min(64, max(1, (1 << 22) // len(lines)))  # bounds the pairs that are held
    for start in range(0, len(asked), step):
        some = asked[start : start + step]
        found, seen = found + tree.query(lines[some], predicate="crosses").shape[1], seen + len(some)
        if found > most + 8:
            break
    return round(found / 2 * len(lines) / seen)


def _edges_of(geometries: list[Any]) -> F64:
    """Edges float64[n, 2, 2] of all rings."""
    rings = shapely.get_rings(shapely.get_parts([one for one in geometries if one is not None]))
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    edges: F64 = np.stack([xy[:-1], xy[1:]], axis=1)[ring[1:] == ring[:-1]] if len(xy) else np.zeros((0, 2, 2))
    return np.asarray(edges[(edges[:, 0] != edges[:, 1]).any(axis=1)], np.float64)


def _check_near(polygons: Any, name: str) -> None:
    """AnnotationError for an outline with so many edges near each other that looking for crossings takes too long."""
    for number in np.flatnonzero(shapely.get_num_coordinates(polygons) ** 2 > MAX_NEAR).tolist():
        edges = _edges_of([polygons[number]])
        low, high = edges.min(axis=1), edges.max(axis=1)
        asked = np.linspace(0, len(edges) - 1, _NEAR_SAMPLE).astype(np.int64)
        near = [int(((low <= high[one]) & (high >= low[one])).all(axis=1).sum()) for one in asked]
        # Without the largest: one edge across everything is no sign of many.
        count = (sum(near) - max(near)) / (len(near) - 1) * len(edges) / 2
        if count > MAX_NEAR:
            raise AnnotationError(
                f"{name}: object {number} has {len(edges):,} edges that lie too close together to be checked (some "
                f"{count:.1e} pairs, at most {MAX_NEAR:.0e}): simplify it, or give the area as a mask picture"
            )
