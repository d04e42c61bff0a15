"""Objects and tissue as shapes of the platform: whole level-0 px inside the slide, polygons without holes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from wsi_mmm.empaia.bodies import Polygon, Ring, Wsi
from wsi_mmm.outputs.polygons import Frame, simplify, to_objects, trace
from wsi_mmm.tiles.tissue import TissueMask
from wsi_mmm.types import F64, I64, Mask

_CUTS = 500  # holes opened per outline at most; those beyond are filled


@dataclass(frozen=True, slots=True)
class Area:
    """A part of a slide, in level-0 px: a prepared shapely geometry."""

    shape: BaseGeometry

    @property
    def size(self) -> float:
        """Level-0 px^2."""
        return float(self.shape.area)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Level-0 (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = self.shape.bounds
        return x0, y0, x1, y1

    def holds(self, points: F64) -> Mask:
        """bool[n]: which of ``points`` float64[n, 2] (x, y) lie in it or on its border."""
        return np.asarray(shapely.intersects_xy(self.shape, points[:, 0], points[:, 1]), np.bool_)


def area_of(ring: F64, wsi: Wsi) -> Area | None:
    """The part of the slide that a ring float64[n, 2] (not closed) encloses; None when that is nothing."""
    if len(ring) < 3 or not np.isfinite(ring).all():
        return None
    inside = shapely.intersection(_make_valid(shapely.Polygon(ring)), shapely.box(0, 0, wsi.width, wsi.height))
    return _area_or_none(shapely.union_all(_polygon_parts(inside)))


def joined(areas: Sequence[Area]) -> Area | None:
    """All of them as one; None for none."""
    return _area_or_none(shapely.union_all([area.shape for area in areas])) if areas else None


def _area_or_none(shape: BaseGeometry) -> Area | None:
    if shape.is_empty or shape.area <= 0:
        return None
    shapely.prepare(shape)
    return Area(shape)


def centres(outlines: Sequence[Sequence[F64]]) -> F64:
    """Centroids float64[n, 2] (x, y) of polygons, each given as its rings (not closed), the outside first."""
    shapes = [shapely.Polygon(outside, holes) for outside, *holes in outlines]
    return np.asarray(shapely.get_coordinates(shapely.centroid(shapes)), np.float64)


def meeting(some: Sequence[Polygon], boxes: F64) -> list[I64]:
    """Per polygon, which of the rectangles float64[n, 4] (x0, y0, x1, y1) have a pixel of it; in order."""
    tree = shapely.STRtree(shapely.box(*boxes.T) if len(boxes) else [])
    return [np.sort(tree.query(shapely.Polygon(one.corners), predicate="intersects")) for one in some]


def polygons(rings: Sequence[F64], wsi: Wsi, *, keep_holes: bool, area: Area | None = None) -> list[Polygon]:
    """The polygons that cover an area; the first ring float64[n, 2] is its outside, the others are holes.

    Cut to the slide and rounded so that they stay valid. The platform knows no holes: with ``keep_holes`` the area is
    cut along them into parts without any (same area: for regions); without, they are filled and the largest part
    is the answer (one object stays one: for nuclei). Only what lies in ``area`` is kept, if one is given. Empty when
    nothing is left, or for a ring that is not finite.
    """
    if not rings or any(len(ring) < 3 or not np.isfinite(ring).all() for ring in rings):
        return []
    outside, *holes = [np.round(ring, 3) for ring in rings]  # GEOS overflows on slopes of 1e180
    shape = shapely.Polygon(outside, holes if keep_holes else [])
    inside = shapely.intersection(_make_valid(shape), shapely.box(0, 0, wsi.width, wsi.height))
    if area is not None:
        inside = shapely.intersection(inside, area.shape)
    simple = _polygon_parts(shapely.set_precision(inside, 1.0))
    if not keep_holes:
        simple = [shapely.Polygon(part.exterior) for part in simple]
        return [Polygon(_outer_corners(part)) for part in sorted(simple, key=lambda part: -part.area)[:1]]
    return [Polygon(_outer_corners(part)) for part in _without_holes(simple)]


def tissue_polygons(mask: TissueMask, wsi: Wsi, area: Area | None) -> list[Polygon]:
    """The outlines of ``mask``, cut along their holes and, if one is given, to ``area``; in the order of the slide."""
    rings = trace(mask.mask.astype(np.int32))
    count = len(rings.labels)
    frame = Frame(scale_x=mask.scale_x, scale_y=mask.scale_y)
    anchor = np.column_stack([np.arange(count), np.zeros(count, np.int64)])
    drawn = to_objects(rings, frame, task="tissue", class_index=np.zeros(count, np.int32), anchor=anchor)
    drawn = simplify(drawn, max(mask.scale_x, mask.scale_y) / 2)
    corners = np.split(drawn.coords, drawn.ring_offsets[1:-1])
    outlines = [corners[first:last] for first, last in itertools.pairwise(drawn.object_offsets.tolist())]
    parts = [one for outline in outlines for one in polygons(outline, wsi, keep_holes=True, area=area)]
    return sorted(parts, key=lambda polygon: min((y, x) for x, y in polygon.corners))


def _make_valid(shape: BaseGeometry) -> BaseGeometry:
    return shape if shape.is_valid else shapely.make_valid(shape)


def _polygon_parts(shape: BaseGeometry) -> list[shapely.Polygon]:
    """The polygons of whatever geometry this is; lines and points between them have no area and go."""
    parts = shapely.get_parts(shape)
    found = [part for part in parts if part.geom_type == "Polygon" and part.area > 0]
    nested = [part for part in parts if part.geom_type in ("MultiPolygon", "GeometryCollection")]
    return found + [inner for part in nested for inner in _polygon_parts(part)]


def _without_holes(simple: list[shapely.Polygon]) -> Iterator[shapely.Polygon]:
    """Every part with a hole is cut through that hole, until none has any."""
    waiting, cuts = list(simple), 0
    while waiting:
        part = waiting.pop()
        if not part.interiors:
            yield part
        elif cuts >= _CUTS:
            yield shapely.Polygon(part.exterior)
        else:
            cuts += 1
            waiting += _cut_hole(part, np.asarray(part.interiors[0].coords, np.float64))


def _cut_hole(part: BaseGeometry, hole: F64) -> list[shapely.Polygon]:
    """``part`` in two along the upright through ``hole`` [n, 2]; all corners stay whole numbers."""
    x = _cut_position(hole)
    x0, y0, x1, y1 = part.bounds
    halves = (shapely.box(x0, y0, x, y1), shapely.box(x, y0, x1, y1))
    return [inner for half in halves for inner in _polygon_parts(shapely.intersection(part, half, grid_size=1.0))]


def _cut_position(hole: F64) -> float:
    """A whole x inside the hole; of a hole one px wide, the side on which it has an edge."""
    low, high = hole[:, 0].min(), hole[:, 0].max()
    if high - low >= 2:
        return float(np.floor((low + high) / 2))
    corners = hole[:-1, 0]  # closed: the last corner is the first
    return float(low if (corners == low).sum() >= 2 else high)


def _outer_corners(part: BaseGeometry) -> Ring:
    """The outside of a polygon, not closed."""
    return tuple((int(x), int(y)) for x, y in shapely.get_coordinates(part.exterior)[:-1])
