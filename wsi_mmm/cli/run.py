"""The commands that work through slides: run, embed, demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_mmm import config
from wsi_mmm.cli.console import ALL_FAILED, SOME_FAILED, Debug, Json, error_line, flags, say, say_json
from wsi_mmm.cli.observe import LogFile, LogLevel, MetricsPort, Traces, observed
from wsi_mmm.cli.options import (
    WHAT,
    WHERE,
    Batch,
    Cache,
    CacheQuota,
    CacheTiles,
    Detach,
    Device,
    DryRun,
    Force,
    Inputs,
    Mag,
    Mpp,
    MppOverride,
    Output,
    Overlap,
    Placement,
    Reader,
    Regions,
    Runtime,
    Scheduler,
    Settings,
    Threads,
    TileSize,
    Tissue,
    Tls,
    Workers,
)
from wsi_mmm.cli.progress import progress, verdict
from wsi_mmm.errors import ManifestError, RecipeError, WsiError

if TYPE_CHECKING:
    from wsi_mmm.api import RunReport
    from wsi_mmm.engine.run import RunRequest
    from wsi_mmm.engine.units import SlideTask

ONLY_IN_SETTINGS = ("block_tiles", "min_tissue", "features")
"""Options of the api that a settings file may set and that have no flag."""


def run(
    inputs: Inputs,
    output: Output = "results",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Packaged model or model folder, s3:// too. (default: default)",
            rich_help_panel=WHAT,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="Task of the model, repeatable. (default: all)", rich_help_panel=WHAT, metavar="NAME"
        ),
    ] = None,
    mpp: Mpp = None,
    mag: Mag = None,
    tile_size: TileSize = None,
    overlap: Overlap = None,
    tissue: Tissue = None,
    regions: Regions = None,
    mpp_override: MppOverride = None,
    reader: Reader = None,
    cache: Cache = None,
    cache_tiles: CacheTiles = None,
    cache_quota: CacheQuota = None,
    maps: Annotated[
        bool, typer.Option("--maps", help="Keep the probability maps of segment tasks (Zarr).", rich_help_panel=WHERE)
    ] = False,
    plain_geojson: Annotated[
        bool,
        typer.Option("--no-gzip", help="Write result.geojson instead of result.geojson.gz.", rich_help_panel=WHERE),
    ] = False,
    bounds_offset: Annotated[
        bool,
        typer.Option(
            "--bounds-offset",
            help="Coordinates relative to the scanned area, for viewers that crop to it (see docs/outputs.md).",
            rich_help_panel=WHERE,
        ),
    ] = False,
    batch_size: Batch = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = None,
    runtime: Runtime = None,
    scheduler: Scheduler = None,
    tls: Tls = None,
    placement: Placement = None,
    detach: Detach = False,
    force: Force = False,
    dry_run: DryRun = False,
    settings: Settings = None,
    log_file: LogFile = None,
    log_level: LogLevel = None,
    metrics_port: MetricsPort = None,
    traces: Traces = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Run a model on slides: GeoJSON, tables, a picture, a report.

    \b
    Examples:
      wsi-mmm run slide.svs -o results
      wsi-mmm run slides/ -o results --task nuclei --workers 4
      wsi-mmm run 's3://bucket/study/*.svs' -o s3://bucket/results
      wsi-mmm run manifest.csv -o results --scheduler tcp://scheduler:8786
      wsi-mmm run no-resolution.tif -o results --mpp-override 0.25
      wsi-mmm run slides/ -o results --dry-run     (can every slide be read?)

    Running the same command again resumes; --force redoes.
    """
    from wsi_mmm import api

    given = {
        "model": model, "tasks": tasks or None, "mpp": config.mpp_of(mpp, mag), "tile_size": tile_size,
        "overlap": overlap, "tissue": tissue, "regions": regions, "mpp_override": mpp_override, "reader": reader,
        "cache": cache, "cache_tiles": cache_tiles, "cache_quota": cache_quota,
        "save_maps": maps or None, "gzip": False if plain_geojson else None,
        "bounds_offset": bounds_offset or None, "batch_size": batch_size, "workers": workers, "threads": threads,
        "device": device, "runtime": runtime, "scheduler": scheduler, "tls": tls,
        "placement": placement, "force": force or None,
        "log_file": log_file, "log_level": log_level, "metrics_port": metrics_port,
        "traces": traces or None,
    }  # fmt: skip
    if dry_run:
        return _rehearse(api.order_run, inputs, output, _options(given, settings))
    if detach:
        return _leave(inputs, output, _options(given, settings))
    return _work(api.run, inputs, output, _options(given, settings))


