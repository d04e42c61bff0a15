"""Regions of interest: the tiles that touch them, and the objects that lie in them.

The rule for objects: a single object counts as inside when the centroid of its outline, as it is published, lies in a
region or on its border (as QuPath counts detections inside an annotation); it is kept whole. Areas are cut along the
regions. Regions that overlap count as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely

from wsi_mmm.annotations import Shapes, check_crossings, parse_shapes
from wsi_mmm.errors import AnnotationError
from wsi_mmm.outputs.polygons import CHUNK, Geometries, Rounded, chunks, concat, from_parts, round_valid, shapes, take
from wsi_mmm.types import F64, Mask, Objects

_EDGE = 1e-6  # px: less is no area that is shared


@dataclass(frozen=True, slots=True)
class Regions:
    """The regions of interest of a slide as one prepared shapely geometry of level-0 px, and the ``shapes`` that it is
    made of."""

    area: Any
    shapes: Shapes = Shapes(())  # noqa: RUF009  (frozen)

    def touched(self, boxes: F64) -> Mask:
        """bool[n]: the rectangles float64[n, 4] (x0, y0, x1, y1) that share area with a region; an edge is none.

        Rectangles are made smaller by a millionth of a px: `shapely.touches` would visit every vertex for each of them.
        """
        found = np.zeros(len(boxes), np.bool_)
        for start in range(0, len(boxes), CHUNK):
            some = shrunken_boxes(boxes[start : start + CHUNK])
            found[start : start + CHUNK] = shapely.intersects(self.area, some)
        return found

    def single(self, objects: Objects) -> Rounded:
        """The objects whose centroid lies in a region, made safe first: that is the outline which is published."""
        kept, repaired, dropped = [], 0, 0
        for safe in map(round_valid, chunks(objects)):
            x, y = shapely.get_coordinates(shapely.centroid(shapes(safe.objects))).T
            kept.append(take(safe.objects, shapely.intersects_xy(self.area, x, y)))
            repaired, dropped = repaired + safe.repaired, dropped + safe.dropped
        return Rounded(concat(kept), repaired, dropped)

    def cut(self, objects: Objects) -> Objects:
        """Areas cut along the regions, in their order; one cut in several keeps them all."""
        return concat([
            from_parts(some, shapely.intersection(shapely.make_valid(shapes(some)), self.area))
            for some in chunks(objects)
        ])  # fmt: skip


def shrunken_boxes(boxes: F64) -> Geometries:
    """Rectangles float64[n, 4] (x0, y0, x1, y1) as geometries that touch what shares area with them."""
    x0, y0, x1, y1 = boxes.T
    made: Geometries = shapely.box(x0 + _EDGE, y0 + _EDGE, x1 - _EDGE, y1 - _EDGE)
    return made


def regions_of(data: bytes, name: str) -> Regions:
    """The regions in the bytes of an annotation file of polygons in level-0 px. Raises AnnotationError."""
    found = parse_shapes(data, name)
    if not len(found):
        beside = f" ({found.describe_skipped()})" if found.skipped else ""
        raise AnnotationError(f"{name}: no polygon is in it{beside}: draw the regions to work in, or omit --regions")
    check_crossings([shape.geometry for shape in found], name)
    area = shapely.union_all([shape.geometry for shape in found])
    shapely.prepare(area)
    return Regions(area, found)
