"""Publish: from the parts and the cache of a slide to the files a person opens. Everything whole, slide.json last."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from wsi_mmm._version import __version__
from wsi_mmm.cache import ArraySpec, Entry
from wsi_mmm.engine.plan import SlidePlan, core_of, interpret_units
from wsi_mmm.engine.stages import context, slide_level, steps, workdir
from wsi_mmm.engine.stages.overlay import THUMBNAIL, Picture
from wsi_mmm.engine.stages.regions import asked_regions, region_hash
from wsi_mmm.engine.units import SlideTask, UnitResult, WorkUnit
from wsi_mmm.outputs import merge, polygons, ragged
from wsi_mmm.outputs.attention import attention_png
from wsi_mmm.outputs.exports import write_features
from wsi_mmm.outputs.geojson import GeoJSONWriter
from wsi_mmm.outputs.inside import Regions
from wsi_mmm.outputs.maps import write_map
from wsi_mmm.outputs.tables import tiles_table
from wsi_mmm.storage import store
from wsi_mmm.storage.folders import published_file
from wsi_mmm.tasks.base import Task
from wsi_mmm.tiles.grid import tile_boxes, tile_size_level0, tile_xy
from wsi_mmm.types import I64, Objects, TaskInfo

Values = Mapping[str, np.ndarray[Any, Any]]


@dataclass(slots=True)
class Published:
    """What publishing a slide has come to so far."""

    counts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    answers: slide_level.SlideAnswers = field(default_factory=slide_level.SlideAnswers)
    repaired: int = 0
    dropped: int = 0


def publish(unit: WorkUnit) -> UnitResult:
    """Write every file of a slide; the receipt carries its slide.json."""
    started = time.perf_counter()
    task = unit.slide
    with context.slide_of(task) as slide:
        if again := _published(task, slide.info.fingerprint):
            return again
        plan = steps.replan(task, slide)
        done, failed = Published(), _failed(plan, unit)
        tables = _tables(plan, unit)
        done.answers = slide_level.answers(plan, _entry(plan, unit), failed)
        picture = Picture(slide, plan)
        if task.recipe.tasks:
            regions = asked_regions(task)
            _geojson(plan, tables, done, picture, regions)
            if task.recipe.options.overlay:
                done.files["overlay"] = _write(task, "overlay.png", _overlay(plan, picture, done, regions))
        done.files["tiles"] = _write(task, "tiles.parquet", _tiles(plan, tables, failed, done.answers))
        if task.recipe.options.features and len(plan.index):
            done.files["features"] = _features(plan, unit)
        if task.recipe.options.save_maps:
            done.files["maps"] = _maps(plan, unit)
            for name, shares in done.answers.attention.items():
                drawn = attention_png(slide.thumbnail(THUMBNAIL), plan.grid, plan.index, shares)
                done.files[f"attention-{name}"] = _write(task, f"attention-{name}.png", drawn)
        steps.check_kept(task)
        facts = _facts(plan, done, partial=bool(failed.any()))
        _write(task, "slide.json", json.dumps(facts, indent=1).encode())
        if not failed.any():
            steps.remove_scratch(task)
        seconds = {"publish": time.perf_counter() - started}
        return UnitResult(
            "publish", task.id, (0, 0), "ok", objects=sum(done.counts.values()), pid=os.getpid(),
            bytes_read=slide.reader.stats().bytes_read, peak_rss_mb=context.peak_rss_mb(), stages=seconds,
            payload=facts,
        )  # fmt: skip


def _published(task: SlideTask, fingerprint: str) -> UnitResult | None:
    """What a try before this one had published when it was cut short while tidying up: the plan goes first there."""
    if store.exists(workdir.plan_uri(task)):
        return None
    facts = steps.published(task, fingerprint, region_hash(task))
    if facts is None:
        return None
    steps.remove_scratch(task)
    objects = sum(facts["objects"].values())
    return UnitResult("publish", task.id, (0, 0), "ok", objects=objects, pid=os.getpid(), payload=facts)


# ---------------------------------------------------------------- GeoJSON


def _geojson(
    plan: SlidePlan, tables: dict[str, Values], done: Published, picture: Picture, asked: Regions | None
) -> None:
    task = plan.slide
    found = [t for t in context.tasks_of(task.recipe) if t.scope != "bag"]
    name = "result.geojson.gz" if task.recipe.options.gzip else "result.geojson"
    regions = {t.info.name: _regions(t, plan) for t in found if t.info.dissolves}
    counts = {name: len(objects) for name, objects in regions.items()}
    with published_file(store.join(task.output, name)) as path:
        with GeoJSONWriter(
            path, plan.info.fingerprint, [t.info for t in found], task.recipe.options.gzip, counts=counts
        ) as writer:
            for t in found:
                before = writer.written
                classes = np.zeros(len(t.info.classes), np.int64)
                for found_objects in _objects(t, plan, tables, regions):
                    # Map px at the far edges reach beyond the slide by up to one of them.
                    objects = _asked(t, polygons.clip(found_objects, plan.info.width, plan.info.height), asked, done)
                    classes += np.bincount(objects.class_index[objects.class_index >= 0], minlength=len(classes))
                    picture.add(t.info, objects)
                    writer.write(_placed(objects, plan))
                if t.scope == "pixel":
                    done.counts[t.info.name] = writer.written - before
                if t.info.kind == "multilabel" and len(plan.index):  # a tile may have several
                    classes = _holding(t, tables[t.info.name])
                if t.info.kind not in ("regress", "survive"):  # numbers have no classes to count
                    done.classes[t.info.name] = dict(zip(t.info.classes, classes.tolist(), strict=True))
        done.repaired, done.dropped = done.repaired + writer.repaired, done.dropped + writer.dropped
    done.files["geojson"] = name


def _asked(task: Task, objects: Objects, regions: Regions | None, done: Published) -> Objects:
    """What of ``objects`` lies in the regions that were asked for; tiles are those that touch them already."""
    if regions is None or task.scope == "tile":
        return objects
    if task.info.dissolves:
        return regions.cut(objects)
    kept = regions.single(objects)
    done.repaired, done.dropped = done.repaired + kept.repaired, done.dropped + kept.dropped
    return kept.objects


def _overlay(plan: SlidePlan, picture: Picture, done: Published, regions: Regions | None) -> bytes:
    found = {t.info.name: t for t in context.tasks_of(plan.slide.recipe)}

    def find(info: TaskInfo, box: tuple[float, float, float, float]) -> Objects:
        return _asked(found[info.name], _within(found[info.name], plan, box), regions, Published())

    return picture.png([t.info for t in found.values()], done.classes, find)


def _within(task: Task, plan: SlidePlan, box: tuple[float, float, float, float]) -> Objects:
    """Objects of a task whose owning pixel lies in, or near, a level-0 rectangle, from the parts it meets."""
    grid, near = plan.grid, plan.halo
    x0, x1 = box[0] / grid.scale_x - near, box[2] / grid.scale_x + near
    y0, y1 = box[1] / grid.scale_y - near, box[3] / grid.scale_y + near
    pieces = []
    for unit in interpret_units(plan):
        core = core_of(grid, plan.slide.recipe.block_tiles, unit.block, plan.stride)
        if core.x0 < x1 and core.x1 > x0 and core.y0 < y1 and core.y1 > y0:
            part = workdir.load_part(plan.slide, task.info.name, unit.block)
            y, x = part.anchor[:, 0], part.anchor[:, 1]
            pieces.append(ragged.take(part, (x >= x0) & (x < x1) & (y >= y0) & (y < y1)))
    return ragged.concat(pieces) if pieces else ragged.empty(task.info.name)


def _objects(task: Task, plan: SlidePlan, tables: dict[str, Values], regions: dict[str, Objects]) -> Iterator[Objects]:
    """The objects of one task in their published order, in pieces of bounded size."""
    if task.info.dissolves:
        yield regions[task.info.name]
    elif task.scope == "pixel":
        yield from _instances(task, plan)
    elif len(plan.index):
        yield _squares(task, plan, tables[task.info.name])


def _instances(task: Task, plan: SlidePlan) -> Iterator[Objects]:
    """Row of blocks by row of blocks, each sorted by (y, x) of the owning pixel: the order does not know the blocks."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for unit in interpret_units(plan):
        rows.setdefault(unit.block[0], []).append(unit.block)
    for blocks in rows.values():
        objects = ragged.concat([workdir.load_part(plan.slide, task.info.name, block) for block in blocks])
        order = np.lexsort((objects.anchor[:, 1], objects.anchor[:, 0]))
        yield ragged.take(objects, order)


