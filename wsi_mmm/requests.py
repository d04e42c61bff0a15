"""From the words of a caller to an order: recipe, slides and places, all of it checked before any slide is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast, get_args

from wsi_mmm.config import SlideSpec, user_cache
from wsi_mmm.engine.executors.tls import tls_of
from wsi_mmm.engine.monitoring import run_report
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.run import RunRequest
from wsi_mmm.engine.units import Placement, SlideTask
from wsi_mmm.errors import RecipeError
from wsi_mmm.inputs import expand_inputs, leads_away
from wsi_mmm.model.fetched import fetched
from wsi_mmm.model.weights import check_file, check_weights
from wsi_mmm.slides.registry import READERS
from wsi_mmm.storage import store

Slides = str | Path | SlideSpec | Sequence[str | Path | SlideSpec]

_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("tile_size", "overlap", "batch_size", "block_tiles", "threads"), (Integral, "a whole number")),
    **dict.fromkeys(("mpp", "mpp_override", "min_tissue"), (Real, "a number")),
    **dict.fromkeys(("features", "save_maps", "bounds_offset", "gzip", "force", "overlay"), (bool, "true or false")),
    **dict.fromkeys(("device", "reader", "runtime", "cache_tiles", "placement"), (str, "a word")),
    "cache_quota": (Integral, "a size such as 50GB"),
    **dict.fromkeys(("tissue", "regions", "cache", "tls"), (str, "a path or a word")),
}


def model_recipe(model: str, tasks: str | Sequence[str] | None, options: dict[str, Any]) -> Recipe:
    """The recipe of a model's tasks (None: all of them), with what ``options`` say. RecipeError, ModelError."""
    from wsi_mmm.model.card import read_card
    from wsi_mmm.model.identity import model_identity

    here = fetched(model, user_cache())
    card = read_card(here)
    known = [task.name for task in card.tasks]
    wanted = list(dict.fromkeys([tasks] if isinstance(tasks, str) else tasks)) if tasks else known
    for name in wanted:
        if name not in known:
            raise RecipeError(f"model {model!r} has no task {name!r}; it has: {', '.join(known) or 'none'}")
    chosen = tuple(name for name in known if name in wanted)
    check_weights(here, card.weights_sha256)
    base = Recipe(model, model_identity(here, card), chosen, card.mpp, card.tile_size, card.overlap)
    return _with_options(base, options)


def encoder_recipe(encoder: str, weights: str | None, options: dict[str, Any]) -> Recipe:
    """The recipe of features alone: of a model's encoder, or of a bare one. RecipeError, ModelError."""
    from wsi_mmm.model.card import read_card
    from wsi_mmm.model.identity import encoder_identity, is_model, model_identity

    here = fetched(encoder, user_cache())
    plain = not is_model(here)
    if plain and weights not in (None, "random"):
        check_file(Path(str(weights)).expanduser())
    elif not plain:
        check_weights(here, read_card(here).weights_sha256)
    identity = encoder_identity(encoder, weights) if plain else model_identity(here, read_card(here))
    base = Recipe(encoder, identity, (), 0.5, 256, 0, block_tiles=8, encoder=plain, weights=weights)
    return _with_options(base, options)


def _with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    given = {name: _checked(name, value) for name, value in options.items() if value is not None}
    for name in ("mpp_override", "tls", "placement"):  # not of the recipe
        given.pop(name, None)
    if "tile_size" in given:
        given["tile"] = given.pop("tile_size")
        given.setdefault("overlap", min(recipe.overlap, given["tile"] // 8 // 2 * 2))
    if given.get("reader") not in (None, *READERS):
        raise RecipeError(f"there is no reader {given['reader']!r}; choose one of {', '.join(READERS)}")
    for name in {"tissue", "regions", "cache"} & set(given):  # a worker may stand in another folder
        given[name] = given[name] if given[name] in ("auto", "none") else _absolute(given[name])
    if "cache_quota" in given and not store.is_local(given.get("cache", ".")):
        raise RecipeError("a quota holds for a cache in a folder; give a bucket a lifecycle rule instead")
    return replace(recipe, user_cache=user_cache(), **given)


def _bytes(value: Any) -> int:
    from wsi_mmm.cache import bytes_of  # with it comes Zarr

    return bytes_of(value)


def _checked(name: str, value: Any) -> Any:
    """``value`` of an option as a plain int, float, bool or str; RecipeError when the name or the type is wrong."""
    if name not in _KINDS:
        raise RecipeError(f"unknown option {name!r}; known: {', '.join(sorted(_KINDS))}")
    kind, words = _KINDS[name]
    value = str(value) if isinstance(value, Path) else value
    if name == "cache_tiles" and isinstance(value, bool):
        value = "on" if value else "off"
    if name == "cache_quota":
        value = _bytes(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise RecipeError(f"option {name} must be {words}, not {value!r}")
    plain: dict[type, type] = {Integral: int, Real: float}
    return plain.get(kind, kind)(value)


def order_of(
    slides: Slides, recipe: Recipe, output: str | Path, workers: object, scheduler: str | None, options: dict[str, Any]
) -> RunRequest:
    """Which slides go where, by which recipe. RecipeError, ManifestError, OutputError."""
    if not isinstance(workers, int) or workers < 0:
        raise RecipeError(f"workers must be a whole number of 0 or more, not {workers!r}")
    items = [slides] if isinstance(slides, str | Path | SlideSpec) else list(slides)
    specs = expand_inputs(items, mpp=options.get("mpp_override"))
    out = str(output).rstrip("/")
    out = out if "://" in out else str(Path(out).absolute())
    specs = [replace(spec, error=spec.error or leads_away(out, spec.id)) for spec in specs]
    for place in (out, recipe.cache):
        if place is not None:
            run_report.check_writable(place)
    tasks = tuple(
        SlideTask(s.id, _absolute(s.uri), store.join(out, s.id), recipe, s.mpp, s.mask and _absolute(s.mask), s.error)
        for s in specs
    )
    placement = _placement(options.get("placement"), recipe)
    return RunRequest(tasks, recipe, out, workers, scheduler, tls_of(options.get("tls"), scheduler), placement)


def _placement(word: str | None, recipe: Recipe) -> Placement:
    for known in get_args(Placement):
        if word in (known, None):
            if known == "pool" and recipe.cache is None:
                raise RecipeError(
                    "with placement pool tiles go through a cache that all workers see: name it with --cache"
                )
            return cast("Placement", known)
    raise RecipeError(f"placement is beside, pool or auto, not {word!r}")


def checked_here(order: RunRequest) -> RunRequest:
    """The order, when this machine has what its runtime needs; a cluster's workers look for themselves."""
    from wsi_mmm.model.identity import check_runtime

    if not order.scheduler:
        check_runtime(order.recipe.runtime)
    return order


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())
