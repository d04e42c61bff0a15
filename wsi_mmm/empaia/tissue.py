"""The tissue of a slide as polygons of the platform."""

from __future__ import annotations

import numpy as np

from wsi_mmm.empaia.bodies import Polygon, Wsi
from wsi_mmm.empaia.geometry import Area, polygons
from wsi_mmm.outputs.polygons import Frame, simplify, to_objects, trace
from wsi_mmm.tiles.tissue import TissueMask
from wsi_mmm.types import Objects


def tissue_polygons(mask: TissueMask, wsi: Wsi, area: Area | None) -> list[Polygon]:
    """The outlines of ``mask``, cut along their holes and, if one is given, to ``area``; in the order of the slide."""
    rings = trace(mask.mask.astype(np.int32))
    count = len(rings.labels)
    frame = Frame(scale_x=mask.scale_x, scale_y=mask.scale_y)
    anchor = np.column_stack([np.arange(count), np.zeros(count, np.int64)])
    drawn = to_objects(rings, frame, task="tissue", class_index=np.zeros(count, np.int32), anchor=anchor)
    found = simplify(drawn, max(mask.scale_x, mask.scale_y) / 2)
    parts = [
        polygon for i in range(count) for polygon in polygons(_object_rings(found, i), wsi, keep_holes=True, area=area)
    ]  # fmt: skip
    return sorted(parts, key=lambda polygon: min((y, x) for x, y in polygon.corners))


def _object_rings(objects: Objects, number: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    first, last = objects.object_offsets[number : number + 2]
    offsets = objects.ring_offsets
    return [objects.coords[offsets[ring] : offsets[ring + 1]] for ring in range(first, last)]
