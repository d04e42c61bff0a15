"""The contents of an annotation file: polygons and points in level-0 px, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon

from wsi_mmm.annotations.repair import repair_polygons, thin_outlines
from wsi_mmm.errors import AnnotationError
from wsi_mmm.types import F64, I64

MAX_COORDINATE = 1 << 31
"""Level-0 px beyond which no object lies: slides have at most 2^24 on a side."""

_PREPARED = 64  # vertices from which a polygon is prepared before points are looked for in it


@dataclass(frozen=True, slots=True)
class Shape:
    """A valid polygon with area, in level-0 px, the name of its class (None when it has none), the numbers that
    were asked for by name, NaN where the object has no such number, and its own name, if it has one."""

    geometry: Polygon | MultiPolygon
    class_name: str | None = None
    values: tuple[float, ...] = ()
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Dot:
    """A point at level-0 px (x, y); the rest as of a `Shape`."""

    x: float
    y: float
    class_name: str | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Shapes:
    """The contents of a file: its polygons in file order, the number of objects (and of parts of collections) that were
    no polygon (``skipped``), of polygons that had to be repaired, and the points among the objects that were none."""

    items: tuple[Shape, ...]
    skipped: int = 0
    repaired: int = 0
    dots: tuple[Dot, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Shape]:
        return iter(self.items)

    def describe_skipped(self) -> str:
        """Return a clause about the objects that are no polygon; empty when all are."""
        return f"{self.skipped} objects in it are no polygon (points, lines, no area)" if self.skipped else ""


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object as it stands in a file: its polygon (None: it has none), its points (x, y), and what it says.
    ``unused``: parts of it, beside a polygon, that are none."""

    polygon: Any
    dots: tuple[tuple[float, float], ...] = ()
    class_name: str | None = None
    values: tuple[float, ...] = ()
    unused: int = 0
    name: str | None = None


def collect_shapes(found: Sequence[FoundObject], name: str) -> Shapes:
    """Valid polygons, points, and what had to be left out. Raises AnnotationError with the file's ``name``."""
    polygons = np.array([one.polygon for one in found], object)
    _check_extent(polygons, found, name)
    polygons = thin_outlines(polygons, name)
    made, mended = repair_polygons(polygons, name)
    items, dots, skipped, repaired = [], [], 0, 0
    for one, polygon, changed in zip(found, made.tolist(), mended.tolist(), strict=True):
        dots += [Dot(x, y, one.class_name, one.values) for x, y in one.dots]
        skipped += one.unused + (polygon is None)
        if polygon is not None:
            repaired += changed
            items.append(Shape(polygon, one.class_name, one.values, one.name))
    return Shapes(tuple(items), skipped, repaired, tuple(dots))


def _check_extent(polygons: Any, found: Sequence[FoundObject], name: str) -> None:
    """AnnotationError for what lies where no slide is: drawing it would take memory without bound."""
    reach = np.abs(shapely.bounds(polygons)).max(axis=1, initial=0.0)  # NaN for what is no polygon
    far = np.flatnonzero(reach > MAX_COORDINATE).tolist()
    far += [n for n, one in enumerate(found) if one.dots and np.abs(one.dots).max() > MAX_COORDINATE]
    if far:
        raise AnnotationError(f"{name}: object {min(far)} lies beyond {MAX_COORDINATE} px: correct or remove it")


@dataclass(frozen=True, slots=True)
class SlideShapes:
    """The shapes and points of which some part lies on a slide, and the ``areas`` float64[n] level-0 px² that the
    shapes have there. ``off``: objects that lie wholly off the slide; ``partly``: shapes of which a part does."""

    shapes: Shapes
    areas: F64
    off: int
    partly: int

    def describe_off(self) -> str:
        """Return a clause about the objects that are not, or not wholly, on the slide; empty when all are."""
        parts = [f"{self.off} objects in it lie off the slide"] if self.off else []
        parts += [f"{self.partly} reach beyond it"] if self.partly else []
        return ", ".join(parts)


def clip_to_slide(shapes: Shapes, width: float, height: float) -> SlideShapes:
    """Return what lies on a slide of ``width`` x ``height`` level-0 px; shapes that reach beyond it stay whole."""
    geometries = np.array([item.geometry for item in shapes], object)
    x0, y0, x1, y1 = shapely.bounds(geometries).reshape(-1, 4).T
    areas = shapely.area(geometries)
    beyond = np.flatnonzero((x0 < 0) | (y0 < 0) | (x1 > width) | (y1 > height))
    cut = shapely.intersection(geometries[beyond], shapely.box(0, 0, width, height))
    areas[beyond] = shapely.area(cut)
    kept = areas > 0
    dots = tuple(dot for dot in shapes.dots if 0 <= dot.x <= width and 0 <= dot.y <= height)
    items = tuple(item for item, keep in zip(shapes, kept.tolist(), strict=True) if keep)
    off = len(shapes) - len(items) + len(shapes.dots) - len(dots)
    outside = areas[beyond] < shapely.area(geometries[beyond])
    partly = int((outside & kept[beyond]).sum())
    return SlideShapes(replace(shapes, items=items, dots=dots), areas[kept], off, partly)


def shape_at(shapes: Shapes, points: F64) -> I64:
    """int64[n]: number of the first shape that holds each of ``points`` float64[n, 2] (x, y level-0 px); -1: none."""
    found = np.full(len(points), len(shapes), np.int64)
    geometries = np.array([item.geometry for item in shapes], object)
    asked, number = shapely.STRtree(geometries).query(shapely.points(points))
    shapely.prepare(geometries[shapely.get_num_coordinates(geometries) > _PREPARED])
    held = shapely.intersects_xy(geometries[number], *points[asked].T)
    np.minimum.at(found, asked[held], number[held])
    return np.where(found < len(shapes), found, -1)


def ring_arrays(geometries: Sequence[Any]) -> tuple[F64, I64, I64, F64]:
    """The closed rings of n polygons, by polygon: points float64[m, 2], where rings begin and end int64[r + 1], whose
    they are int64[r]; and the polygons' areas float64[n]."""
    whole = np.array(geometries, object)
    parts, owner = shapely.get_parts(whole, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    ends = np.cumsum(np.bincount(ring, minlength=len(rings)), dtype=np.int64)
    return xy, np.concatenate([np.zeros(1, np.int64), ends]), owner[part].astype(np.int64), shapely.area(whole)


def box_index(boxes: F64) -> Callable[[F64], tuple[I64, I64]]:
    """An index of boxes float64[n, 4] (x0, y0, x1, y1): asked with k boxes, it gives the pairs (numbers of the asked
    one, of the box) that touch, by asked one. Threads may share it."""
    tree = shapely.STRtree(shapely.linestrings(boxes.reshape(-1, 2, 2)))  # a diagonal has the extent of its box
    tree.query(shapely.box(0, 0, 1, 1))  # what is built with the first question is built by now

    def touching(asked: F64) -> tuple[I64, I64]:
        pairs = tree.query(shapely.box(*asked.T)).astype(np.int64)
        return pairs[0], pairs[1]

    return touching