def _regions(task: Task, plan: SlidePlan) -> Objects:
    """Regions cut by block borders made whole, scaled to level-0 px."""
    pieces = [workdir.load_part(plan.slide, task.info.name, unit.block) for unit in interpret_units(plan)]
    if not pieces:
        return ragged.empty(task.info.name)
    merged = merge.merge_regions(pieces)
    scaled = replace(merged, coords=merged.coords * np.array([plan.grid.scale_x, plan.grid.scale_y]))
    return polygons.simplify(scaled, plan.grid.scale_x * task.stride)


def _holding(task: Task, values: Values) -> I64:
    """Tiles of which each label holds: a probability of at least a half."""
    return np.array([np.count_nonzero(values[f"{task.info.name}:{c}"] >= 0.5) for c in task.info.classes], np.int64)


def _squares(task: Task, plan: SlidePlan, values: Values) -> Objects:
    """One rectangle per tile, cut at the slide's edge, with every number that the task says of it as a measurement.

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


def _placed(objects: Objects, plan: SlidePlan) -> Objects:
    """Shifted into QuPath's cropped frame when the recipe asks for it."""
    info = plan.info
    if not plan.slide.recipe.options.bounds_offset or not (info.bounds_x or info.bounds_y):
        return objects
    return replace(objects, coords=objects.coords - np.array([info.bounds_x, info.bounds_y], np.float64))


