"""From what a caller asks for to a `RunRequest`: recipe, slides and places, all checked before any slide is opened."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from wsi_mmm.config import SlideSpec, user_cache
from wsi_mmm.engine.executors.tls import tls_of
from wsi_mmm.engine.monitoring import run_report
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.run import RunRequest
from wsi_mmm.engine.stages.context import recipe_tasks
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import OptionError, WsiError
from wsi_mmm.host_tuning import cpu_count
from wsi_mmm.inputs import expand_inputs, leads_away, stem
from wsi_mmm.model.card import WEIGHTS, model_path, read_card
from wsi_mmm.model.choose import (
    RANDOM,
    ChosenEncoder,
    EncoderOptions,
    bare_card,
    find_encoder,
    hash_encoder,
    locate_weights,
)
from wsi_mmm.model.fetch import fetch_model
from wsi_mmm.model.identity import check_device, check_runtime, check_weights, is_model, model_identity
from wsi_mmm.model.kept_weights import may_keep
from wsi_mmm.model.recipe import ColourTriple, Pooling
from wsi_mmm.model.slide_model import MEAN, TileVectors, choose_slide_model
from wsi_mmm.model.weights_config import HUB, split_source
from wsi_mmm.model.wsinfer import find_script, is_script_folder, read_script_model
from wsi_mmm.options import EMBED_DEFAULTS, TISSUE_WORDS, EncoderKeywords, RunOptions
from wsi_mmm.slides.registry import find_reader
from wsi_mmm.storage import store
from wsi_mmm.tiles.tile_file import match_tile_files, read_tile_list

Slides = str | Path | SlideSpec | Sequence[str | Path | SlideSpec]


def model_recipe(model: str, tasks: str | Sequence[str] | None, options: RunOptions) -> Recipe:
    """Return the recipe of a model's tasks (None: those that its card lists for that, else all). Raises OptionError,
    ModelError."""
    folder = find_script(model)
    script = None if folder is None else read_script_model(folder)
    here = model if script else fetch_model(model, user_cache())
    card = script.card if script else read_card(here)
    known = [task.name for task in card.tasks]
    wanted = ([tasks] if isinstance(tasks, str) else tasks) or card.default_tasks or known
    for name in wanted:
        if name not in known:
            raise OptionError(f"model {model!r} has no task {name!r}; it has: {', '.join(known) or 'none'}")
    chosen = tuple(name for name in known if name in wanted)
    if script:
        options = _script_options(model, options)
    else:
        check_weights(model_path(here) / WEIGHTS, card.weights_sha256)
    identity = script.identity if script else model_identity(here, card)
    base = Recipe(
        model, identity, chosen, card.mpp, card.tile_size, card.overlap, model_mpp=card.mpp, script=script is not None
    )
    recipe = _apply_options(base, options)
    for task in card.tasks:
        if task.name in chosen and task.head == "bag" and (recipe.mpp, recipe.tile) != (card.mpp, card.tile_size):
            learnt = (
                f"learnt from tiles of {card.tile_size} px at {card.mpp:g} mpp, and of others its answer means nothing"
            )
            raise OptionError(f"task {task.name!r} {learnt}: leave --mpp, --mag and --tile-size out")
    return recipe


def _script_options(model: str, options: RunOptions) -> RunOptions:
    """Return the options for a TorchScript model, which gives no features and runs on processors. OptionError: it was
    not allowed, or is asked for what it cannot do."""
    if not options.allow_torchscript:
        raise OptionError(
            f"{store.redact(model)} is TorchScript, which is code: if you trust its authors, add --allow-torchscript "
            "(Python: allow_torchscript=True); it runs in a process of its own (docs/security.md)"
        )
    if options.runtime not in ("auto", "eager") or options.device not in ("auto", "cpu"):
        raise OptionError("TorchScript models run as they are, on the CPU: leave --runtime and --device out")
    return replace(options, features=False, device="cpu")


def encoder_recipe(
    encoder: str, weights: str | None, options: RunOptions, said: EncoderOptions | None = None
) -> Recipe:
    """Return the recipe of features alone, of a model's encoder or of a bare one, of which ``said`` says more.

    Raises OptionError, ModelError.
    """
    here = fetch_model(encoder, user_cache())
    if is_script_folder(here):
        raise OptionError(f"{encoder!r} is TorchScript, which gives classes and no features: wsi-mmm run -m {encoder}")
    if not is_model(here):
        weights = weights if weights in (None, RANDOM) else _absolute_uri(os.path.expanduser(weights))
        chosen = _hash_encoder(find_encoder(encoder, weights, said), options)
        network = chosen.recipe
        base = Recipe(
            encoder, chosen.identity, (), network.mpp, network.tile_px, 0,
            int(EMBED_DEFAULTS["block_tiles"]), encoder=True, weights=weights, network=network,
            model_mpp=network.mpp if network.sources else None,
        )  # fmt: skip
        return _apply_options(base, options)
    if said not in (None, EncoderOptions()) or weights:
        raise OptionError(
            f"{encoder!r} is a model, whose card says how its encoder works: leave the encoder's options out"
        )
    card = read_card(here)
    check_weights(model_path(here) / WEIGHTS, card.weights_sha256)
    tile, overlap, block = (int(EMBED_DEFAULTS[name]) for name in ("tile_size", "overlap", "block_tiles"))
    base = Recipe(encoder, model_identity(here, card), (), card.mpp, tile, overlap, block, model_mpp=card.mpp)
    return _apply_options(base, options)


def _hash_encoder(chosen: ChosenEncoder, options: RunOptions) -> ChosenEncoder:
    """Find the hash of an encoder's file; where this process will load it, what was read waits for that."""
    if not may_keep() or options.workers or options.scheduler or chosen.recipe.package:
        return hash_encoder(chosen)
    from wsi_mmm.model.checkpoint import read_ahead  # torch, which the run needs as well

    return hash_encoder(chosen, read_ahead)


