"""Publish a slide: from its parts and its cache to the files that people open, each written whole, slide.json last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from wsi_mmm._version import __version__
from wsi_mmm.cache import ArraySpec
from wsi_mmm.engine.plan import core_of, interpret_units
from wsi_mmm.engine.stages import slide_level, workdir
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.stages.interpret import blended_core
from wsi_mmm.engine.stages.overlay import THUMBNAIL, Picture
from wsi_mmm.engine.stages.prepare import load_slide_plan, published_before, region_hash, regions_of_interest
from wsi_mmm.engine.units import SlidePlan, SlideSummary, SlideTask
from wsi_mmm.errors import PluginError
from wsi_mmm.outputs import merge, polygons, ragged
from wsi_mmm.outputs.attention import attention_png
from wsi_mmm.outputs.exports import write_features
from wsi_mmm.outputs.geojson import GeoJSONWriter
from wsi_mmm.outputs.inside import Regions
from wsi_mmm.outputs.maps import write_map
from wsi_mmm.outputs.tables import TILE_COLUMNS, tiles_table
from wsi_mmm.storage import store
from wsi_mmm.storage.folders import published_file
from wsi_mmm.tasks.base import Quantised, Task
from wsi_mmm.tiles.grid import tile_boxes, tile_size_level0, tile_xy
from wsi_mmm.types import I64, Mask, Objects, TaskInfo

Values = Mapping[str, np.ndarray[Any, Any]]


@dataclass(slots=True)
class Published:
    """The files and counts of a slide that is being published."""

    counts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    answers: slide_level.SlideAnswers = field(default_factory=slide_level.SlideAnswers)
    repaired: int = 0
    dropped: int = 0


def publish(ctx: UnitContext) -> SlideSummary:
    """Write every file of a slide."""
    task, slide = ctx.task, ctx.slide
    gone = not store.exists(workdir.plan_uri(task))
    if gone and (summary := published_before(task, slide.info.fingerprint)) is not None:
        workdir.remove_scratch(task)  # an earlier try was cut short while it tidied up, the plan first
        return summary
    plan = load_slide_plan(ctx)
    done, failed = Published(), _failed_tiles(ctx, plan)
    tables = _task_tables(ctx, plan)
    done.answers = slide_level.answer_slide(ctx, plan, failed)
    picture = Picture(slide, plan)
    if task.recipe.tasks:
        regions = regions_of_interest(task)
        _write_geojson(ctx, plan, tables, done, picture, regions)
        if task.recipe.options.overlay:
            done.files["overlay"] = _write_file(task, "overlay.png", _draw_overlay(ctx, plan, picture, done, regions))
    table = _tiles_table(ctx, plan, tables, failed, done.answers)
    done.files["tiles"] = _write_file(task, "tiles.parquet", table)
    if task.recipe.options.features and len(plan.index):
        done.files["features"] = _write_features(ctx, plan)
    if task.recipe.options.save_maps:
        done.files["maps"] = _write_maps(ctx, plan)
        for name, shares in done.answers.attention.items():
            image = attention_png(slide.thumbnail(THUMBNAIL), plan.grid, plan.index, shares)
            done.files[f"attention-{name}"] = _write_file(task, f"attention-{name}.png", image)
    workdir.check_kept(task)
    facts = _slide_json(plan, done, partial=bool(failed.any()))
    _write_file(task, "slide.json", json.dumps(facts, indent=1).encode())
    if not failed.any():
        workdir.remove_scratch(task)
    return SlideSummary.from_json(facts)


# ---------------------------------------------------------------- GeoJSON


def _write_geojson(
    ctx: UnitContext,
    plan: SlidePlan,
    tables: dict[str, Values],
    done: Published,
    picture: Picture,
    interest: Regions | None,
) -> None:
    task = plan.slide
    found = [t for t in ctx.tasks if t.scope != "bag"]
    name = "result.geojson.gz" if task.recipe.options.gzip else "result.geojson"
    regions = {t.info.name: _merge_regions(t, plan) for t in found if t.info.dissolves}
    counts = {name: len(objects) for name, objects in regions.items()}
    with published_file(store.join(task.output, name)) as path:
        with GeoJSONWriter(
            path, plan.info.fingerprint, [t.info for t in found], task.recipe.options.gzip, counts=counts
        ) as writer:
            for t in found:
                before = writer.written
                classes = np.zeros(len(t.info.classes), np.int64)
                for found_objects in _task_objects(t, plan, tables, regions):
                    # Map px at the far edges reach beyond the slide by up to one of them.
                    clipped = polygons.clip(found_objects, plan.info.width, plan.info.height)
                    objects = _within_interest(t, clipped, interest, done)
                    classes += np.bincount(objects.class_index[objects.class_index >= 0], minlength=len(classes))
                    picture.add(t.info, objects)
                    writer.write(_shift_to_bounds(objects, plan))
                if t.scope == "pixel":
                    done.counts[t.info.name] = writer.written - before
                if t.info.kind == "multilabel" and len(plan.index):  # a tile may have several
                    classes = _count_labels(t, tables[t.info.name])
                if _names_classes(t, tables.get(t.info.name)):
                    done.classes[t.info.name] = dict(zip(t.info.classes, classes.tolist(), strict=True))
        done.repaired, done.dropped = done.repaired + writer.repaired, done.dropped + writer.dropped
    done.files["geojson"] = name


def _within_interest(task: Task, objects: Objects, regions: Regions | None, done: Published) -> Objects:
    """The part of ``objects`` that lies in the regions of interest; tiles were chosen by them already."""
    if regions is None or task.scope == "tile":
        return objects
    if task.info.dissolves:
        return regions.cut(objects)
    kept = regions.single(objects)
    done.repaired, done.dropped = done.repaired + kept.repaired, done.dropped + kept.dropped
    return kept.objects


def _draw_overlay(
    ctx: UnitContext, plan: SlidePlan, picture: Picture, done: Published, regions: Regions | None
) -> bytes:
    found = {t.info.name: t for t in ctx.tasks}

    def find(info: TaskInfo, box: tuple[float, float, float, float]) -> Objects:
        task = found[info.name]
        return _within_interest(task, _objects_near(task, plan, box), regions, Published())

    return picture.png([t.info for t in found.values()], done.classes, find)


def _objects_near(task: Task, plan: SlidePlan, box: tuple[float, float, float, float]) -> Objects:
    """Objects of a task whose owning pixel lies in, or near, a level-0 rectangle, from the parts it meets."""
    grid, near = plan.grid, plan.halo
    x0, x1 = box[0] / grid.scale_x - near, box[2] / grid.scale_x + near
    y0, y1 = box[1] / grid.scale_y - near, box[3] / grid.scale_y + near
    parts = []
    for unit in interpret_units(plan):
        core = core_of(grid, plan.slide.recipe.block_tiles, unit.block, plan.stride)
        if core.x0 < x1 and core.x1 > x0 and core.y0 < y1 and core.y1 > y0:
            part = workdir.load_part(plan.slide, task.info.name, unit.block)
            y, x = part.anchor[:, 0], part.anchor[:, 1]
            parts.append(ragged.take(part, (x >= x0) & (x < x1) & (y >= y0) & (y < y1)))
    return ragged.concat(parts) if parts else ragged.empty(task.info.name)


def _task_objects(
    task: Task, plan: SlidePlan, tables: dict[str, Values], regions: dict[str, Objects]
) -> Iterator[Objects]:
    """The objects of one task in their published order, in portions of bounded size."""
    if task.info.dissolves:
        yield regions[task.info.name]
    elif task.scope == "pixel":
        yield from _sorted_instances(task, plan)
    elif len(plan.index):
        yield _tile_rectangles(task, plan, tables[task.info.name])


def _sorted_instances(task: Task, plan: SlidePlan) -> Iterator[Objects]:
    """Row of blocks by row of blocks, each sorted by (y, x) of the owning pixel: the order does not know the blocks."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for unit in interpret_units(plan):
        rows.setdefault(unit.block[0], []).append(unit.block)
    for blocks in rows.values():
        objects = ragged.concat([workdir.load_part(plan.slide, task.info.name, block) for block in blocks])
        by_position = np.lexsort((objects.anchor[:, 1], objects.anchor[:, 0]))
        yield ragged.take(objects, by_position)


