"""The steps of a slide: plan, forward (read, compute, write), interpret. Each is idempotent and may be repeated."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_mmm import timing
from wsi_mmm.cache import ArraySpec, Entry
from wsi_mmm.engine.monitoring.workers import count_here
from wsi_mmm.engine.plan import SlidePlan, Span, core_of, window_of
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import context, workdir
from wsi_mmm.engine.stages.regions import region_hash, restricted
from wsi_mmm.engine.units import Kind, SlideTask, UnitResult, WorkUnit
from wsi_mmm.errors import ManifestError, OutputError
from wsi_mmm.model.identity import device_kind
from wsi_mmm.outputs import polygons
from wsi_mmm.slides import Slide
from wsi_mmm.storage import store
from wsi_mmm.tasks.blend import blend, window_weights
from wsi_mmm.tiles.grid import BlockTiles, make_grid, tile_size_level0
from wsi_mmm.tiles.stream import read_block
from wsi_mmm.tiles.tissue import select_tiles, tissue_mask, tissue_share
from wsi_mmm.types import F32, I64, U8, Batch, Grid, Objects

if TYPE_CHECKING:
    from wsi_mmm.model.runner import RunOutput
    from wsi_mmm.tasks.base import Task


SIMPLIFY = 0.35  # target px an outline may move: a third of what the map resolves, and half the corners


def plan(unit: WorkUnit) -> UnitResult:
    """Open the slide, find its tissue, choose its tiles. The receipt carries the plan, or what is already published."""
    task = unit.slide
    if task.error:
        raise ManifestError(task.error)
    started = time.perf_counter()
    remove_halves(task)
    if task.recipe.options.force:
        remove_scratch(task)
    with context.slide_of(task) as slide:
        task = replace(task, reader=slide.info.reader)
        done = None if task.recipe.options.force else published(task, slide.info.fingerprint, region_hash(task))
        if done is not None:
            if not store.exists(workdir.plan_uri(task)):
                remove_scratch(task)  # what is left when a run ends while it tidies up
            return UnitResult("plan", task.id, (0, 0), "cached", payload=done)
        planned = _plan(task, slide)
        workdir.save_plan(planned)
        seconds = {"plan": time.perf_counter() - started}
        return _receipt(unit, slide, tiles=len(planned.index), stages=seconds, payload=planned)


def _plan(task: SlideTask, slide: Slide) -> SlidePlan:
    """The plan of a slide: its grid and the tiles that hold tissue."""
    recipe = task.recipe
    slide.scale(recipe.mpp)  # says what to do when the slide does not know its mpp
    grid = make_grid(slide.info, recipe.mpp, tile=recipe.tile, overlap=recipe.overlap)
    mask = tissue_mask(slide, task.mask or recipe.options.tissue)
    index = restricted(task, grid, select_tiles(grid, mask, min_tissue=recipe.options.min_tissue))
    return _assembled(task, slide, index, tissue_share(grid, mask, index))


def replan(task: SlideTask, slide: Slide) -> SlidePlan:
    """The plan that this slide's parts were made by, from what was written down."""
    return _assembled(task, slide, *workdir.load_plan(task))


def _assembled(task: SlideTask, slide: Slide, index: I64, share: F32) -> SlidePlan:
    recipe = task.recipe
    grid = make_grid(slide.info, recipe.mpp, tile=recipe.tile, overlap=recipe.overlap)
    tasks = [t for t in context.tasks_of(recipe) if t.scope == "pixel"]
    root = recipe.options.cache or store.join(task.scratch, "cache")
    name = recipe.forward_hash(device_kind(recipe.options.device), (grid.scale_x, grid.scale_y), task.reader)
    entry = store.join(root, slide.info.fingerprint, name)
    return SlidePlan(
        task, slide.info, grid, index, share, entry,
        halo=max([t.halo for t in tasks], default=0),
        stride=int(np.lcm.reduce([t.stride for t in tasks] or [1])),
        mpp_effective=grid.scale_x * (slide.info.mpp_x or 0.0),
        maps=bool(tasks),
    )  # fmt: skip


