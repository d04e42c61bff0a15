"""Plan a slide: open it, find its tissue, choose its tiles; or find that an earlier run has published it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from wsi_mmm.annotations import MAX_AREA_BYTES, read_annotation_file
from wsi_mmm.engine.monitoring.slide_rows import ROW
from wsi_mmm.engine.stages import workdir
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.stages.slide_vector import complete_slide
from wsi_mmm.engine.units import SlidePlan, SlideSummary, SlideTask
from wsi_mmm.errors import AnnotationError, InputError, ManifestError, OutputError
from wsi_mmm.model.identity import device_kind
from wsi_mmm.options import GIVE_MPP, TISSUE_WORDS
from wsi_mmm.outputs.inside import Regions, regions_of
from wsi_mmm.outputs.places import places_of
from wsi_mmm.slides.base import Slide
from wsi_mmm.storage import store
from wsi_mmm.tiles.area import tissue_area, tissue_areas_within, tissue_of_tiles
from wsi_mmm.tiles.grid import make_grid, tile_boxes
from wsi_mmm.tiles.listed import PlacedTiles, place_tiles
from wsi_mmm.tiles.tile_file import read_tile_list
from wsi_mmm.tiles.tissue import TissueMask, off_slide, select_tiles, tissue_mask, tissue_share, warn_unused
from wsi_mmm.types import F32, F64, I64, Grid, SlideInfo


def prepare(ctx: UnitContext) -> tuple[SlidePlan | None, SlideSummary | None]:
    """The plan of a slide, written to its work folder; or the summary of what an earlier run has published."""
    task, recipe = ctx.task, ctx.recipe
    if task.error:
        raise ManifestError(task.error)
    workdir.remove_half_written(task)
    if recipe.options.force and not recipe.after_others:
        workdir.remove_scratch(task)
    slide = ctx.slide
    task = replace(task, reader=slide.info.reader)
    done = None if recipe.options.force else published_before(task, slide.info.fingerprint)
    if done is not None:
        if not store.exists(workdir.plan_uri(task)):
            workdir.remove_scratch(task)  # left behind when a run ended while it tidied up
        done = complete_slide(task, done)
        kept = workdir.read_json(store.join(task.output, ROW))
        return None, replace(done, cost=kept if kept and kept.get("result_hash") == task.result_hash() else None)
    slide.scale(recipe.mpp, GIVE_MPP)  # explains what to do when the slide has no mpp
    if task.tiles is not None:
        plan = _plan_listed(ctx, task)
        workdir.save_plan(plan)
        return plan, None
    grid = make_grid(slide.info, recipe.mpp, tile=recipe.tile, overlap=recipe.overlap)
    mask = tissue_mask(slide, task.mask or recipe.options.tissue)
    index = select_tiles(grid, mask, min_tissue=recipe.options.min_tissue)
    if (regions := regions_of_interest(task)) is not None:
        chosen = index[regions.touched(tile_boxes(grid, index))]
        if len(index) and not len(chosen):
            name = store.redact(recipe.options.regions or "")
            if not regions.touched(np.array([[0.0, 0.0, slide.info.width, slide.info.height]])).any():
                raise AnnotationError(off_slide(name, regions.area.bounds, slide.info))
            raise AnnotationError(f"{name}: no tissue lies in its regions; draw them on tissue, or add --tissue none")
        warn_unused(regions.shapes, store.redact(recipe.options.regions or ""), slide.info)
        index = chosen
    areas = _tissue_areas(tissue_of_tiles(grid, mask, index), regions, slide.info)
    plan = replace(_make_plan(ctx, task, index, tissue_share(grid, mask, index)), tissue_px2=areas)
    workdir.save_plan(plan)
    return plan, None


def _tissue_areas(tissue: TissueMask, regions: Regions | None, info: SlideInfo) -> F64:
    """Level-0 px² of tissue in each of a slide's places."""
    if regions is None:
        return np.array([tissue_area(tissue, info)])
    return tissue_areas_within(tissue, [place.geometry for place in places_of(regions)], info)


def load_slide_plan(ctx: UnitContext) -> SlidePlan:
    """The plan that this slide's parts were made by, from its work folder."""
    arrays = workdir.load_arrays(workdir.plan_uri(ctx.task))
    grid = workdir.listed_grid(arrays)
    plan = _make_plan(ctx, ctx.task, arrays["index"], arrays["tissue"], grid, arrays.get("places"))
    return replace(plan, tissue_px2=arrays["tissue_px2"])