def _merge_regions(task: Task, plan: SlidePlan) -> Objects:
    """Regions cut by block borders made whole, scaled to level-0 px."""
    parts = [workdir.load_part(plan.slide, task.info.name, unit.block) for unit in interpret_units(plan)]
    if not parts:
        return ragged.empty(task.info.name)
    merged = merge.merge_regions(parts)
    scaled = replace(merged, coords=merged.coords * np.array([plan.grid.scale_x, plan.grid.scale_y]))
    return polygons.simplify(scaled, plan.grid.scale_x * task.stride)


def _names_classes(task: Task, values: Values | None) -> bool:
    """True if there are classes to count; a task that gives numbers per tile has none."""
    if task.info.kind in ("regress", "survive"):
        return False
    return values is None or any(np.issubdtype(column.dtype, np.integer) for column in values.values())


def _count_labels(task: Task, values: Values) -> I64:
    """Tiles that have each label: a probability of at least a half."""
    return np.array([np.count_nonzero(values[f"{task.info.name}:{c}"] >= 0.5) for c in task.info.classes], np.int64)


def _tile_rectangles(task: Task, plan: SlidePlan, values: Values) -> Objects:
    """One rectangle per tile, cut at the slide's edge, with the numbers of the task as measurements.

    Its class is the one that the task names (-1: none), or that of a task which has only one.
    """
    count = len(plan.index)
    boxes = tile_boxes(plan.grid, plan.index)
    boxes[:, 2] = np.minimum(boxes[:, 2], plan.info.width)
    boxes[:, 3] = np.minimum(boxes[:, 3], plan.info.height)
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    numbers = {name: column for name, column in values.items() if not np.issubdtype(column.dtype, np.integer)}
    measured = {name.removeprefix(f"{task.info.name}:"): x.astype(np.float64) for name, x in numbers.items()}
    named = next((column for name, column in values.items() if name not in numbers), None)
    only = np.full(count, 0 if len(task.info.classes) == 1 else -1)
    return Objects(
        task.info.name, corners, np.arange(0, 4 * count + 1, 4), np.arange(count + 1),
        (only if named is None else named).astype(np.int32), plan.index * plan.grid.stride, measured,
    )  # fmt: skip