# ---------------------------------------------------------------- tables, features, maps


def _entry(plan: SlidePlan, unit: WorkUnit) -> Entry:
    return context.entry_of(unit.entry, plan.grid, plan.slide.recipe.block_tiles)


def _tables(plan: SlidePlan, unit: WorkUnit) -> dict[str, Values]:
    """Per tile task: its columns (``Task.table``), in the order of ``plan.index``."""
    tables = {}
    for task in context.tasks_of(plan.slide.recipe):
        if task.scope == "tile" and len(plan.index):
            entry, name = _entry(plan, unit), f"tables/{task.info.name}"
            kept = entry.existing(name)
            dense = entry.read(ArraySpec(name, kept.shape[2:], str(kept.dtype)), slice(None), slice(None))
            tables[task.info.name] = task.table(dense[plan.index[:, 0], plan.index[:, 1]])
    return tables


def _failed(plan: SlidePlan, unit: WorkUnit) -> Any:
    """Which tiles had pixels that could not be read: bool[n]."""
    entry, grid = _entry(plan, unit), plan.grid
    bad = set()
    for row, column in np.unique(plan.index // plan.slide.recipe.block_tiles, axis=0).tolist():
        result = entry.receipt(f"{row}-{column}") or {}
        bad |= {(x, y) for x, y, _, _ in result.get("failed", ())}
    xy = tile_xy(grid, plan.index).tolist()
    return np.array([(x, y) in bad for x, y in xy], bool)


def _tiles(plan: SlidePlan, tables: dict[str, Values], failed: Any, answers: slide_level.SlideAnswers) -> bytes:
    columns = {name: column for values in tables.values() for name, column in values.items()}
    columns |= {f"{name}:attention": shares for name, shares in answers.attention.items()}
    return tiles_table(
        index=plan.index, xy=tile_xy(plan.grid, plan.index), size=tile_size_level0(plan.grid), failed=failed,
        tissue=plan.tissue, columns=columns,
        classes={t.info.name: t.info.classes for t in context.tasks_of(plan.slide.recipe)},
    )  # fmt: skip


def _features(plan: SlidePlan, unit: WorkUnit) -> str:
    """``features`` float32[n, D] and ``coords`` int64[n, 2], with the attributes that TRIDENT and CLAM know."""
    entry, recipe, info = _entry(plan, unit), plan.slide.recipe, plan.info
    vectors = slide_level.gathered(entry, plan.index, recipe.block_tiles)
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


def _maps(plan: SlidePlan, unit: WorkUnit) -> str:
    """Blended maps of the pixel tasks, for whoever wants to look at what the objects were made of."""
    entry = _entry(plan, unit)
    units = interpret_units(plan)
    for task in context.tasks_of(plan.slide.recipe):
        if task.scope == "pixel":
            pieces = (steps.blended_core(task, w, entry) for w in units)
            write_map(store.join(plan.slide.output, "maps", f"{task.info.name}.zarr"), task, plan.grid, pieces)
    return "maps"


# ---------------------------------------------------------------- files


def _facts(plan: SlidePlan, done: Published, *, partial: bool) -> dict[str, Any]:
    """slide.json: what was done to this slide and what came of it; nothing of time or place, so reruns agree."""
    info, recipe, said = plan.info, plan.slide.recipe, done.answers.columns
    return {
        "format": "wsi-mmm-slide/1", "wsi_mmm_version": __version__, "id": plan.slide.id,
        "uri": store.redact(plan.slide.uri), "status": "partial" if partial else "done" if len(plan.index) else "empty",
        "result_hash": plan.slide.result_hash(), "region": region_hash(plan.slide), "recipe": recipe.published(),
        "fingerprint": info.fingerprint, "reader": info.reader,
        "vendor": info.vendor, "width": info.width, "height": info.height, "mpp_x": info.mpp_x, "mpp_y": info.mpp_y,
        "mpp_requested": recipe.mpp, "mpp_effective": plan.mpp_effective, "tiles": len(plan.index),
        "objects": done.counts, "classes": done.classes, "repaired": done.repaired, "dropped": done.dropped,
        "files": done.files, **({} if said is None else {"answers": said}),
    }  # fmt: skip


def _write(task: SlideTask, name: str, data: bytes) -> str:
    store.write_bytes(store.join(task.output, name), data)
    return name