def with_slide_model(recipe: Recipe, asked: str | Path | None) -> Recipe:
    """Return the recipe with the slide model that a user asked for: None, "mean", a folder or URI. Raises OptionError,
    ModelError."""
    if asked is None:
        return recipe
    if not recipe.options.features:
        raise OptionError("slide vectors are made of the tiles' features: leave features=False out")
    name = str(asked)
    if not name.strip():
        raise OptionError("the slide model is empty (a variable that is not set?): give mean, or a folder")
    place = name if name == MEAN or split_source(name)[0] == HUB else _absolute_uri(os.path.expanduser(name))
    width = recipe.network.dimension if recipe.network is not None else 0
    tiles = TileVectors(store.redact(recipe.model), recipe.model_hash, width, recipe.mpp, recipe.tile, recipe.overlap)
    return replace(recipe, slide=choose_slide_model(place, recipe.user_cache, tiles))


def request_encoders(
    slides: Slides, recipes: Sequence[Recipe], output: str | Path, *, folders: Sequence[str]
) -> list[RunRequest]:
    """Return a run per encoder, each into its folder of ``output``, to be executed in this sequence.

    Where tiles are the same, the first run reads them for all: its units compute what the later ones then find.
    """
    requests = [
        request_run(slides, one, store.join(str(output), name)) for one, name in zip(recipes, folders, strict=True)
    ]
    recipes = [request.recipe for request in requests]
    # Slides that fail from the start belong to it: a pass must not write where a run of its own would refuse to.
    groups = [
        (one.mpp, one.tile, one.overlap, one.block_tiles, tuple(task.error for task in request.tasks))
        for one, request in zip(recipes, requests, strict=True)
    ]
    found = []
    for number, request in enumerate(requests):
        again = groups[number] in groups[:number]
        companions = tuple(
            (requests[other].output, replace(recipes[other], after_others=again))
            for other in range(number + 1, len(requests))
            if groups[other] == groups[number]
        )
        recipe = replace(request.recipe, companions=companions, after_others=again)
        found.append(replace(request, recipe=recipe, tasks=tuple(replace(one, recipe=recipe) for one in request.tasks)))
    return found