def _shift_to_bounds(objects: Objects, plan: SlidePlan) -> Objects:
    """Shifted into QuPath's cropped frame when the recipe asks for it."""
    info = plan.info
    if not plan.slide.recipe.options.bounds_offset or not (info.bounds_x or info.bounds_y):
        return objects
    return replace(objects, coords=objects.coords - np.array([info.bounds_x, info.bounds_y], np.float64))


# ---------------------------------------------------------------- tables, features, maps


def _task_tables(ctx: UnitContext, plan: SlidePlan) -> dict[str, Values]:
    """Per tile task: its columns (``Task.table``), one row per tile of ``plan.index``."""
    tables = {}
    for task in ctx.tasks:
        if task.scope == "tile" and len(plan.index):
            name = f"tables/{task.info.name}"
            kept = ctx.cache.existing(name)
            dense = ctx.cache.read(ArraySpec(name, kept.shape[2:], str(kept.dtype)), slice(None), slice(None))
            tables[task.info.name] = _checked_columns(task, dense[plan.index[:, 0], plan.index[:, 1]])
    return tables


def _checked_columns(task: Task, values: Quantised) -> Values:
    """The columns of a task. PluginError for what cannot be written: the task may be a plug-in's."""
    name, n = task.info.name, len(values)
    columns: Any = task.table(values)
    if not isinstance(columns, Mapping):
        raise PluginError(f"task '{name}': table of the kind '{task.info.kind}' gave {type(columns).__name__}, no dict")
    for column, numbers in columns.items():
        fault = ""
        if column in TILE_COLUMNS:
            fault = f"a column '{column}', a name that is taken"
        elif not isinstance(numbers, np.ndarray) or numbers.shape != (n,):
            fault = f"'{column}' as something else than an array of one number per tile (here {n})"
        elif np.issubdtype(numbers.dtype, np.integer) and (column != name or numbers.max() >= len(task.info.classes)):
            fault = f"integers as '{column}': numbers are float32, classes are indices in the column '{name}'"
        if fault:
            raise PluginError(f"task '{name}': table of the kind '{task.info.kind}' gave {fault}")
    found: Values = columns
    return found


