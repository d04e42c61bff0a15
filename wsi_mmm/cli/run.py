"""The commands that process slides: run, embed, demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_mmm.cli.console import Debug, Json, error_line, flags, say, say_json
from wsi_mmm.cli.options import Output, add_flags, read_options
from wsi_mmm.cli.progress import print_report, progress
from wsi_mmm.errors import ManifestError, OptionError, WsiError
from wsi_mmm.options import CommandName

if TYPE_CHECKING:
    from wsi_mmm.engine.run import RunRequest
    from wsi_mmm.engine.units import SlideTask


@add_flags("run", output="results")
def run(inputs: list[str], output: str, given: Mapping[str, Any]) -> int:
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

    if given["detach"] and not given["dry_run"]:
        return _submit_job(inputs, output, given)
    return _run_slides("run", api.run_request, inputs, output, given)


@add_flags("embed", output="features")
def embed(inputs: list[str], output: str, given: Mapping[str, Any]) -> int:
    """Compute one feature vector per tile and keep them in Zarr.

    \b
    Examples:
      wsi-mmm embed slides/ -o features
      wsi-mmm embed slides/ --encoder resnet50.a1_in1k --mpp 0.5 --tile-size 256
      wsi-mmm embed slides/ --encoder vit_small_patch16_224 --weights vit.safetensors
      wsi-mmm export features/slide/features.zarr --to h5

    Running the same command again resumes; --force redoes.
    """
    from wsi_mmm import api

    return _run_slides("embed", api.embed_request, inputs, output, given)


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
    return print_report(report)


def _run_slides(
    command: CommandName, request: Callable[..., RunRequest], inputs: list[str], output: str, given: Mapping[str, Any]
) -> int:
    """Run the slides of a request, or with --dry-run only open them."""
    from wsi_mmm import api

    options, observe = read_options(command, given)
    asked = request(inputs, output=output, **options)
    if given["dry_run"]:
        return _open_slides(asked, output)
    count = len(asked.tasks)
    say(f"{count} slide{'s' * (count != 1)} -> {output}")
    with progress(count) as listener:
        report = api.execute(asked, listener, observe=observe)
    return print_report(report)


def _submit_job(inputs: list[str], output: str, given: Mapping[str, Any]) -> int:
    """Submit the run to its scheduler and print the id of the job."""
    from wsi_mmm import api

    options, observe = read_options("run", given)
    scheduler = options.pop("scheduler", None)
    if scheduler is None:
        raise OptionError("--detach needs --scheduler ADDRESS")
    options.pop("workers", None)
    job: Any = api.submit(scheduler, inputs, output=output, observe=observe, **options)
    if flags.json:
        say_json({"job": job.id, "scheduler": scheduler})
    say(f"job {job.id}  (wsi-mmm jobs watch {job.id} --scheduler {scheduler})")
    return 0


def _open_slides(request: RunRequest, output: str) -> int:
    """Make the tasks; open every slide and print its facts, or its error; the exit code is that of the run."""
    from wsi_mmm.engine.monitoring.run_report import exit_code
    from wsi_mmm.engine.stages.context import recipe_tasks

    if not request.recipe.options.scheduler:  # workers elsewhere may have plug-ins that this machine lacks
        recipe_tasks(request.recipe)
    statuses = []
    for task in request.tasks:
        try:
            found = _slide_facts(task)
        except WsiError as error:
            statuses.append("failed")
            error_line(f"{task.id}: {error}")
            continue
        statuses.append("done")
        if flags.json:
            say_json(found)
        size = f"{found['width']} x {found['height']} px, {found['mpp_x']:g} mpp"
        say(f"{found['id']}  {size}, at most {found['tiles_at_most']:,} tiles, {found['uri']}")
    good = statuses.count("done")
    say(f"{good} of {len(statuses)} slides can be read at {request.recipe.mpp:g} mpp -> {output}")
    return exit_code(statuses)


def _slide_facts(task: SlideTask) -> dict[str, Any]:
    """Return the facts of a slide that can be read at the resolution asked for; else raise its WsiError."""
    from wsi_mmm.slides import open_slide
    from wsi_mmm.storage import store
    from wsi_mmm.tiles.grid import make_grid

    if task.error:
        raise ManifestError(task.error)
    recipe = task.recipe
    with open_slide(task.uri, task.mpp, recipe.options.reader) as slide:
        info = slide.info
        slide.scale(recipe.mpp)
        grid = make_grid(info, recipe.mpp, tile=recipe.tile, overlap=recipe.overlap)
    size = {"width": info.width, "height": info.height, "mpp_x": info.mpp_x, "tiles_at_most": grid.rows * grid.columns}
    return {"id": task.id, "uri": store.redact(task.uri), **size}
