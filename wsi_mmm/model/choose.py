"""From an encoder's name, its weights and what a user said to a complete recipe. Only bare names of timm need torch."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import DecoderCard, EncoderCard, ModelCard
from wsi_mmm.model.find_weights import (
    choose_file,
    download_weights,
    explain_missing,
    find_weights,
    local_places,
    local_weights,
)
from wsi_mmm.model.hub import check_hub
from wsi_mmm.model.identity import check_weights
from wsi_mmm.model.recipe import IMAGENET_MEAN, IMAGENET_STD, ColourTriple, EncoderRecipe, Pooling, parse_recipe
from wsi_mmm.model.registry import find_entry, near_names, suggest_encoders
from wsi_mmm.model.weights_config import (
    FOLDER,
    HUB,
    WeightsConfig,
    config_beside,
    hub_config,
    split_source,
)
from wsi_mmm.plugins import plugin_names

RANDOM = "random"


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """The options of an encoder beside its name and weights; None: as its registry entry or its weights say."""

    arguments: Mapping[str, Any] | None = None
    mean: ColourTriple | None = None
    std: ColourTriple | None = None
    pooling: Pooling | None = None
    input_px: int | None = None


@dataclass(frozen=True, slots=True)
class ChosenEncoder:
    """A complete recipe, the file of its weights (None: random ones, or those of a plug-in), and the file's sha256
    (empty: not known yet)."""

    recipe: EncoderRecipe
    path: Path | None
    sha256: str

    @property
    def identity(self) -> str:
        """sha256 hex of all that its vectors depend on."""
        return encoder_identity(self.recipe, self.sha256)


@dataclass(frozen=True, slots=True)
class TimmFacts:
    """The facts that timm declares of a bare name: repository and file of its weights, and how they were trained."""

    mean: ColourTriple = IMAGENET_MEAN
    std: ColourTriple = IMAGENET_STD
    hub_id: str = ""
    file: str = ""
    licence: str = ""


def encoder_identity(recipe: EncoderRecipe, weights_sha256: str) -> str:
    """sha256 hex of an encoder: what its recipe computes, and the bytes of its weights ("random": there are none)."""
    return hashlib.sha256(json.dumps([recipe.value_facts(), weights_sha256], sort_keys=True).encode()).hexdigest()


def bare_card(recipe: EncoderRecipe) -> ModelCard:
    """The card of a bare encoder: a model without tasks."""
    encoder = EncoderCard(
        name=recipe.architecture, args=recipe.arguments, pooling=recipe.pooling, registers=recipe.registers,
        input_px=recipe.input_px, interpolation=recipe.interpolation, key_map=recipe.key_map,
        package=recipe.package.partition("==")[0],
    )  # fmt: skip
    return ModelCard(
        name=recipe.name, encoder=encoder, decoder=DecoderCard(bottleneck=0), mpp=recipe.mpp, overlap=0,
        tile_size=recipe.tile_px, mean=recipe.mean or IMAGENET_MEAN, std=recipe.std or IMAGENET_STD,
        licence=recipe.licence,
    )  # fmt: skip


def choose_encoder(name: str, weights: str | None = None, said: EncoderOptions | None = None) -> ChosenEncoder:
    """The encoder ``name`` with all that its vectors depend on; see `find_encoder`. Its file is read for its sha256."""
    return hash_encoder(find_encoder(name, weights, said))


def find_encoder(name: str, weights: str | None = None, said: EncoderOptions | None = None) -> ChosenEncoder:
    """The encoder ``name``; its file was not read: `hash_encoder`, or `open_encoder` as it loads it, find its sha256.

    ``name``: of the registry, of timm, ``hf-hub:org/name``, ``local-dir:folder`` (or a folder with config.json), or of
    a plug-in. ``weights``: None finds or downloads those that the name stands for; "random"; a safetensors file, or the
    folder that holds one. ModelError naming the fix: nothing of that name, no weights, mean and std said nowhere.
    """
    asked = said or EncoderOptions()
    base, declared = _named_recipe(name, weights)
    if base.package and (asked.pooling or asked.arguments):
        raise ModelError(
            f"the code of {base.package} decides how {name} pools: leave embed --pool and --encoder-args out"
        )
    path = locate_weights(base, weights)
    beside = config_beside(path) if path is not None and not declared else WeightsConfig()
    if beside.architecture and _bare_name(beside.architecture) != _bare_name(base.architecture):
        raise ModelError(
            f"the config.json beside {path} is of the architecture {beside.architecture}, not {base.architecture}: "
            f"give embed --encoder {beside.architecture}, or move the file away from it"
        )
    updates: dict[str, Any] = {
        "arguments": {**base.arguments, **beside.arguments, **(asked.arguments or {})},
        "mean": asked.mean or base.mean or beside.mean,
        "std": asked.std or base.std or beside.std,
        "pooling": asked.pooling or base.pooling,
        "input_px": base.input_px if asked.input_px is None else asked.input_px,
        "dimension": 0 if asked.pooling or asked.arguments else base.dimension,
    }
    recipe = parse_recipe(base.model_dump() | _known_colours(updates, base, path), f"the encoder {name}")
    return unread_encoder(recipe, path, weights)


def unread_encoder(recipe: EncoderRecipe, path: Path | None, weights: str | None) -> ChosenEncoder:
    """The encoder whose file was not looked at yet: `open_encoder` finds its hash as it reads it."""
    return ChosenEncoder(recipe, path, "" if path is not None else weights or "none")


def hash_encoder(chosen: ChosenEncoder, hash_file: Callable[[Path], str] = check_weights) -> ChosenEncoder:
    """The same with the sha256 of its file. ModelError when that is missing or a pickle."""
    return replace(chosen, sha256=hash_file(chosen.path)) if chosen.path is not None else chosen


def locate_weights(recipe: EncoderRecipe, weights: str | None) -> Path | None:
    """The file of weights on this machine, by ``weights`` as of `choose_encoder`; None: random or a plug-in's own."""
    if weights == RANDOM or (weights is None and not recipe.has_weights):
        return None
    source, rest = split_source(recipe.name)
    if weights is None and source == FOLDER:
        return choose_file(Path(rest).expanduser(), recipe.file, recipe.name)
    places = local_places()
    found = find_weights(recipe, weights, places)
    if found is None and recipe.package and not recipe.hub_id:
        raise ModelError(explain_missing(recipe, places))
    if found is None and not recipe.hub_id:
        raise ModelError(f"no weights are known for {recipe.name}: give a .safetensors file of them as weights")
    if found is None and not places.offline:
        check_hub(f"{HUB}{recipe.hub_id}")
    return (found or download_weights(recipe, places)).path


