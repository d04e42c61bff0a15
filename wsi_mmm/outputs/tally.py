"""Counts of what was published, per place, task and class: the numbers of ``summary`` in slide.json and of summary.csv.

They are taken from the very objects that go into the GeoJSON, after their outlines were made valid and rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import shapely

from wsi_mmm.outputs.inside import shrunken_boxes
from wsi_mmm.outputs.places import Place, place_finder
from wsi_mmm.outputs.polygons import chunks, ring_areas, shapes
from wsi_mmm.types import F64, I64, Mask, Objects, TaskInfo

UNNAMED = ""
"""The class, in the counts, of objects that have none."""

_PAIRS = 10_000_000  # of objects and places that are looked at together, at most: bounds memory, not the result

ClassNumbers = dict[str, dict[str, float]]
"""Class -> what is counted (``count``, ``area_mm2``, ``tiles``, ``mean``) -> number."""


@dataclass(slots=True)
class _TaskTally:
    """``counts`` int64[places, classes + 1], the last for objects without a class; ``areas`` in level-0 px², alike;
    ``sums`` of a number that tiles have and of how many have it: name -> float64[places, 2]."""

    info: TaskInfo
    counts: I64
    areas: F64
    sums: dict[str, F64] = field(default_factory=dict)


class SlideTally:
    """Counts the published objects of a slide."""

    def __init__(self, places: Sequence[Place], infos: Sequence[TaskInfo]) -> None:
        self.places = list(places)
        self._find = place_finder(self.places)
        shape = [(len(self.places), len(info.classes) + 1) for info in infos]
        self._tasks = {
            info.name: _TaskTally(info, np.zeros(size, np.int64), np.zeros(size))
            for info, size in zip(infos, shape, strict=True)
        }

    def add(self, objects: Objects) -> None:
        """Count published objects, coordinates in level-0 px of the full frame."""
        tally = self._tasks[objects.task]
        for some in chunks(objects, max(1, _PAIRS // len(self.places))):
            if not len(some):
                continue
            if tally.info.draws_tiles:
                self._add_tiles(tally, some)
            elif tally.info.dissolves:
                self._add_areas(tally, some)
            else:
                points = shapely.centroid(shapes(some)) if len(self.places) > 1 else some.class_index
                one, place = self._find(points)  # without regions, whatever there is one of for each object
                np.add.at(tally.counts, (place, some.class_index[one]), 1)

    def _add_areas(self, tally: _TaskTally, some: Objects) -> None:
        areas = shapes(some)
        one, place = self._find(areas)
        sizes = np.add.reduceat(ring_areas(some), some.object_offsets[:-1])[one]
        where = np.flatnonzero(place > 0)
        regions = np.array([self.places[n].geometry for n in place[where]], object)
        sizes[where] = shapely.area(shapely.intersection(areas[one[where]], regions))
        kept = sizes > 0
        index = place[kept], some.class_index[one[kept]]
        np.add.at(tally.counts, index, 1)
        np.add.at(tally.areas, index, sizes[kept])

    def _add_tiles(self, tally: _TaskTally, some: Objects) -> None:
        info, (one, place) = tally.info, self._find(shrunken_boxes(shapely.bounds(shapes(some))))
        if info.kind == "multilabel":  # a tile has each label of at least a half
            for number, label in enumerate(info.classes):
                has = some.measurements[label][one] >= 0.5
                np.add.at(tally.counts[:, number], place[has], 1)
        elif info.kind in ("regress", "survive"):
            for name, values in some.measurements.items():
                known = np.isfinite(values[one])
                sums = tally.sums.setdefault(name, np.zeros((len(self.places), 2)))
                np.add.at(sums[:, 0], place[known], values[one[known]])
                np.add.at(sums[:, 1], place[known], 1.0)
        else:
            np.add.at(tally.counts, (place, some.class_index[one]), 1)

    def count_tiles(self, boxes: F64, failed: Mask) -> list[tuple[int, int]]:
        """Per place: the tiles that share area with it, of rectangles float64[n, 4] in level-0 px, and the ``failed``
        ones of them."""
        found = np.zeros((len(self.places), 2), np.int64)
        step = max(1, _PAIRS // len(self.places))
        for start in range(0, len(boxes), step):
            one, place = self._find(shrunken_boxes(boxes[start : start + step]))
            np.add.at(found[:, 0], place, 1)
            np.add.at(found[:, 1], place, failed[start + one])
        return [(read, bad) for read, bad in found.tolist()]

    def count_classes(self, task: str) -> dict[str, int]:
        """Objects or tiles of each class of a task on the slide."""
        tally = self._tasks[task]
        return dict(zip(tally.info.classes, tally.counts[0, :-1].tolist(), strict=True))

    def numbers(self, px_mm2: float) -> Iterator[dict[str, ClassNumbers]]:
        """Per place: task -> class -> numbers; ``px_mm2``: mm² of a level-0 px."""
        for place in range(len(self.places)):
            yield {name: _class_numbers(tally, place, px_mm2) for name, tally in self._tasks.items()}


def _class_numbers(tally: _TaskTally, place: int, px_mm2: float) -> ClassNumbers:
    info, counts = tally.info, tally.counts[place].tolist()
    if info.kind in ("regress", "survive") and info.draws_tiles:
        means = {name: sums[place, 0] / sums[place, 1] for name, sums in tally.sums.items() if sums[place, 1]}
        return {(UNNAMED if name == info.name else name): {"mean": round_number(one)} for name, one in means.items()}
    named = [*info.classes, *([UNNAMED] if counts[-1] else [])]
    what = "tiles" if info.draws_tiles else "count"
    found: ClassNumbers = {name: {what: count} for name, count in zip(named, counts, strict=False)}
    if info.dissolves:
        for name, area in zip(named, tally.areas[place].tolist(), strict=False):
            found[name]["area_mm2"] = round_number(area * px_mm2)
    return found


def round_number(value: Any) -> float:
    """A number to nine significant digits: what is below depends on the sequence of additions."""
    number = float(value)
    return float(f"{number:.9g}") if math.isfinite(number) else 0.0
