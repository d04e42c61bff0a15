"""The commands that process slides: run, embed, demo. The flags of run and embed are made from `wsi_mmm.options`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_mmm import config
from wsi_mmm.cli.console import error_line, say, say_json
from wsi_mmm.cli.progress import print_report, progress
from wsi_mmm.errors import ManifestError, OptionError, WsiError
from wsi_mmm.options import (
    GIVE_MPP,
    OBSERVE_OPTIONS,
    WHERE,
    CommandName,
    Option,
    check_value,
    command_options,
    default_words,
    resolution,
    settings_names,
)

if TYPE_CHECKING:
    from wsi_mmm.engine.monitoring.observe import Observe
    from wsi_mmm.engine.run import RunRequest
    from wsi_mmm.engine.units import SlideTask

Command = Callable[..., int]

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="SLIDE",
        help="Slides, folders, patterns ('slides/*.svs'), s3:// prefixes or patterns, or a manifest CSV.",
        show_default=False,
    ),
]
Output = Annotated[
    str, typer.Option("--output", "-o", help="Folder or s3:// prefix of the results.", rich_help_panel=WHERE)
]


def add_flags(command: CommandName, *, output: str) -> Callable[[Command], Command]:
    """Give a command function ``(inputs, output, **given)`` the flags of its options; ``output``: its default folder.

    `read_options` reads what they say.
    """

    def decorate(function: Command) -> Command:
        made = [_flag_parameter(option, command, output) for option in command_options(command)]
        inputs = Parameter("inputs", Parameter.KEYWORD_ONLY, annotation=Inputs)
        function.__signature__ = Signature([inputs, *made])  # type: ignore[attr-defined]
        return function

    return decorate


def _flag_parameter(option: Option, command: CommandName, output: str) -> Parameter:
    kind: Any = str if option.parse else option.value_type
    if kind is not bool:
        kind = (list[kind] if option.several else kind) | None
    default = output if option.name == "output" else False if option.value_type is bool else None
    words = f" (default: {words})" if (words := default_words(option, command)) else ""
    flag = typer.Option(*option.flags, help=option.help + words, rich_help_panel=option.panel, metavar=option.metavar)
    return Parameter(option.name, Parameter.KEYWORD_ONLY, annotation=Annotated[kind, flag], default=default)


def _read_flag(option: Option, value: Any) -> Any:
    """Return the option's value that a flag says; None when the flag was not given."""
    if option.value_type is bool:
        return option.flag_value if value else None
    return value or None if option.several else value


def read_options(command: CommandName, said: Mapping[str, Any]) -> tuple[dict[str, Any], Observe]:
    """Return the options for the api and how the run is observed: flags, over the settings file, over the environment.

    Raises OptionError, ConfigError.
    """
    from wsi_mmm.engine.monitoring.observe import Observe  # imports numpy: not needed for --help

    given = {o.name: _read_flag(o, said[o.name]) for o in command_options(command) if o.name != "output"}
    given["mpp"] = resolution(given["mpp"], given["mag"])
    names = settings_names(command)
    settings = config.read_settings(given["config"], names) if given["config"] else {}
    options = {**settings, **{name: value for name, value in given.items() if name in names and value is not None}}
    if cache := config.default_cache():
        options.setdefault("cache", cache)
    if tls := config.default_tls(str(options.get("scheduler", ""))):
        options.setdefault("tls", tls)
    watched = {o.name: check_value(o, options.pop(o.name)) for o in OBSERVE_OPTIONS if o.name in options}
    if isinstance(watched.get("traces"), bool):
        watched["traces"] = config.trace_exporter() if watched["traces"] else None
    return options, Observe(**watched)