def _plan_listed(ctx: UnitContext, task: SlideTask) -> SlidePlan:
    """The plan of a slide whose tiles a file lists; nothing says how much of them is tissue."""
    placed = place_listed(task, ctx.slide.info)
    return _make_plan(
        ctx, task, placed.index, np.full(len(placed.index), np.nan, np.float32), placed.grid, placed.places
    )


def place_listed(task: SlideTask, info: SlideInfo) -> PlacedTiles:
    """The tiles that the file of a slide lists, laid out on it. Raises InputError naming the file, StorageError."""
    recipe, options, name = task.recipe, task.recipe.options, store.redact(task.tiles or "")
    try:
        placed = place_tiles(
            info, read_tile_list(task.tiles or ""), recipe.block_tiles,
            size=options.tile_size, mpp=options.mpp, overlap=options.overlap,
        )  # fmt: skip
        if placed.grid.tile != recipe.tile:
            raise InputError(
                f"it lists tiles of {placed.grid.tile} px and others of this run {recipe.tile} px: embed them apart"
            )
    except InputError as error:
        raise InputError(str(error) if name in str(error) else f"{name}: {error}") from error
    return placed


def _make_plan(
    ctx: UnitContext, task: SlideTask, index: I64, share: F32, grid: Grid | None = None, places: I64 | None = None
) -> SlidePlan:
    recipe, info = ctx.recipe, ctx.slide.info
    grid = grid or make_grid(info, recipe.mpp, tile=recipe.tile, overlap=recipe.overlap)
    tasks = [t for t in ctx.tasks if t.scope == "pixel"]
    return SlidePlan(
        task, info, grid, index, share, entry_uri(task, info.fingerprint, grid),
        halo=max([t.halo for t in tasks], default=0),
        stride=int(np.lcm.reduce([t.stride for t in tasks] or [1])),
        mpp_effective=grid.scale_x * (info.mpp_x or 0.0),
        maps=bool(tasks),
        places=places,
    )  # fmt: skip


def entry_uri(task: SlideTask, fingerprint: str, grid: Grid) -> str:
    """The URI of the cache entry that holds the values of a slide, whose reader is known."""
    recipe = task.recipe
    root = recipe.options.cache or store.join(task.scratch, "cache")
    kind, scale = device_kind(recipe.options.device), (grid.scale_x, grid.scale_y)
    name = recipe.forward_hash(kind, scale, task.reader, grid.listed)
    return store.join(root, fingerprint, name)


def published_before(task: SlideTask, fingerprint: str) -> SlideSummary | None:
    """The summary of an earlier run of the same recipe, when that is complete.

    Raises OutputError when the folder holds the results of another slide: two slides of one name, run apart.
    """
    found = workdir.read_json(store.join(task.output, "slide.json"))
    if not found:
        return None
    if found.get("fingerprint") != fingerprint:
        other = f"{store.redact(task.output)} holds the results of another slide ({found.get('uri')})"
        raise OutputError(f"{other}; choose another --output, or replace them with the option force")
    same = (found.get("result_hash"), found.get("region")) == (task.result_hash(), region_hash(task))
    return SlideSummary.from_json(found) if same and found.get("status") in ("done", "empty") else None


def regions_of_interest(task: SlideTask) -> Regions | None:
    """The regions that a run is restricted to, or None. Raises AnnotationError, OptionError, StorageError."""
    where = task.recipe.options.regions
    return regions_of(read_annotation_file(where, MAX_AREA_BYTES), store.redact(where)) if where else None


def check_areas(task: SlideTask, slide: Slide) -> None:
    """Read the files that restrict a run to a part of the slide, for their errors; no pixel of the slide is read."""
    where = task.mask or task.recipe.options.tissue
    if where not in TISSUE_WORDS:
        tissue_mask(slide, where)
    regions, size = regions_of_interest(task), (slide.info.width, slide.info.height)
    if regions is not None and not regions.touched(np.array([[0.0, 0.0, *size]])).any():
        name = store.redact(task.recipe.options.regions or "")
        raise AnnotationError(off_slide(name, regions.area.bounds, slide.info))


def region_hash(task: SlideTask, listed: str = "") -> str:
    """Hash of the files that restrict a run to a part of the slide, or list its tiles; empty when there is none.

    ``listed``: the digest of the list, where it is known.
    """
    where = task.mask or task.recipe.options.tissue
    files = [] if where in TISSUE_WORDS else [where]
    files += [task.recipe.options.regions] if task.recipe.options.regions else []
    hashes = [hashlib.sha256(store.read_bytes(file)).hexdigest()[:32] for file in files]
    return "+".join(hashes if task.tiles is None else [*hashes, listed or read_tile_list(task.tiles).digest()])
