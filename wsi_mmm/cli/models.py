"""The commands about models and their features: models, models show, models export, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import typer

from wsi_mmm.cli.console import as_command, command, facts, make_app, say, say_json, table
from wsi_mmm.config import user_cache
from wsi_mmm.errors import InputError

models_app = make_app(
    "List the packaged models, show one, or write one for other tools.\n\n\b\nExamples:\n  wsi-mmm models\n"
    "  wsi-mmm models show default\n  wsi-mmm models export default -o default.onnx",
    no_args_is_help=False,
)


def models(context: typer.Context) -> None:
    """List the packaged models, show one, or write one for other tools."""
    if context.invoked_subcommand is not None:
        return
    from wsi_mmm.model.card import read_card, zoo_names

    rows = []
    for card in map(read_card, sorted(zoo_names(), key=lambda name: (name != "default", name))):
        say_json(card.model_dump(mode="json"))
        tasks = ", ".join(f"{task.name} ({task.kind})" for task in card.tasks)
        rows.append((card.name, tasks, f"{card.mpp:g}", card.tile_size))
    table(rows, ("model", "tasks", "mpp", "tile"))
    say("wsi-mmm models show NAME tells how it was trained, how good it is and where it fails.")


models_app.callback(invoke_without_command=True)(as_command(models))


@command(models_app, "show")
def show(name: Annotated[str, typer.Argument(help="Packaged model, or the folder of one.")] = "default") -> None:
    """Show a model's card: tasks, resolution, training data, licence, metrics, limits.

    \b
    Examples:
      wsi-mmm models show default
      wsi-mmm models show my-model/ --json
    """
    from wsi_mmm.model.card import read_card
    from wsi_mmm.model.fetch import fetch_model

    card = read_card(fetch_model(name, user_cache())).model_dump(mode="json")
    say_json(card)
    tasks = card.pop("tasks", [])
    card["data"] = {key: value for key, value in card["data"].items() if key not in ("configuration", "items")}
    shown = {key: _shorten_value(value) for key, value in card.items() if value not in (None, "", [], {})}
    facts(shown, f"model {name}")
    for task in tasks:
        say(f"  task {task['name']} ({task['kind']}): {', '.join(task['classes'])}")


def _shorten_value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shorten_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shorten_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@command(models_app, "export")
def export_model(
    name: Annotated[str, typer.Argument(help="Packaged model, model folder, timm name or hf-hub: id.")] = "default",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. (default: NAME.onnx)", metavar="FILE"),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Task to include, repeatable. (default: all)", metavar="NAME")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="For a timm name: local .safetensors file, or random.")] = None,
    tile_size: Annotated[
        int | None, typer.Option(help="Fix the tile size, px. (default: free where the encoder allows)", min=32)
    ] = None,
) -> None:
    """Write a model as ONNX for other tools: pixels uint8[n, h, w, 3] in, features and one answer per task out.

    \b
    Examples:
      wsi-mmm models export default -o default.onnx
      wsi-mmm models export my-model/ --task nuclei -o nuclei.onnx
    """
    from wsi_mmm.api import export_model as write

    target = output or Path(f"{PurePosixPath(name).name}.onnx")
    done = write(name, output=target, tasks=tasks, weights=weights, tile_size=tile_size)
    say_json(done)
    size = f"{done.side} px only" if done.side else "any multiple of 32 px"
    say(f"wrote {done.path}: features{''.join(f', {task}' for task in done.tasks)}; tile size: {size}")
    say(f"largest difference from torch on seeded noise: {done.difference:.1e} of the largest answer")


def export(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="FEATURES", help="features.zarr, or folders that hold some.", show_default=False),
    ],
    to: Annotated[
        Literal["h5", "pt", "h5ad"],
        typer.Option("--to", help="h5: TRIDENT and CLAM; pt: a tensor, for CLAM; h5ad: AnnData."),
    ] = "h5",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the files. (default: beside the features)")
    ] = None,
) -> None:
    """Write the features of slides in the formats of other tools.

    \b
    Examples:
      wsi-mmm export results/slide/features.zarr --to h5
      wsi-mmm export results/ --to pt -o features/        (one file per slide)
    """
    from wsi_mmm.outputs import exports

    for source, target in targets(sources, to, output):
        exports.export(source, target)
        say_json({"source": source, "output": target})
        say(f"wrote {target}")


def targets(sources: Sequence[str], ending: str, output: str | None) -> list[tuple[str, str]]:
    """(features.zarr, file to write) for every source; InputError when two slides would share a file."""
    from wsi_mmm.storage import store

    found = [uri for source in sources for uri in feature_stores(source)]
    if output is None:
        return [(uri, f"{uri.removesuffix('.zarr')}.{ending}") for uri in found]
    names = [PurePosixPath(uri).parent.name or "features" for uri in found]
    if len(set(names)) < len(names):
        raise InputError("two slides have the same id; export them into different folders")
    return [(uri, store.join(output, f"{name}.{ending}")) for uri, name in zip(found, names, strict=True)]


def feature_stores(source: str) -> list[str]:
    """Every features.zarr at or below ``source``, sorted; InputError when there is none."""
    from wsi_mmm.storage import store

    mark = "/zarr.json"
    if source.rstrip("/").endswith(".zarr"):
        found = [source.rstrip("/")] if store.exists(source.rstrip("/") + mark) else []
    else:
        found = [uri.removesuffix(mark) for uri in store.list_uris(source) if uri.endswith("/features.zarr" + mark)]
    if not found:
        raise InputError(f"no features.zarr at {store.redact(source)}; wsi-mmm embed makes them")
    return found
