"""Objects on their way into the GeoJSON: measured as they are published, and counted for the summary of the slide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from wsi_mmm.engine.units import SlidePlan
from wsi_mmm.outputs.measure import measure_shapes
from wsi_mmm.outputs.tally import SlideTally, round_number
from wsi_mmm.tasks.base import Task
from wsi_mmm.tiles.grid import tile_boxes
from wsi_mmm.types import F64, REGION_KINDS, Mask, Objects

_NO_OUTLINES = (*REGION_KINDS, "detect")


@dataclass(frozen=True, slots=True)
class Completion:
    """Sees the objects as they are published, ``shift`` float64[2] px from the full frame.

    ``outlined``: names of the tasks whose objects are measured; ``mpp``: µm per level-0 px (x, y).
    """

    tally: SlideTally
    shift: F64
    outlined: frozenset[str]
    mpp: tuple[float, float]

    def complete(self, objects: Objects) -> Objects:
        """Count the objects, and return them with their measurements."""
        self.tally.add(replace(objects, coords=objects.coords + self.shift) if self.shift.any() else objects)
        if objects.task not in self.outlined:
            return objects
        return replace(objects, measurements={**objects.measurements, **measure_shapes(objects, *self.mpp)})


def outlined_tasks(tasks: Iterable[Task]) -> frozenset[str]:
    """The tasks that draw single objects along their outlines: no regions, tiles or boxes."""
    return frozenset(one.info.name for one in tasks if one.scope == "pixel" and one.info.kind not in _NO_OUTLINES)


def summary_rows(plan: SlidePlan, tally: SlideTally, failed: Mask) -> Iterator[dict[str, object]]:
    """Per place of the slide: areas, tiles, and what was published there of each task and class."""
    mpp_x, mpp_y = plan.info.mpp_x or 0.0, plan.info.mpp_y or 0.0
    px_mm2, whole = mpp_x * mpp_y / 1e6, float(plan.info.width * plan.info.height)
    tiles = tally.count_tiles(tile_boxes(plan.grid, plan.index), failed)
    numbers = tally.numbers(px_mm2)
    for place, (read, bad), tissue, tasks in zip(tally.places, tiles, plan.tissue_px2.tolist(), numbers, strict=True):
        area = whole if place.geometry is None else place.geometry.area
        yield {
            "level": place.level, "region": place.number, "name": place.name, "class": place.class_name,
            "area_mm2": round_number(area * px_mm2), "tissue_area_mm2": round_number(tissue * px_mm2), "tiles": read,
            "failed_tiles": bad, "tasks": tasks,
        }  # fmt: skip
