"""From what a caller asks for to a `RunRequest`: recipe, slides and places, all checked before any slide is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wsi_mmm.config import SlideSpec, user_cache
from wsi_mmm.engine.executors.tls import tls_of
from wsi_mmm.engine.monitoring import run_report
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.run import RunRequest
from wsi_mmm.engine.stages.context import recipe_tasks
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import OptionError
from wsi_mmm.host_tuning import cpu_count
from wsi_mmm.inputs import expand_inputs, leads_away
from wsi_mmm.model.card import WEIGHTS, model_path, read_card
from wsi_mmm.model.fetch import fetch_model
from wsi_mmm.model.identity import (
    check_device,
    check_runtime,
    check_weights,
    encoder_identity,
    is_model,
    model_identity,
)
from wsi_mmm.options import EMBED_DEFAULTS, RunOptions
from wsi_mmm.slides.registry import find_reader
from wsi_mmm.storage import store

Slides = str | Path | SlideSpec | Sequence[str | Path | SlideSpec]


def model_recipe(model: str, tasks: str | Sequence[str] | None, options: RunOptions) -> Recipe:
    """Return the recipe of a model's tasks (None: those that its card lists for that, else all). Raises OptionError,
    ModelError."""
    here = fetch_model(model, user_cache())
    card = read_card(here)
    known = [task.name for task in card.tasks]
    wanted = ([tasks] if isinstance(tasks, str) else tasks) or card.default_tasks or known
    for name in wanted:
        if name not in known:
            raise OptionError(f"model {model!r} has no task {name!r}; it has: {', '.join(known) or 'none'}")
    chosen = tuple(name for name in known if name in wanted)
    check_weights(model_path(here) / WEIGHTS, card.weights_sha256)
    identity = model_identity(here, card)
    base = Recipe(model, identity, chosen, card.mpp, card.tile_size, card.overlap, model_mpp=card.mpp)
    recipe = _apply_options(base, options)
    for task in card.tasks:
        if task.name in chosen and task.head == "bag" and (recipe.mpp, recipe.tile) != (card.mpp, card.tile_size):
            learnt = (
                f"learnt from tiles of {card.tile_size} px at {card.mpp:g} mpp, and of others its answer means nothing"
            )
            raise OptionError(f"task {task.name!r} {learnt}: leave --mpp, --mag and --tile-size out")
    return recipe


def encoder_recipe(encoder: str, weights: str | None, options: RunOptions) -> Recipe:
    """Return the recipe of features alone, of a model's encoder or of a bare one. Raises OptionError, ModelError."""
    here = fetch_model(encoder, user_cache())
    bare, model_mpp = not is_model(here), None
    if bare:
        identity = encoder_identity(encoder, weights)
    else:
        card = read_card(here)
        check_weights(model_path(here) / WEIGHTS, card.weights_sha256)
        identity, model_mpp = model_identity(here, card), card.mpp
    base = Recipe(
        encoder,
        identity,
        (),
        EMBED_DEFAULTS["mpp"],
        int(EMBED_DEFAULTS["tile_size"]),
        int(EMBED_DEFAULTS["overlap"]),
        int(EMBED_DEFAULTS["block_tiles"]),
        encoder=bare,
        weights=weights,
        model_mpp=model_mpp,
    )
    return _apply_options(base, options)


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
            tissue=options.tissue if options.tissue in ("auto", "none") else _absolute_uri(options.tissue),
            regions=options.regions and _absolute_uri(options.regions),
            cache=options.cache and _absolute_uri(options.cache),
        ),
    )


def request_run(slides: Slides, recipe: Recipe, output: str | Path) -> RunRequest:
    """Return the run of a recipe over slides. Raises OptionError, ManifestError, OutputError."""
    options = recipe.options
    tls = tls_of(options.tls, options.scheduler)
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
    return RunRequest(tasks, recipe, out, tls)


def check_recipe_here(recipe: Recipe) -> Recipe:
    """Return the recipe if this machine can run its model: packages of the runtime, device, weights, tasks of the card.

    A cluster's workers check for themselves. Raises MissingPackage, OptionError, ModelError, PluginError.
    """
    options = recipe.options
    if not options.scheduler:
        check_runtime(options.runtime)
        check_device(options.device)
        if recipe.encoder and recipe.weights is None:
            from wsi_mmm.model.hub import check_hub  # asks timm what the encoder is called there

            check_hub(recipe.model)
        recipe_tasks(recipe)
    return recipe


def _absolute_uri(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())