def published(task: SlideTask, fingerprint: str, region: str) -> dict[str, Any] | None:
    """The slide.json of an earlier run of the same recipe, when it is complete.

    Raises OutputError when the folder holds the results of another slide: two slides of one name, run apart.
    """
    found = workdir.read_json(store.join(task.output, "slide.json"))
    if found and found.get("fingerprint") != fingerprint:
        other = f"{store.redact(task.output)} holds the results of another slide ({found.get('uri')})"
        raise OutputError(f"{other}; choose another --output, or --force to replace them")
    same = found and (found.get("result_hash"), found.get("region")) == (task.result_hash(), region)
    return found if found and same and found.get("status") in ("done", "empty") else None


def remove_scratch(task: SlideTask) -> None:
    """Remove parts and maps of this slide that are not in a shared cache; the plan goes first (see ``check_kept``)."""
    scratch = store.join(task.output, ".work")
    context.forget_entries(scratch)
    for uri in sorted(store.list_uris(scratch), key=lambda uri: not uri.endswith(workdir.PLAN)):
        store.delete(uri)
    if store.is_local(scratch):
        shutil.rmtree(store.local_path(scratch), ignore_errors=True)  # the empty folders


_HALF = re.compile(r"\.(result\.geojson(\.gz)?|overlay\.png|attention-[\w-]+\.png|tiles\.parquet|slide\.json)\.\w+")


def remove_halves(task: SlideTask) -> None:
    """Remove the files that a run was writing beside their final names when it was killed."""
    if store.is_local(task.output):
        for path in Path(store.local_path(task.output)).glob(".*"):
            if _HALF.fullmatch(path.name):
                path.unlink(missing_ok=True)


def check_kept(task: SlideTask) -> None:
    """Raise OutputError when another run has removed this slide's scratch: what was read from it may be blank."""
    if not store.exists(workdir.plan_uri(task)):
        where = f"the files in work at {store.redact(task.output)} are gone"
        raise OutputError(f"{where}: does another run use the same output? run this again")


# ---------------------------------------------------------------- forward: read | compute | write


@dataclass(frozen=True, slots=True)
class Loaded:
    """A forward work with its pixels, or with the receipt of an earlier run."""

    unit: WorkUnit
    batch: Batch | None
    result: dict[str, Any] | None
    seconds: float
    laps: tuple[timing.Lap, ...] = ()


@dataclass(frozen=True, slots=True)
class Computed:
    """A forward work with the network's values."""

    loaded: Loaded
    output: RunOutput | None
    busy: tuple[float, float] | None
    device: str = ""
    encoder: str = ""


def read(unit: WorkUnit) -> Loaded:
    """Fetch and decode the tiles of a block, unless the cache already holds their values."""
    with timing.lap("decode", unit.name) as lap:
        loaded = _read(unit)
    return replace(loaded, laps=(lap.taken,))


def _read(unit: WorkUnit) -> Loaded:
    started = time.perf_counter()
    grid = _grid(unit)
    entry = context.entry_of(unit.entry, grid, unit.slide.recipe.block_tiles)
    result = None if unit.slide.recipe.options.force else entry.receipt(_block_name(unit))
    if result and result.get("tiles") == unit.tiles.hex() and not result.get("failed"):
        return Loaded(unit, None, result, time.perf_counter() - started)
    with context.slide_of(unit.slide) as slide:
        batch = _batch(unit, slide, grid)
    return Loaded(unit, batch, None, time.perf_counter() - started)


def _batch(unit: WorkUnit, slide: Slide, grid: Grid) -> Batch:
    block = BlockTiles(*unit.block, unit.index())
    return read_block(context.reader_of(slide, unit.slide, grid, block.index) or slide.reader, grid, block)


def compute(loaded: Loaded) -> Computed:
    """The network over the tiles of a block."""
    with timing.lap("model", loaded.unit.name) as lap:
        computed = _compute(loaded)
    return replace(computed, loaded=replace(computed.loaded, laps=(*loaded.laps, lap.taken)))


def _compute(loaded: Loaded) -> Computed:
    if loaded.batch is None:
        return Computed(loaded, None, None)
    recipe = loaded.unit.slide.recipe
    runner = context.runner_of(recipe)
    started = time.time()
    output = runner.run(loaded.batch.pixels, list(recipe.tasks))
    facts = json.dumps(runner.facts())
    return Computed(loaded, output, (started, time.time()), str(runner.device), facts)


