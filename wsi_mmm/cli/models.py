"""The commands about models and their features: models, models show, encoders, convert and export, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wsi_mmm.cli.console import as_command, command, error_line, facts, make_app, say, say_json, table
from wsi_mmm.config import user_cache
from wsi_mmm.errors import InputError, ModelError

if TYPE_CHECKING:
    from wsi_mmm.model.registry import EncoderEntry

models_app = make_app(
    "List the packaged models, show one, or write one for other tools; list the published encoders.\n\n\b\n"
    "Examples:\n  wsi-mmm models\n  wsi-mmm models show default\n  wsi-mmm models encoders\n"
    "  wsi-mmm models export default -o default.onnx",
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


@command(models_app, "encoders")
def encoders(
    name: Annotated[str | None, typer.Argument(help="Show one of them, with its sources.", show_default=False)] = None,
) -> None:
    """List the published encoders that embed --encoder knows by name, their licences first.

    \b
    Examples:
      wsi-mmm models encoders
      wsi-mmm models encoders uni2-h
    """
    from wsi_mmm.model.registry import encoder_entries, find_entry, offered_entries, suggest_encoders

    if name is not None:
        entry = find_entry(name)
        if entry is None:
            raise InputError(f"no published encoder '{name}': {suggest_encoders(name)}")
        _show_encoder(entry)
        return
    rows = []
    offered, faults = offered_entries()
    for entry in (*encoder_entries().values(), *offered):
        say_json(_encoder_facts(entry))
        recipe = entry.recipe
        gated = "gated" if recipe.gated else ""
        rows.append((recipe.licence, entry.commercial, gated, entry.name, recipe.dimension, recipe.pooling))
    table(rows, ("licence", "commercial use", "", "encoder", "vector", "pooling"))
    for entry in offered:
        say(f"{entry.name} is of the package {entry.recipe.package}")
    for fault in faults:
        error_line(fault)
    say("wsi-mmm models encoders NAME shows one; its weights: docs/encoders.md. Any timm name is an encoder, too.")


def _encoder_facts(entry: EncoderEntry) -> dict[str, object]:
    own = entry.model_dump(mode="json")
    recipe: dict[str, object] = own.pop("recipe")
    first = {key: recipe.pop(key) for key in ("licence", "name", "hub_id")}
    return {**first, **own, **recipe}


def _show_encoder(entry: EncoderEntry) -> None:
    from wsi_mmm.model.find_weights import explain_missing, find_weights, local_places

    known, places = _encoder_facts(entry), local_places()
    try:
        found = find_weights(entry.recipe, None, places)
        last = explain_missing(entry.recipe, places) if found is None else f"weights: {found.path} ({found.place})"
    except ModelError as error:  # what lies there cannot be used as it is: the facts are shown all the same
        found, last = None, str(error)
    if found is None and not entry.recipe.has_weights:
        last = "weights: none are needed"
    say_json({**known, "weights": None if found is None else str(found.path)})
    sources = known.pop("sources")
    shown = {key: _shorten_value(value) for key, value in known.items() if value not in (None, "", [], {})}
    facts(shown, f"encoder {entry.name}")
    for source in sources if isinstance(sources, list) else ():
        say(f"  {source}")
    say(last)


@command(models_app, "convert")
def convert(
    source: Annotated[
        Path, typer.Argument(help="Pickled weights: .bin, .pth, .pt, or the index of several.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. (default: SOURCE.safetensors)", metavar="FILE"),
    ] = None,
) -> None:
    """Write pickled weights as safetensors, which embed --weights takes; nothing in the file is run.

    \b
    Examples:
      wsi-mmm models convert uni/pytorch_model.bin -o uni/model.safetensors
    """
    from wsi_mmm.model.convert_weights import convert_weights
    from wsi_mmm.model.find_weights import conversion_target

    target = output or conversion_target(source)
    done = convert_weights(source, target)
    say_json({"source": str(source), "output": str(done.path), "tensors": done.tensors, "bytes": done.bytes,
              "left_out": done.left_out, "part": done.part})  # fmt: skip
    part = f" of '{done.part}'" if done.part else ""
    rest = f"; {done.left_out} values that are no tensors were left out" if done.left_out else ""
    say(f"wrote {done.path}: {done.tensors} tensors{part}, {done.bytes / 1e6:.1f} MB{rest}")


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
        Literal["h5", "pt", "h5ad", "stamp", "slide-h5", "slide-stamp", "slides-h5", "slides-h5ad"],
        typer.Option(
            "--to",
            help="h5: TRIDENT and CLAM; pt: a tensor, for CLAM; h5ad: AnnData; stamp: for STAMP. Vectors of slides: "
            "slide-h5, slide-stamp; those of all in one file: slides-h5, slides-h5ad.",
        ),
    ] = "h5",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the files. (default: beside the features)")
    ] = None,
) -> None:
    """Write the features of slides in the formats of other tools.

    \b
    Examples:
      wsi-mmm export results/slide/features.zarr --to h5
      wsi-mmm export results/ --to pt -o features/        (one file per slide, a folder per encoder)
      wsi-mmm export results/ --to stamp -o stamp/        (micrometres, feats)
      wsi-mmm export features/ --to slides-h5             (of embed --slide: features/slides.h5)
    """
    from wsi_mmm.outputs import slide_vectors

    if to in slide_vectors.TABLE_FORMATS:
        _export_table(sources, to, output)
        return
    for source, target in targets(sources, to, output):
        slide_vectors.export_file(source, target, to)
        say_json({"source": source, "output": target})
        say(f"wrote {target}")


def _export_table(sources: Sequence[str], to: str, output: str | None) -> None:
    """Write the vectors of all slides as one file, into ``output`` or the only source. Raises InputError."""
    from wsi_mmm.outputs import slide_vectors

    if output is None and (len(sources) != 1 or sources[0].rstrip("/").endswith(".zarr")):
        raise InputError("a table of many slides needs a folder: name it with -o")
    found = list(dict.fromkeys(uri for source in sources for uri in feature_stores(source)))
    target = slide_vectors.table_file(output or sources[0], to)
    count = slide_vectors.export_table(found, target, to)
    say_json({"sources": len(found), "output": target})
    say(f"wrote {target}: {count} slide{'s' * (count != 1)}")


def targets(sources: Sequence[str], to: str, output: str | None) -> list[tuple[str, str]]:
    """(features.zarr, file to write) for every source. Where slides share an id, as those of several encoders in
    ``<encoder>/<slide>`` do, each encoder has a folder in ``output``. InputError when two would share a file yet."""
    from wsi_mmm.outputs.exports import file_ending
    from wsi_mmm.outputs.slide_vectors import file_beside
    from wsi_mmm.storage import store

    found = [uri for source in sources for uri in feature_stores(source)]
    if output is None:
        return [(uri, file_beside(uri, to)) for uri in found]
    slides = [PurePosixPath(uri).parent for uri in found]
    names = [slide.name or "features" for slide in slides]
    if len(set(names)) < len(names):
        names = [f"{slide.parent.name}/{name}".lstrip("/") for slide, name in zip(slides, names, strict=True)]
    if len(set(names)) < len(names):
        raise InputError("two slides have the same id; export them into different folders")
    return [
        (uri, store.join(output, f"{name}.{file_ending(to, beside=False)}"))
        for uri, name in zip(found, names, strict=True)
    ]


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
