"""Where on a slide work was asked for: regions of interest, and the files that say where to look."""

from __future__ import annotations

import hashlib

from wsi_mmm.engine.units import SlideTask
from wsi_mmm.outputs.inside import Regions, regions_of
from wsi_mmm.storage import store
from wsi_mmm.tiles.grid import tile_boxes
from wsi_mmm.types import I64, Grid


def asked_regions(task: SlideTask) -> Regions | None:
    """The regions that work is restricted to, or None. AnnotationError, StorageError."""
    where = task.recipe.options.regions
    return regions_of(store.read_bytes(where), store.redact(where)) if where else None


def restricted(task: SlideTask, grid: Grid, index: I64) -> I64:
    """Those of the tiles ``index`` int64[n, 2] that touch the regions asked for; all of them where there are none."""
    regions = asked_regions(task)
    return index if regions is None else index[regions.touched(tile_boxes(grid, index))]


def region_hash(task: SlideTask) -> str:
    """Hash of the files that say where to look, empty when there is none: an edited mask is another question."""
    where = task.mask or task.recipe.options.tissue
    files = [] if where in ("auto", "none") else [where]
    files += [task.recipe.options.regions] if task.recipe.options.regions else []
    return "+".join(hashlib.sha256(store.read_bytes(file)).hexdigest()[:32] for file in files)