def _failed_tiles(ctx: UnitContext, plan: SlidePlan) -> Mask:
    """The tiles with pixels that could not be read: bool[n]."""
    bad = set()
    for row, column in np.unique(plan.index // plan.slide.recipe.block_tiles, axis=0).tolist():
        marks = ctx.cache.block_record(workdir.block_name((row, column))) or {}
        bad |= {(x, y) for x, y, _, _ in marks.get("failed", ())}
    return np.array([(x, y) in bad for x, y in tile_xy(plan.grid, plan.index).tolist()], bool)


def _tiles_table(
    ctx: UnitContext, plan: SlidePlan, tables: dict[str, Values], failed: Mask, answers: slide_level.SlideAnswers
) -> bytes:
    columns = {name: column for values in tables.values() for name, column in values.items()}
    columns |= {f"{name}:attention": shares for name, shares in answers.attention.items()}
    return tiles_table(
        index=plan.index, xy=tile_xy(plan.grid, plan.index), size=tile_size_level0(plan.grid), failed=failed,
        tissue=plan.tissue, columns=columns,
        classes={t.info.name: t.info.classes for t in ctx.tasks},
    )  # fmt: skip


def _write_features(ctx: UnitContext, plan: SlidePlan) -> str:
    """``features`` float32[n, D] and ``coords`` int64[n, 2], with the attributes that TRIDENT and CLAM know."""
    recipe, info = plan.slide.recipe, plan.info
    vectors = slide_level.gather_features(ctx.cache, plan.index, recipe.block_tiles)
    width, _ = tile_size_level0(plan.grid)
    native = info.objective or (10.0 / info.mpp_x if info.mpp_x else 0.0)
    attributes = {
        "patch_size": recipe.tile, "patch_size_level0": width, "level0_magnification": round(native),
        "target_magnification": round(10.0 / recipe.mpp, 2), "overlap": recipe.overlap, "level0_width": info.width,
        "level0_height": info.height, "mpp": recipe.mpp, "encoder": recipe.model, "model_hash": recipe.model_hash,
        "name": plan.slide.id,
    }  # fmt: skip
    write_features(store.join(plan.slide.output, "features.zarr"), vectors, tile_xy(plan.grid, plan.index), attributes)
    return "features.zarr"


def _write_maps(ctx: UnitContext, plan: SlidePlan) -> str:
    """Blended maps of the pixel tasks: the values that the objects were made of."""
    units = interpret_units(plan)
    for task in ctx.tasks:
        if task.scope == "pixel":
            cores = (blended_core(task, unit, ctx.cache) for unit in units)
            write_map(store.join(plan.slide.output, "maps", f"{task.info.name}.zarr"), task, plan.grid, cores)
    return "maps"


# ---------------------------------------------------------------- files


def _slide_json(plan: SlidePlan, done: Published, *, partial: bool) -> dict[str, object]:
    """slide.json: how this slide was processed and what was found; nothing of time or place, so reruns agree."""
    info, recipe, answers = plan.info, plan.slide.recipe, done.answers.columns
    return {
        "format": "wsi-mmm-slide/1", "wsi_mmm_version": __version__, "id": plan.slide.id,
        "uri": store.redact(plan.slide.uri), "status": "partial" if partial else "done" if len(plan.index) else "empty",
        "result_hash": plan.slide.result_hash(), "region": region_hash(plan.slide), "recipe": recipe.published(),
        "fingerprint": info.fingerprint, "reader": info.reader,
        "vendor": info.vendor, "width": info.width, "height": info.height, "mpp_x": info.mpp_x, "mpp_y": info.mpp_y,
        "mpp_requested": recipe.mpp, "mpp_effective": plan.mpp_effective, "tiles": len(plan.index),
        "objects": done.counts, "classes": done.classes, "repaired": done.repaired, "dropped": done.dropped,
        "files": done.files, **({} if answers is None else {"answers": answers}),
    }  # fmt: skip


def _write_file(task: SlideTask, name: str, data: bytes) -> str:
    store.write_bytes(store.join(task.output, name), data)
    return name