def encoder_folders(encoders: Sequence[str]) -> list[str]:
    """Return the folder of the output that each encoder's features go to. OptionError when two have the same."""
    found: dict[str, str] = {}
    for name in encoders:
        source, rest = split_source(name)
        plain = rest if source == HUB else rest.rstrip("/").rpartition("/")[2]
        folder = re.sub(r"[^A-Za-z0-9._+-]+", "-", plain).strip("-.")
        if not folder or folder in found:
            other = f"{found[folder]!r} and {name!r} would go to the same folder" if folder else f"{name!r} has no name"
            raise OptionError(f"{other}: embed them apart, each to an output of its own")
        found[folder] = name
    return list(found)


def encoder_options(given: EncoderKeywords) -> EncoderOptions:
    """Return what a user said of an encoder beside its weights. Raises OptionError."""
    pool, input_size, arguments = given.get("pool"), given.get("input_size"), given.get("encoder_args")
    mean, std = given.get("mean"), given.get("std")
    if pool is not None and pool not in get_args(Pooling):
        raise OptionError(f"there is no pooling {pool!r}; choose one of: {', '.join(get_args(Pooling))}")
    if input_size is not None and (type(input_size) is not int or not 16 <= input_size <= 4096):
        raise OptionError(f"the encoder's input size must be between 16 and 4096 px, not {input_size}")
    return EncoderOptions(
        arguments=None if arguments is None else _read_arguments(arguments),
        mean=None if mean is None else _read_colours(mean),
        std=None if std is None else _read_colours(std),
        pooling=cast("Pooling | None", pool),
        input_px=input_size,
    )


def _read_colours(value: object) -> ColourTriple:
    """Return three numbers of a text such as "0.485,0.456,0.406", or of a list. Raises OptionError."""
    parts: Any = value.split(",") if isinstance(value, str) else value
    try:
        red, green, blue = (float(one) for one in parts)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{value!r} is no mean or std: give three numbers, such as 0.485,0.456,0.406") from error
    if not all(math.isfinite(one) for one in (red, green, blue)):
        raise OptionError(f"{value!r} is no mean or std: give three finite numbers, such as 0.485,0.456,0.406")
    return red, green, blue