@add_flags("run", output="results")
def run(inputs: list[str], output: str, **given: Any) -> int:
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
def embed(inputs: list[str], output: str, **given: Any) -> int:
    """Compute one feature vector per tile and keep them in Zarr.

    \b
    Examples:
      wsi-mmm embed slides/ -o features
      wsi-mmm embed slides/ --encoder resnet50.a1_in1k --mpp 0.5 --tile-size 256
      wsi-mmm embed slides/ --encoder uni2-h --weights uni2-h/model.safetensors
      wsi-mmm embed slides/ --encoder virchow2 --encoder h-optimus-1     (tiles are read once)
      wsi-mmm embed slides/ --encoder uni --tiles trident/20x_256px_0px_overlap/patches
      wsi-mmm embed slides/ --encoder uni2-h --slide mean   (and slide vectors)
      wsi-mmm export features/slide/features.zarr --to h5

    Running the same command again resumes; --force redoes.
    """
    from wsi_mmm import api

    return _run_slides("embed", api.embed_request, inputs, output, given)


def demo(
    output: Output = "demo",
    seed: Annotated[int, typer.Option(help="Another number draws another slide.")] = 0,
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
    """Run the slides of a request, or with --dry-run only open them; several encoders one after the other."""
    from wsi_mmm import api
    from wsi_mmm.model.kept_weights import keep_weights

    options, observe = read_options(command, given)
    encoders = options.get("encoder")
    with nullcontext() if given["dry_run"] else keep_weights():
        if isinstance(encoders, list) and len(encoders) != 1:
            requests = api.embed_requests(inputs, output=output, **options)
            codes = [_run_request(one, one.output, given, observe) for one in requests]
            return codes[0] if len(set(codes)) == 1 else 3
        if isinstance(encoders, list):
            options = {**options, "encoder": encoders[0]}
        return _run_request(request(inputs, output=output, **options), output, given, observe)


def _run_request(asked: RunRequest, output: str, given: Mapping[str, Any], observe: Observe) -> int:
    from wsi_mmm import api

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
    say_json({"job": job.id, "scheduler": scheduler})
    say(f"job {job.id}  (wsi-mmm jobs watch {job.id} --scheduler {scheduler})")
    return 0


def _open_slides(request: RunRequest, output: str) -> int:
    """Make the tasks; open every slide and print its facts, or its error; the exit code is that of the run."""
    from wsi_mmm.engine.monitoring.run_report import exit_code
    from wsi_mmm.engine.stages.context import recipe_tasks

    if not request.recipe.options.scheduler:  # workers elsewhere may have plug-ins that this machine lacks
        recipe_tasks(request.recipe)
    for words in (*(f"warning: {text}" for text in request.recipe.warnings()), *request.recipe.remarks()):
        say(words)
    statuses = []
    for task in request.tasks:
        try:
            found = _slide_facts(task)
        except WsiError as error:
            statuses.append("failed")
            error_line(f"{task.id}: {error}")
            continue
        statuses.append("done")
        say_json(found)
        size = f"{found['width']} x {found['height']} px, {found['mpp_x']:g} mpp"
        tiles = f"at most {found['tiles_at_most']:,}" if "tiles_at_most" in found else f"{found['tiles']:,} listed"
        say(f"{found['id']}  {size}, {tiles} tiles, {found['uri']}")
    good = statuses.count("done")
    say(f"{good} of {len(statuses)} slides can be read at {request.recipe.mpp:g} mpp -> {output}")
    return exit_code(statuses)


def _slide_facts(task: SlideTask) -> dict[str, Any]:
    """Return the facts of a slide that can be read at the resolution asked for; else raise its WsiError."""
    from wsi_mmm.engine.stages.prepare import check_areas, place_listed
    from wsi_mmm.slides import open_slide
    from wsi_mmm.storage import store
    from wsi_mmm.tiles.grid import make_grid

    if task.error:
        raise ManifestError(task.error)
    recipe = task.recipe
    with open_slide(task.uri, task.mpp, recipe.options.reader, task.scene) as slide:
        info = slide.info
        slide.scale(recipe.mpp, GIVE_MPP)
        if task.tiles is not None:
            count = {"tiles": len(place_listed(task, info).index)}
        else:
            grid = make_grid(info, recipe.mpp, tile=recipe.tile, overlap=recipe.overlap)
            check_areas(task, slide)
            count = {"tiles_at_most": grid.rows * grid.columns}
    size = {"width": info.width, "height": info.height, "mpp_x": info.mpp_x, **count}
    return {"id": task.id, "uri": store.redact(task.uri), **size}