def write(computed: Computed) -> UnitResult:
    """Put the block's shards, then its receipt."""
    with timing.lap("write", computed.loaded.unit.name) as lap:
        result = _write(computed)
    return replace(result, laps=(*computed.loaded.laps, lap.taken))


def _write(computed: Computed) -> UnitResult:
    loaded, unit = computed.loaded, computed.loaded.unit
    started = time.perf_counter()
    with context.slide_of(unit.slide) as slide:
        if loaded.batch is None or computed.output is None:
            return _receipt(unit, slide, status="cached", tiles=len(unit.index()), stages={"read": loaded.seconds})
        failed = _failed_tiles(loaded.batch, _grid(unit))
        entry = context.entry_of(unit.entry, _grid(unit), unit.slide.recipe.block_tiles)
        _put(entry, loaded.batch.index, computed.output, features=_keeps_features(unit.slide.recipe))
        entry.put_receipt(_block_name(unit), {"tiles": unit.tiles.hex(), "failed": failed})
        busy = computed.busy or (0.0, 0.0)
        stages = {"read": loaded.seconds, "model": busy[1] - busy[0], "write": time.perf_counter() - started}
        status = "partial" if failed else "ok"
        facts = {
            "tiles": len(unit.index()),
            "failed": failed,
            "busy": (busy,),
            "stages": stages,
            "device": computed.device,
            "payload": context.tile_cache_words(unit.slide),
            "encoder": computed.encoder,
        }
        return _receipt(unit, slide, status=status, **facts)


def forward(unit: WorkUnit) -> UnitResult:
    """Read, compute, write in one go: what a cluster worker does."""
    return write(compute(read(unit)))


def _put(entry: Entry, index: I64, output: RunOutput, *, features: bool) -> None:
    if features:
        entry.write_block(features_spec(output.features.shape[1]), index, output.features)
    for name, values in output.maps.items():
        entry.write_block(ArraySpec(f"maps/{name}", values.shape[1:], "uint8"), index, values)
    for name, values in output.tables.items():
        entry.write_block(ArraySpec(f"tables/{name}", values.shape[1:], str(values.dtype)), index, values)


def _keeps_features(recipe: Recipe) -> bool:
    """Whether they are published, or a bag task reads them."""
    return recipe.options.features or any(task.scope == "bag" for task in context.tasks_of(recipe))


def features_spec(size: int) -> ArraySpec:
    """The array of pooled vectors."""
    return ArraySpec("features", (size,), "float32")


def _failed_tiles(batch: Batch, grid: Grid) -> tuple[tuple[int, int, int, int], ...]:
    size = tile_size_level0(grid)
    return tuple((int(x), int(y), *size) for x, y in batch.xy[batch.failed])


# ---------------------------------------------------------------- interpret


def interpret(unit: WorkUnit) -> UnitResult:
    """Blend the maps round a block, say what is in its core, write one part per task."""
    started = time.perf_counter()
    grid, recipe = _grid(unit), unit.slide.recipe
    entry = context.entry_of(unit.entry, grid, recipe.block_tiles)
    objects = 0
    for task in context.tasks_of(recipe):
        if task.scope == "pixel":
            found = _interpret(task, unit, entry)
            check_kept(unit.slide)
            workdir.save_part(unit.slide, task.info.name, unit.block, found)
            objects += len(found)
    with context.slide_of(unit.slide) as slide:
        return _receipt(unit, slide, objects=objects, stages={"interpret": time.perf_counter() - started})


def _interpret(task: Task, unit: WorkUnit, entry: Entry) -> Objects:
    from wsi_mmm.tasks.base import View

    grid = _grid(unit)
    core, window = _spans(task, unit)
    # Regions stay in whole target px until those that seams cut are merged.
    scale_x, scale_y = (1.0, 1.0) if task.info.dissolves else (grid.scale_x, grid.scale_y)
    view = View(
        y0=window.y0, x0=window.x0, core=(core.y0, core.x0, core.y1, core.x1),
        scale_y=scale_y, scale_x=scale_x, height=grid.height, width=grid.width,
    )  # fmt: skip
    found = task.interpret(_blended(task, unit, entry, window), view)
    # Regions are simplified once they are whole; single objects here, where the work is spread and the model goes on.
    return found if task.info.dissolves else polygons.simplify(found, SIMPLIFY * grid.scale_x)