def _read_arguments(value: object) -> dict[str, Any]:
    """Return the object of a JSON text, or a mapping as it is. Raises OptionError."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{value!r} is no JSON: give an object, such as '{{\"init_values\": 1e-5}}'") from error
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise OptionError(f"{value!r} names no arguments: give an object, such as '{{\"init_values\": 1e-5}}'")
    return dict(found)


def _apply_options(base: Recipe, options: RunOptions) -> Recipe:
    """Return the recipe with the options of a user, whose paths become absolute: a worker may run in another folder."""
    if options.reader is not None:
        find_reader(options.reader)
    if options.cache_quota is not None and not store.is_local(options.cache or "."):
        raise OptionError("a quota holds for a cache in a folder; give a bucket a lifecycle rule instead")
    tile = base.tile if options.tile_size is None else options.tile_size
    overlap = base.overlap if options.tile_size is None else min(base.overlap, tile // 8 // 2 * 2)
    share = max(1, cpu_count() // options.workers) if options.workers else None  # local workers share the processors
    return replace(
        base,
        mpp=options.mpp or base.mpp,
        tile=tile,
        overlap=overlap if options.overlap is None else options.overlap,
        block_tiles=options.block_tiles or base.block_tiles,
        user_cache=user_cache(),
        options=replace(
            options,
            threads=options.threads or share,
            tissue=options.tissue if options.tissue in TISSUE_WORDS else _absolute_uri(options.tissue),
            regions=options.regions and _absolute_uri(options.regions),
            cache=options.cache and _absolute_uri(options.cache),
            tiles=options.tiles and _absolute_uri(os.path.expanduser(options.tiles)),
        ),
    )


def request_run(slides: Slides, recipe: Recipe, output: str | Path) -> RunRequest:
    """Return the run of a recipe over slides. Raises OptionError, ManifestError, OutputError."""
    options = recipe.options
    tls = tls_of(options.tls, options.scheduler)
    if not str(output).strip():
        raise OptionError("the output is empty (a variable that is not set?): name a folder or an s3:// prefix")
    specs = expand_inputs(
        [slides] if isinstance(slides, str | Path | SlideSpec) else slides,
        mpp=options.mpp_override,
        scene=options.scene,
    )
    out = _absolute_uri(os.path.expanduser(output) if store.is_local(str(output)) else str(output).rstrip("/"))
    for place in (out, options.cache):
        if place is not None:
            run_report.check_writable(place)
    tasks = tuple(
        SlideTask(
            id=spec.id,
            uri=_absolute_uri(spec.uri),
            output=store.join(out, spec.id),
            recipe=recipe,
            mpp=spec.mpp,
            mask=spec.mask and _absolute_uri(spec.mask),
            error=spec.error or leads_away(out, spec.id),
            scene=spec.scene,
        )
        for spec in specs
    )
    if options.tiles is not None:
        recipe, tasks = _list_tiles(recipe, tasks, options.tiles)
    return RunRequest(tasks, recipe, out, tls)


def _list_tiles(recipe: Recipe, tasks: tuple[SlideTask, ...], where: str) -> tuple[Recipe, tuple[SlideTask, ...]]:
    """Return the recipe with size and resolution of the tiles that files list, and each slide with its file.

    The first file that says its size counts; a slide whose file says another fails by itself. Raises OptionError.
    """
    if recipe.tasks:
        raise OptionError("a model's maps are put together on a grid of tiles: give the list to embed --tiles")
    files = match_tile_files(where, [(task.id, stem(task.uri)) for task in tasks])
    listed = []
    for task, (uri, error) in zip(tasks, files, strict=True):
        masked = "a file lists its tiles, so its mask is not used: leave one of them out" if task.mask else ""
        listed.append(replace(task, tiles=uri, error=task.error or error or masked))
    for uri, _ in files:
        with suppress(WsiError):  # what is wrong with a file is said of its slide
            if uri is not None and (found := read_tile_list(uri)).size is not None:
                size, mpp = recipe.options.tile_size or found.size, recipe.options.mpp or found.nominal_mpp
                recipe = replace(recipe, tile=size, mpp=mpp or recipe.mpp)
                break
    return check_recipe_here(recipe), tuple(replace(task, recipe=recipe) for task in listed)


def check_recipe_here(recipe: Recipe) -> Recipe:
    """Return the recipe if this machine can run its model: packages of the runtime, device, weights, tasks of the card.

    A cluster's workers check for themselves. Raises MissingPackage, OptionError, ModelError, PluginError.
    """
    options = recipe.options
    if not options.scheduler:
        check_runtime(options.runtime)
        check_device(options.device)
        recipe_tasks(recipe)
        if recipe.network is not None:
            from wsi_mmm.model.encoder import check_encoder  # torch, which the run needs as well
            from wsi_mmm.model.fitting import check_listed_weights

            width = check_encoder(bare_card(recipe.network), recipe.tile)
            if recipe.slide is not None:
                recipe.slide.check_width(width, store.redact(recipe.model))
            if (path := locate_weights(recipe.network, recipe.weights)) is not None:
                check_listed_weights(recipe.network, path)
        elif recipe.slide is not None and recipe.slide.foreign:
            from wsi_mmm.model.encoder import check_encoder

            width = check_encoder(read_card(fetch_model(recipe.model, user_cache())), recipe.tile)
            recipe.slide.check_width(width, store.redact(recipe.model))
    return recipe


def _absolute_uri(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())