def _named_recipe(name: str, weights: str | None) -> tuple[EncoderRecipe, bool]:
    """The recipe that a name stands for, and whether it says all that its weights' own configuration would."""
    if (entry := find_entry(name)) is not None:
        return entry.recipe, True
    source, rest = split_source(name)
    if source == FOLDER and not Path(rest).expanduser().is_dir():
        raise ModelError(f"there is no folder {rest}: check the path behind {FOLDER}")
    if source:
        given = WeightsConfig() if weights in (None, RANDOM) else config_beside(choose_file(local_weights(weights)))
        config = config_beside(Path(rest).expanduser() / "weights") if source == FOLDER else given
        if source == HUB and not given.architecture:
            config = hub_config(rest)
        if not config.architecture:
            raise ModelError(
                f"{rest} has no config.json that names a timm architecture: name one as encoder, "
                "and give its file as weights"
            )
        full = name if source == HUB else FOLDER + str(Path(rest).expanduser().absolute())
        return EncoderRecipe(
            name=full, architecture=config.architecture, arguments=dict(config.arguments), mean=config.mean,
            std=config.std, hub_id=rest if source == HUB and weights is None else "",
        ), True  # fmt: skip
    facts = _timm_facts(name)
    own = weights in (None, RANDOM) or "." in name  # the name says which weights are meant
    return EncoderRecipe(
        name=name, architecture=name, mean=facts.mean if own else None, std=facts.std if own else None,
        hub_id=facts.hub_id if weights is None else "", file=facts.file if weights is None else "",
        licence=facts.licence if own else "",
    ), False  # fmt: skip


def _timm_facts(name: str) -> TimmFacts:
    from wsi_mmm.model.networks import timm_facts

    facts = timm_facts(name)
    if facts is None:
        raise ModelError(f"there is no encoder '{name}'; {_suggest_names(name)}")
    return facts


def _suggest_names(name: str) -> str:
    """The end of a message about an unknown name: near ones of the registry, else of timm and plug-ins."""
    from wsi_mmm.model.networks import network_names

    others = [*network_names(), *plugin_names("encoders")]
    if near_names(name) or not (near := difflib.get_close_matches(name.partition(".")[0], others, n=3, cutoff=0.8)):
        return suggest_encoders(name)
    return f"did you mean {' or '.join(near)}? wsi-mmm models encoders lists the published ones"


def _bare_name(architecture: str) -> str:
    return architecture.partition(".")[0]


def _known_colours(updates: dict[str, Any], base: EncoderRecipe, path: Path | None) -> dict[str, Any]:
    """``updates`` if they have mean and std; random weights want ImageNet's. ModelError when nothing says them."""
    if path is None:
        updates["mean"], updates["std"] = updates["mean"] or IMAGENET_MEAN, updates["std"] or IMAGENET_STD
    if updates["mean"] is None or updates["std"] is None:
        raise ModelError(
            f"nothing says which mean and std the weights {path} of {base.name} were trained with: put their "
            "config.json beside them, or give embed --mean and --std "
            "(ImageNet's: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225)"
        )
    return updates
