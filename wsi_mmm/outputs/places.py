"""The parts of a slide that are counted apart: the slide itself, each region of interest, all regions of a class.

An object is in a region when the centroid of its outline is (see `outputs.inside`), an area as far as it lies there, a
tile when it shares area with it. Regions may overlap: then what lies in several counts in each, and once per class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import shapely

from wsi_mmm.outputs.inside import Regions
from wsi_mmm.types import I64

PlaceLevel = Literal["slide", "region", "class"]

MOST_REGIONS = 10_000
"""Regions that are counted one by one; of files with more, classes alone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a slide. ``geometry``: level-0 px, None for the whole slide; ``number``: of a region, from 1, as its
    file has them; ``name``: its own; ``class_name``: that of its annotation."""

    level: PlaceLevel
    geometry: Any = None
    number: int | None = None
    name: str | None = None
    class_name: str | None = None


def places_of(regions: Regions | None) -> list[Place]:
    """The slide, or what of it the regions hold, then the regions in file order, then classes by name."""
    if regions is None:
        return [Place("slide")]
    shapes = list(regions.shapes)
    found = [Place("slide", regions.area)]
    if len(shapes) <= MOST_REGIONS:
        found += [Place("region", one.geometry, n, one.name, one.class_name) for n, one in enumerate(shapes, 1)]
    else:
        _log.warning("%d regions are too many to be counted one by one; their classes are", len(shapes))
    for name in sorted({one.class_name for one in shapes if one.class_name is not None}):
        union = shapely.union_all([one.geometry for one in shapes if one.class_name == name])
        found.append(Place("class", union, class_name=name))
    return found


def place_finder(places: Sequence[Place]) -> Callable[[Any], tuple[I64, I64]]:
    """A function that gives, for n shapely geometries, the pairs (geometry, place) that share a point; everything is in
    the first place, the slide."""
    areas = np.array([place.geometry for place in places[1:]], object)
    tree = shapely.STRtree(areas)
    shapely.prepare(areas)

    def find(geometries: Any) -> tuple[I64, I64]:
        everything = np.arange(len(geometries), dtype=np.int64)
        if not len(areas) or not len(geometries):
            return everything, np.zeros(len(geometries), np.int64)
        asked, number = tree.query(geometries)
        held = shapely.intersects(areas[number], geometries[asked])
        inside = asked[held].astype(np.int64), number[held].astype(np.int64) + 1
        return np.concatenate([everything, inside[0]]), np.concatenate([everything * 0, inside[1]])

    return find