def blended_core(task: Task, unit: WorkUnit, entry: Entry) -> tuple[tuple[int, int], U8]:
    """The blended map of a block's core alone: its corner (y, x) in map px and uint8[C, h, w]."""
    core, window = _spans(task, unit)
    y0, x0 = -(-core.y0 // task.stride), -(-core.x0 // task.stride)
    y1, x1 = -(-core.y1 // task.stride), -(-core.x1 // task.stride)
    top, left = window.y0 // task.stride, window.x0 // task.stride
    return (y0, x0), _blended(task, unit, entry, window)[:, y0 - top : y1 - top, x0 - left : x1 - left]


def _spans(task: Task, unit: WorkUnit) -> tuple[Span, Span]:
    core = core_of(_grid(unit), unit.slide.recipe.block_tiles, unit.block, task.stride)
    return core, window_of(_grid(unit), core, task.halo, task.stride)


def _blended(task: Task, unit: WorkUnit, entry: Entry, window: Span) -> U8:
    shape = ((window.y1 - window.y0) // task.stride, (window.x1 - window.x0) // task.stride)
    tiles, corners = _tiles_in(task, unit, entry, window)
    weights = window_weights(_grid(unit).tile // task.stride, _grid(unit).overlap // task.stride)
    return blend(tiles, corners, shape=shape, weights=weights)


def _tiles_in(task: Task, unit: WorkUnit, entry: Entry, window: Span) -> tuple[U8, I64]:
    """Maps uint8[k, C, h, h] of the tiles that touch the window and their corners int64[k, 2] in window map px."""
    grid, index = _grid(unit), unit.index()
    y, x = index[:, 0] * grid.stride, index[:, 1] * grid.stride
    keep = (y < window.y1) & (y + grid.tile > window.y0) & (x < window.x1) & (x + grid.tile > window.x0)
    index = index[keep]
    side = grid.tile // task.stride
    if not len(index):
        return np.zeros((0, task.channels, side, side), np.uint8), np.zeros((0, 2), np.int64)
    low, high = index.min(axis=0), index.max(axis=0) + 1
    spec = ArraySpec(f"maps/{task.info.name}", (task.channels, side, side), "uint8")
    with timing.spent("fetch"):
        dense = entry.read(spec, slice(low[0], high[0]), slice(low[1], high[1]))
    corners = (index * grid.stride - np.array([window.y0, window.x0])) // task.stride
    return dense[index[:, 0] - low[0], index[:, 1] - low[1]], corners


# ---------------------------------------------------------------- shared


def perform(unit: WorkUnit) -> UnitResult:
    """Do a work of any kind."""
    result = forward(unit) if unit.kind == "forward" else _timed(unit)
    count_here(result)
    return result


def _timed(unit: WorkUnit) -> UnitResult:
    from wsi_mmm.engine.stages.extract import extract
    from wsi_mmm.engine.stages.publish import publish

    ways: dict[Kind, tuple[timing.Stage, Callable[[WorkUnit], UnitResult]]] = {
        "plan": ("prepare", plan), "extract": ("decode", extract), "interpret": ("interpret", interpret),
        "publish": ("write", publish),
    }  # fmt: skip
    stage, step = ways[unit.kind]
    with timing.lap(stage, unit.name) as lap:
        result = step(unit)
    return replace(result, laps=(lap.taken,), worker=timing.worker())


def _grid(unit: WorkUnit) -> Grid:
    assert unit.grid is not None
    return unit.grid


def _block_name(unit: WorkUnit) -> str:
    return f"{unit.block[0]}-{unit.block[1]}"


def _receipt(unit: WorkUnit, slide: Slide, **facts: Any) -> UnitResult:
    peak, worker = context.peak_rss_mb(), timing.worker()
    base = partial(UnitResult, unit.kind, unit.slide.id, unit.block, pid=os.getpid(), peak_rss_mb=peak, worker=worker)
    return base(**{"status": "ok", "bytes_read": slide.reader.stats().bytes_read, **facts})