def embed(
    inputs: Inputs,
    output: Output = "features",
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            "--model",
            "-m",
            help="timm name, hf-hub: id, or model folder, s3:// too. (default: the default model's encoder)",
            rich_help_panel=WHAT,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Local .safetensors weights of the encoder, or 'random'.", rich_help_panel=WHAT)
    ] = None,
    mpp: Mpp = None,
    mag: Mag = None,
    tile_size: TileSize = None,
    overlap: Overlap = None,
    tissue: Tissue = None,
    mpp_override: MppOverride = None,
    reader: Reader = None,
    cache: Cache = None,
    cache_tiles: CacheTiles = None,
    cache_quota: CacheQuota = None,
    batch_size: Batch = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = None,
    runtime: Runtime = None,
    scheduler: Scheduler = None,
    tls: Tls = None,
    placement: Placement = None,
    force: Force = False,
    dry_run: DryRun = False,
    settings: Settings = None,
    log_file: LogFile = None,
    log_level: LogLevel = None,
    metrics_port: MetricsPort = None,
    traces: Traces = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Compute one feature vector per tile and keep them in Zarr.

    \b
    Examples:
      wsi-mmm embed slides/ -o features
      wsi-mmm embed slides/ --encoder resnet50.a1_in1k --mpp 0.5 --tile-size 256
      wsi-mmm embed slides/ --encoder vit_small_patch16_224 --weights vit.safetensors
      wsi-mmm export features/slide/features.zarr --to h5

    Running the same command again resumes; --force redoes.
    """  # fmt: skip
    from wsi_mmm import api

    given = {
        "encoder": encoder, "weights": weights, "mpp": config.mpp_of(mpp, mag), "tile_size": tile_size,
        "overlap": overlap, "tissue": tissue, "mpp_override": mpp_override, "reader": reader, "cache": cache,
        "cache_tiles": cache_tiles, "cache_quota": cache_quota,
        "batch_size": batch_size, "workers": workers, "threads": threads, "device": device,
        "runtime": runtime, "scheduler": scheduler, "tls": tls,
        "placement": placement, "force": force or None,
        "log_file": log_file, "log_level": log_level, "metrics_port": metrics_port,
        "traces": traces or None,
    }  # fmt: skip
    if dry_run:
        return _rehearse(api.order_embed, inputs, output, _options(given, settings))
    return _work(api.embed, inputs, output, _options(given, settings))


def demo(
    output: Output = "demo",
    seed: Annotated[int, typer.Option(help="Another number draws another slide.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Run the default model on a slide drawn for the purpose.

    \b
    Examples:
      wsi-mmm demo
      wsi-mmm demo -o /tmp/demo --seed 1
    """
    from wsi_mmm import api

    with progress(1) as listener:
        report = api.demo(output, seed=seed, progress=listener)
    return verdict(report)


def _options(given: Mapping[str, object], settings: Path | None) -> dict[str, Any]:
    """What to pass on: the settings file under the flags given; the rest is left to the defaults of the api."""
    options = dict(config.read_settings(settings, [*given, *ONLY_IN_SETTINGS])) if settings else {}
    if cache := config.default_cache():
        options.setdefault("cache", cache)
    options |= {name: value for name, value in given.items() if value is not None}
    if (tls := config.default_tls()) and str(options.get("scheduler", "")).startswith("tls://"):
        options.setdefault("tls", tls)
    return options


def _work(call: Callable[..., RunReport], inputs: list[str], output: str, options: Mapping[str, Any]) -> int:
    from wsi_mmm.inputs import expand_inputs  # with it come the readers: not needed for --help

    slides = expand_inputs(inputs)
    say(f"{len(slides)} slide{'s' * (len(slides) != 1)} -> {output}")
    observe, rest = observed(options)
    shown = {"observe": observe} if observe else {}
    with progress(len(slides)) as listener:
        report = call(slides, output=output, progress=listener, **shown, **rest)
    return verdict(report)


def _leave(inputs: list[str], output: str, options: dict[str, Any]) -> int:
    """Submit the run to its scheduler and print the id of the job."""
    from wsi_mmm import api

    scheduler = options.pop("scheduler", None)
    if scheduler is None:
        raise RecipeError("a job is left to a cluster: name it with --scheduler")
    options.pop("workers", None)
    observe, rest = observed(options)
    shown: dict[str, Any] = {"observe": observe} if observe else {}
    job: Any = api.submit(scheduler, inputs, output=output, **shown, **rest)
    if flags.json:
        say_json({"job": job.id, "scheduler": scheduler})
    say(f"job {job.id}  (wsi-mmm jobs watch {job.id} --scheduler {scheduler})")
    return 0


def _rehearse(call: Callable[..., RunRequest], inputs: list[str], output: str, options: Mapping[str, Any]) -> int:
    """Open every slide and say what it is, or what would make it fail; the exit code is that of the run to come."""
    order = call(inputs, output=output, **observed(options)[1])
    failed = 0
    for task in order.tasks:
        try:
            found = _look(task)
        except WsiError as error:
            failed += 1
            error_line(f"{task.id}: {error}")
            continue
        if flags.json:
            say_json(found)
        size = f"{found['width']} x {found['height']} px, {found['mpp_x']:g} mpp"
        say(f"{found['id']}  {size}, at most {found['tiles_at_most']:,} tiles, {found['uri']}")
    say(f"{len(order.tasks) - failed} of {len(order.tasks)} slides can be read at {order.recipe.mpp:g} mpp -> {output}")
    return 0 if not failed else ALL_FAILED if failed == len(order.tasks) else SOME_FAILED


def _look(task: SlideTask) -> dict[str, Any]:
    """Facts of a slide that can be read at the resolution asked for; else its WsiError."""
    from wsi_mmm.slides import open_slide
    from wsi_mmm.storage import store
    from wsi_mmm.tiles.grid import make_grid

    if task.error:
        raise ManifestError(task.error)
    recipe = task.recipe
    with open_slide(task.uri, task.mpp, recipe.reader) as slide:
        info = slide.info
        slide.scale(recipe.mpp)
        grid = make_grid(info, recipe.mpp, tile=recipe.tile, overlap=recipe.overlap)
    size = {"width": info.width, "height": info.height, "mpp_x": info.mpp_x, "tiles_at_most": grid.rows * grid.columns}
    return {"id": task.id, "uri": store.redact(task.uri), **size}
