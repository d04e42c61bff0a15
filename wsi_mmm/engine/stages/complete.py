"""Objects on their way into the GeoJSON: counted as they are published, for the summary of the slide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from wsi_mmm.engine.units import SlidePlan
from wsi_mmm.outputs.tally import SlideTally, round_number
from wsi_mmm.tiles.grid import tile_boxes
from wsi_mmm.types import F64, Mask, Objects


@dataclass(frozen=True, slots=True)
class Completion:
    """Sees the objects as they are published, ``shift`` float64[2] px from the full frame."""

    tally: SlideTally
    shift: F64

    def complete(self, objects: Objects) -> Objects:
        """Count the objects."""
        self.tally.add(replace(objects, coords=objects.coords + self.shift) if self.shift.any() else objects)
        return objects


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
