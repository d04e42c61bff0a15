"""Publish a slide: from its parts and its cache to the files that people open, each written whole, slide.json last."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from wsi_mmm._version import __version__
from wsi_mmm.cache import ArraySpec, CacheEntry
from wsi_mmm.engine.plan import core_of, interpret_units
from wsi_mmm.engine.stages import workdir
from wsi_mmm.engine.stages.complete import Completion, outlined_tasks, summary_rows
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.stages.interpret import blended_core
from wsi_mmm.engine.stages.overlay import THUMBNAIL, Picture
from wsi_mmm.engine.stages.prepare import load_slide_plan, published_before, region_hash, regions_of_interest
from wsi_mmm.engine.stages.slide_vector import complete_slide, slide_facts, write_vector
from wsi_mmm.engine.units import SlidePlan, SlideSummary, SlideTask
from wsi_mmm.errors import PluginError
from wsi_mmm.model.identity import device_kind, precision_text
from wsi_mmm.model.recipe import EncoderRecipe
from wsi_mmm.outputs import merge, polygons
from wsi_mmm.outputs.exports import write_features, write_map
from wsi_mmm.outputs.geojson import GeoJSONWriter
from wsi_mmm.outputs.inside import Regions
from wsi_mmm.outputs.overlay import attention_png
from wsi_mmm.outputs.places import places_of
from wsi_mmm.outputs.tables import TILE_COLUMNS, tiles_table
from wsi_mmm.outputs.tally import SlideTally
from wsi_mmm.storage import store
from wsi_mmm.storage.store import published_file
from wsi_mmm.tasks.base import Quantised, Task
from wsi_mmm.tiles.grid import tile_boxes, tile_size_level0
from wsi_mmm.types import F32, I64, Mask, Objects, TaskInfo

Values = Mapping[str, npt.NDArray[np.generic]]
"""Columns of a table, as of ``Task.table``."""


@dataclass(frozen=True, slots=True)
class SlideAnswers:
    """``columns``: as for tiles (``<task>``, ``<task>:<class>``), each a class name, a number, or None where none can
    be said; None when no bag task was asked. ``attention``: bag task -> float32[n] share of each tile, adding up to 1,
    NaN for tiles that were left out."""

    columns: dict[str, str | float | None] | None = None
    attention: dict[str, F32] = field(default_factory=dict)


@dataclass(slots=True)
class Published:
    """The files and counts of a slide that is being published."""

    counts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    answers: SlideAnswers = field(default_factory=SlideAnswers)
    summary: list[dict[str, object]] = field(default_factory=list)
    repaired: int = 0
    dropped: int = 0


def publish(ctx: UnitContext) -> SlideSummary:
    """Write every file of a slide."""
    task, slide = ctx.task, ctx.slide
    gone = not store.exists(workdir.plan_uri(task))
    if gone and (summary := published_before(task, slide.info.fingerprint)) is not None:
        workdir.remove_scratch(task)  # an earlier try was cut short while it tidied up, the plan first
        return complete_slide(task, summary)
    plan = load_slide_plan(ctx)
    failed, tables, options = _failed_tiles(ctx, plan), _task_tables(ctx, plan), task.recipe.options
    done = Published(answers=answer_slide(ctx, plan, failed))
    if task.recipe.tasks:
        picture, regions = Picture(slide, plan), regions_of_interest(task)
        tally = SlideTally(places_of(regions), [task.info for task in ctx.tasks if task.scope != "bag"])
        _write_geojson(ctx, plan, tables, done, picture, tally, regions)
        done.summary = list(summary_rows(plan, tally, failed))
        if options.overlay:
            done.files["overlay"] = _write_file(task, "overlay.png", _draw_overlay(ctx, plan, picture, done, regions))
    table = _tiles_table(ctx, plan, tables, failed, done.answers)
    done.files["tiles"] = _write_file(task, "tiles.parquet", table)
    if options.features and len(plan.index):
        done.files["features"] = _write_features(ctx, plan)
        if task.recipe.slide is not None and not failed.all():
            done.files["slide"] = write_vector(task, failed)
    if options.save_maps:
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


def _write_file(task: SlideTask, name: str, data: bytes) -> str:
    store.write_bytes(store.join(task.output, name), data)
    return name


def _slide_json(plan: SlidePlan, done: Published, *, partial: bool) -> dict[str, object]:
    """slide.json: how this slide was processed and what was found; nothing of time or place, so reruns agree."""
    info, recipe, answers = plan.info, plan.slide.recipe, done.answers.columns
    return {
        "format": "wsi-mmm-slide/1", "wsi_mmm_version": __version__, "id": plan.slide.id,
        "uri": store.redact(plan.slide.uri), "status": "partial" if partial else "done" if len(plan.index) else "empty",
        "result_hash": plan.slide.result_hash(), "region": region_hash(plan.slide, plan.grid.listed),
        "recipe": recipe.published(), "fingerprint": info.fingerprint, "reader": info.reader,
        "vendor": info.vendor, "width": info.width, "height": info.height, "mpp_x": info.mpp_x, "mpp_y": info.mpp_y,
        "mpp_requested": plan.grid.mpp, "mpp_effective": plan.mpp_effective, "tiles": len(plan.index),
        "objects": done.counts, "classes": done.classes, "repaired": done.repaired, "dropped": done.dropped,
        "files": done.files, **({} if answers is None else {"answers": answers}),
        **({} if plan.slide.scene is None else {"scene": plan.slide.scene}),
        **({"summary": done.summary} if done.summary else {}),
        **({"slide": slide_facts(recipe)} if "slide" in done.files else {}),
    }  # fmt: skip


# ---------------------------------------------------------------- GeoJSON, overlay


def _write_geojson(
    ctx: UnitContext,
    plan: SlidePlan,
    tables: dict[str, Values],
    done: Published,
    picture: Picture,
    tally: SlideTally,
    area: Regions | None,
) -> None:
    options, info = ctx.recipe.options, plan.info
    tasks = [task for task in ctx.tasks if task.scope != "bag"]
    regions = {task.info.name: _merge_regions(task, plan) for task in tasks if task.info.dissolves}
    counts = {name: len(objects) for name, objects in regions.items()}
    # QuPath's cropped frame, when the recipe asks for it.
    shift = np.array([info.bounds_x, info.bounds_y] if options.bounds_offset else [0, 0], np.float64)
    done.files["geojson"] = "result.geojson.gz" if options.gzip else "result.geojson"
    with (
        published_file(store.join(ctx.task.output, done.files["geojson"])) as path,
        GeoJSONWriter(path, info.fingerprint, [t.info for t in tasks], options.gzip, counts=counts) as writer,
    ):
        outlined = outlined_tasks(tasks) if options.measure != "none" else frozenset[str]()
        complete = Completion(tally, shift, outlined, (info.mpp_x or 0.0, info.mpp_y or 0.0)).complete
        for task in tasks:
            name, before = task.info.name, writer.written
            for portion in _task_objects(task, plan, tables, regions):
                # Map px at the far edges reach beyond the slide by up to one of them.
                objects = _within_area(task, polygons.clip(portion, info.width, info.height), area, done)
                picture.add(task.info, objects)
                writer.write(replace(objects, coords=objects.coords - shift) if shift.any() else objects, complete)
            if task.scope == "pixel":
                done.counts[name] = writer.written - before
            if _names_classes(task, tables.get(name)):
                done.classes[name] = tally.count_classes(name)
    done.repaired, done.dropped = done.repaired + writer.repaired, done.dropped + writer.dropped


def _within_area(task: Task, objects: Objects, area: Regions | None, done: Published) -> Objects:
    """The part of ``objects`` that lies in the regions of interest; tiles were chosen by them already."""
    if area is None or task.scope == "tile":
        return objects
    if task.info.dissolves:
        return area.cut(objects)
    kept = area.single(objects)
    done.repaired, done.dropped = done.repaired + kept.repaired, done.dropped + kept.dropped
    return kept.objects


def _draw_overlay(ctx: UnitContext, plan: SlidePlan, picture: Picture, done: Published, area: Regions | None) -> bytes:
    tasks = {task.info.name: task for task in ctx.tasks}

    def find(info: TaskInfo, box: tuple[float, float, float, float]) -> Objects:
        return _within_area(tasks[info.name], _objects_near(info.name, plan, box), area, Published())

    return picture.png([task.info for task in ctx.tasks], done.classes, find)


def _objects_near(task: str, plan: SlidePlan, box: tuple[float, float, float, float]) -> Objects:
    """Objects of a task whose owning pixel lies in, or near, a level-0 rectangle, from the parts it meets."""
    grid, near = plan.grid, plan.halo
    x0, x1 = box[0] / grid.scale_x - near, box[2] / grid.scale_x + near
    y0, y1 = box[1] / grid.scale_y - near, box[3] / grid.scale_y + near
    parts = []
    for unit in interpret_units(plan):
        core = core_of(grid, plan.slide.recipe.block_tiles, unit.block, plan.stride)
        if core.x0 < x1 and core.x1 > x0 and core.y0 < y1 and core.y1 > y0:
            part = workdir.load_part(plan.slide, task, unit.block)
            y, x = part.anchor[:, 0], part.anchor[:, 1]
            parts.append(polygons.take(part, (x >= x0) & (x < x1) & (y >= y0) & (y < y1)))
    return polygons.concat(parts) if parts else polygons.empty(task)


def _task_objects(
    task: Task, plan: SlidePlan, tables: dict[str, Values], regions: dict[str, Objects]
) -> Iterator[Objects]:
    """The objects of one task in their published order, in portions of bounded size: instances come row of blocks by
    row of blocks, each sorted by the owning pixel, so that the order does not depend on the blocks."""
    name = task.info.name
    if task.info.dissolves:
        yield regions[name]
    elif task.scope == "pixel":
        for _, units in itertools.groupby(interpret_units(plan), lambda unit: unit.block[0]):
            parts = [workdir.load_part(plan.slide, name, unit.block) for unit in units]
            yield polygons.sort_by_anchor(polygons.concat(parts))
    elif len(plan.index):
        yield _tile_rectangles(task, plan, tables[name])


def _merge_regions(task: Task, plan: SlidePlan) -> Objects:
    """Regions cut by block borders made whole, scaled to level-0 px."""
    grid, parts = plan.grid, [workdir.load_part(plan.slide, task.info.name, u.block) for u in interpret_units(plan)]
    if not parts:
        return polygons.empty(task.info.name)
    merged = polygons.scaled(merge.merge_regions(parts), grid.scale_x, grid.scale_y)
    return polygons.simplify(merged, grid.scale_x * task.stride)


def _names_classes(task: Task, values: Values | None) -> bool:
    """True if there are classes to count; a task that gives numbers per tile has none."""
    if task.info.kind in ("regress", "survive"):
        return False
    return values is None or any(np.issubdtype(column.dtype, np.integer) for column in values.values())


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


# ---------------------------------------------------------------- tables, features, maps


def _task_tables(ctx: UnitContext, plan: SlidePlan) -> dict[str, Values]:
    """Per tile task: its columns (``Task.table``), one row per tile of ``plan.index``."""
    tables: dict[str, Values] = {}
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
    columns: object = task.table(values)
    if not isinstance(columns, Mapping):
        raise PluginError(f"task '{name}': table of the kind '{task.info.kind}' gave {type(columns).__name__}, no dict")
    for column, numbers in columns.items():
        fault = ""
        if column in TILE_COLUMNS and not column == name == "tissue":  # a task may be the better answer to that
            fault = f"a column '{column}', a name that is taken"
        elif not isinstance(numbers, np.ndarray) or numbers.shape != (n,):
            fault = f"'{column}' as something else than an array of one number per tile (here {n})"
        elif np.issubdtype(numbers.dtype, np.integer) and (column != name or numbers.max() >= len(task.info.classes)):
            fault = f"integers as '{column}': numbers are float32, classes are indices in the column '{name}'"
        if fault:
            raise PluginError(f"task '{name}': table of the kind '{task.info.kind}' gave {fault}")
    return columns


def _failed_tiles(ctx: UnitContext, plan: SlidePlan) -> Mask:
    """The tiles with pixels that could not be read: bool[n]."""
    bad = set()
    for row, column in np.unique(plan.index // plan.slide.recipe.block_tiles, axis=0).tolist():
        marks = ctx.cache.block_record(workdir.block_name((row, column))) or {}
        bad |= {(x, y) for x, y, _, _ in marks.get("failed", ())}
    return np.array([(x, y) in bad for x, y in plan.corners().tolist()], bool)


def _tiles_table(
    ctx: UnitContext, plan: SlidePlan, tables: dict[str, Values], failed: Mask, answers: SlideAnswers
) -> bytes:
    columns = {name: column for values in tables.values() for name, column in values.items()}
    columns |= {f"{name}:attention": shares for name, shares in answers.attention.items()}
    index = plan.index
    if plan.places is not None:  # listed tiles have a row of their list, and no column
        index = np.stack([np.arange(len(index)), np.zeros(len(index), np.int64)], axis=1)
    return tiles_table(
        index=index, xy=plan.corners(), size=tile_size_level0(plan.grid), failed=failed,
        tissue=plan.tissue, columns=columns,
        classes={t.info.name: t.info.classes for t in ctx.tasks},
    )  # fmt: skip


def _write_features(ctx: UnitContext, plan: SlidePlan) -> str:
    """``features`` float32[n, D] and ``coords`` int64[n, 2], with the attributes that TRIDENT and CLAM know, and
    ``level0_mpp_x``, ``level0_mpp_y``: the micrometres of a level-0 px, which turn ``coords`` into lengths."""
    recipe, info, grid = plan.slide.recipe, plan.info, plan.grid
    vectors = gather_features(ctx.cache, plan.index, recipe.block_tiles)
    width, _ = tile_size_level0(grid)
    native = info.objective or (10.0 / info.mpp_x if info.mpp_x else 0.0)
    attributes = {
        "patch_size": recipe.tile, "patch_size_level0": width, "level0_magnification": round(native),
        "target_magnification": round(10.0 / grid.mpp, 2), "overlap": grid.overlap, "level0_width": info.width,
        "level0_height": info.height, "mpp": grid.mpp, "encoder": recipe.model, "model_hash": recipe.model_hash,
        "name": plan.slide.id,
        **({"level0_mpp_x": info.mpp_x, "level0_mpp_y": info.mpp_y} if info.mpp_x and info.mpp_y else {}),
    }  # fmt: skip
    if plan.places is not None and plan.places[:, 2:].any():  # nominal, so that its ratio is that of the sizes
        attributes |= {"target_magnification": round(round(native) * recipe.tile / width, 2), "off_grid": 1}
    if recipe.network is not None:
        precision = precision_text(recipe.runtime_on(device_kind(recipe.options.device)))
        attributes |= _encoder_attributes(recipe.network, recipe.tile, grid.mpp) | {"precision": precision}
    write_features(store.join(plan.slide.output, "features.zarr"), vectors, plan.corners(), attributes)
    return "features.zarr"


def _encoder_attributes(network: EncoderRecipe, tile: int, mpp: float) -> dict[str, int | float | str]:
    """What the network of a bare encoder saw of a tile, and how its vectors were made."""
    seen = network.input_px or tile
    return {
        "input_px": seen, "input_mpp": round(mpp * tile / seen, 6), "pooling": network.pooling,
        "licence": network.licence, "network": json.dumps(network.model_dump(mode="json"), sort_keys=True),
    }  # fmt: skip


def _write_maps(ctx: UnitContext, plan: SlidePlan) -> str:
    """Blended maps of the pixel tasks: the values that the objects were made of."""
    units = interpret_units(plan)
    for task in ctx.tasks:
        if task.scope == "pixel":
            cores = (blended_core(ctx, task, unit) for unit in units)
            uri = store.join(plan.slide.output, "maps", f"{task.info.name}.zarr")
            write_map(uri, task.info, task.channels, task.stride, plan.grid, cores)
    return "maps"


# ---------------------------------------------------------------- bags


def answer_slide(ctx: UnitContext, plan: SlidePlan, failed: Mask) -> SlideAnswers:
    """The answers of bag tasks for a slide: the features of its tiles go through the model's aggregator once.

    Tiles in ``failed`` bool[n] are left out: they are white. Holds the features of the slide's tiles, 4 D bytes each.
    """
    tasks = [task for task in ctx.tasks if task.scope == "bag"]
    names = [task.info.name for task in tasks]
    if not tasks:
        return SlideAnswers()
    attention = {name: np.full(len(plan.index), np.nan, np.float32) for name in names}
    columns: dict[str, str | float | None] = {}
    if not failed.all():
        vectors = gather_features(ctx.cache, plan.index[~failed], plan.slide.recipe.block_tiles)
        values, shares = ctx.runner.answer_bag(vectors, names)
        for task in tasks:
            columns |= json_row(task.table(values[task.info.name][None]), task.info.classes)
            attention[task.info.name][~failed] = shares[task.info.name]
    return SlideAnswers(columns, attention)


def gather_features(entry: CacheEntry, index: I64, block: int) -> F32:
    """Features float32[n, D] of tiles ``index`` int64[n, 2] (row, column), in their order, each shard read once."""
    spec = ArraySpec("features", entry.existing("features").shape[2:], "float32")
    found = np.empty((len(index), *spec.item), np.float32)
    blocks, which = np.unique(index // block, axis=0, return_inverse=True)
    for number in range(len(blocks)):
        mine = np.flatnonzero(which.ravel() == number)
        low, high = index[mine].min(axis=0), index[mine].max(axis=0) + 1
        dense = entry.read(spec, slice(low[0], high[0]), slice(low[1], high[1]))
        found[mine] = dense[index[mine, 0] - low[0], index[mine, 1] - low[1]]
    return found


def json_row(columns: Values, classes: Sequence[str]) -> dict[str, str | float | None]:
    """One row of ``Task.table`` as class names and numbers that JSON has; float32 by its shortest digits."""
    row: dict[str, str | float | None] = {}
    for name, values in columns.items():
        number = float(str(values[0]))
        if np.issubdtype(values.dtype, np.integer):
            row[name] = classes[int(number)] if number >= 0 else None
        else:
            row[name] = number if math.isfinite(number) else None
    return row
