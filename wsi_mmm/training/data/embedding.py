"""How feature vectors were made, as their file says it: whether files fit together, and to the model that learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wsi_mmm.errors import ConfigError, InputError
from wsi_mmm.model.card import ModelCard, read_card
from wsi_mmm.model.choose import (
    ChosenEncoder,
    bare_card,
    choose_encoder,
    hash_encoder,
    locate_weights,
    unread_encoder,
)
from wsi_mmm.model.identity import is_model, model_identity
from wsi_mmm.model.recipe import parse_recipe
from wsi_mmm.storage import store

FEATURES = "features"
"""Key of a card's ``data``: the `Embedding` of the vectors that its heads learnt from."""

_VECTOR_PARTS = {"encoder", "squeezer", "mean", "std"}
"""Fields of a card that change the vector of a tile, beside the weights."""


ATTRIBUTES = ("encoder", "model_hash", "network", "mpp", "patch_size", "overlap")
"""Attributes of a file of features that say how it was made, as TRIDENT and CLAM call them where they have them."""

_NAMES = ("encoder", "network")
"""Attributes that say no more than ``model_hash`` where that is known."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """How vectors were made; None: their file does not say. ``mpp`` micrometres per px of the tiles of ``tile_size`` px
    that share ``overlap`` px; ``model_hash``: of the weights and all else that vectors depend on; ``network``: the
    `EncoderRecipe` of a bare encoder, as JSON."""

    encoder: str | None = None
    model_hash: str | None = None
    mpp: float | None = None
    tile_size: int | None = None
    overlap: int | None = None
    network: str | None = None

    @property
    def missing(self) -> str:
        """The first attribute of ours that the file lacks, "" when it has all."""
        return next((name for name in ("model_hash", "mpp", "patch_size") if name not in self.to_json()), "")

    def first_difference(self, other: Embedding) -> tuple[str, Any, Any] | None:
        """The first attribute in which two embeddings differ, and its values; None: they are alike. Where the weights
        are known, the name that their model was called by does not matter."""
        known = self.model_hash is not None and other.model_hash is not None
        mine, theirs = self.to_json(), other.to_json()
        pairs = [(name, mine.get(name), theirs.get(name)) for name in ATTRIBUTES if not (known and name in _NAMES)]
        return next((pair for pair in pairs if not _equal(*pair[1:])), None)

    def to_json(self) -> dict[str, Any]:
        """Return what is known, by the names of the attributes."""
        values = (self.encoder, self.model_hash, self.network, self.mpp, self.tile_size, self.overlap)
        return {name: value for name, value in zip(ATTRIBUTES, values, strict=True) if value is not None}


def embedding_of(attributes: Mapping[str, Any]) -> Embedding:
    """The embedding that the attributes of a file describe, ours or those of other tools.

    These give a magnification in place of ``mpp``: 10 divided by it is what it means.
    """
    mpp = _to_number(attributes.get("mpp"))
    magnification = _to_number(attributes.get("target_magnification"))
    if mpp is None and magnification:
        mpp = 10.0 / magnification
    sizes = (_to_number(attributes.get(name)) for name in ("patch_size", "overlap"))
    side, overlap = (None if size is None else round(size) for size in sizes)
    encoder, weights, network = (_to_text(attributes.get(name)) for name in ("encoder", "model_hash", "network"))
    return Embedding(encoder, weights, mpp, side, overlap, network)


def _to_number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _to_text(value: Any) -> str | None:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return str(text) if text is not None and str(text) else None


def _equal(a: Any, b: Any) -> bool:
    return bool(abs(a - b) <= 1e-6 * abs(b)) if isinstance(a, float) and isinstance(b, float) else a == b


# ---------------------------------------------------------------- files among each other


def common_embedding(named: Sequence[tuple[str, str, Embedding]], where: str = "") -> Embedding:
    """The embedding that all files share; ``named``: slide, URI and embedding of each. InputError naming the first two
    files that differ, and in what."""
    slide, uri, first = named[0]
    for other, place, found in named[1:]:
        check_alike((other, place, found), (slide, uri, first), where)
    return first


def check_alike(one: tuple[str, str, Embedding], other: tuple[str, str, Embedding], where: str = "") -> None:
    """InputError naming both files, (slide, URI, embedding), when their vectors were not made alike."""
    (slide, uri, found), (first, place, wanted) = one, other
    if difference := found.first_difference(wanted):
        name, mine, theirs = difference
        files = f"({store.redact(uri)}, {store.redact(place)})"
        raise InputError(
            f"{where}{slide} was embedded with {name} {mine}, {first} with {theirs} {files}: embed them alike"
        )


# ---------------------------------------------------------------- files and the model that learns from them


def check_source(
    found: Embedding, file: str, where: str, *, card: ModelCard, start: str | None, weights: str | None, foreign: bool
) -> None:
    """ConfigError unless vectors are those that the model of ``card`` itself makes of slides: of the encoder, mpp, tile
    size and overlap that it declares.

    ``start``: model folder that its weights come from; ``weights`` of the bare encoder otherwise. ``foreign``: vectors
    of a file that does not say what it holds are taken for the encoder's; what it does say is compared all the same.
    """
    text = f"{where}: {store.redact(file)}"
    if found.missing and not foreign:
        raise ConfigError(
            f"{text} does not say its {found.missing}, as files of other tools do not: set foreign = true if its "
            f"vectors are those of the model's encoder, at {card.mpp:g} mpp in tiles of {card.tile_size} px"
        )
    if start is None and weights == "random":
        raise ConfigError(
            f"{text} cannot hold vectors of this model, whose encoder is random: give model.start, the model that made "
            "them, or model.encoder with its weights"
        )
    if found.model_hash is not None:
        _check_weights(found, text, card=card, start=start, weights=weights)
    for name, value, wanted, key in (
        ("mpp", found.mpp, card.mpp, "mpp"), ("patch_size", found.tile_size, card.tile_size, "tile_size"),
        ("overlap", found.overlap, card.overlap, "overlap"),
    ):  # fmt: skip
        if value is not None and not _equal(value, wanted):
            fix = f"set model.{key} = {value:g}, with which a run then reads slides, or embed again"
            raise ConfigError(f"{text} was embedded with {name} {value:g}, model.{key} is {wanted:g}: {fix}")


def _check_weights(found: Embedding, text: str, *, card: ModelCard, start: str | None, weights: str | None) -> None:
    name = start or card.encoder.name
    source = read_card(start) if start else bare_card(source_encoder(name, weights, found.network).recipe)
    before = source.data.get(FEATURES)  # those that the heads of ``start`` learnt from: its encoder made them, too
    identity = source_identity(name, weights, None if start else found.network)
    hashes = {identity, before.get("model_hash") if isinstance(before, dict) else None}
    if found.model_hash not in hashes:
        made = f"was embedded by '{found.encoder}' (model_hash {str(found.model_hash)[:12]})"
        raise ConfigError(
            f"{text} {made}, not by '{name}' ({identity[:12]}), of which the model's encoder is: "
            "give the model that made the vectors as model.start, or embed the slides with this one"
        )
    mine, theirs = (_vector_facts(one) for one in (card, source))
    for key in mine:
        if mine[key] != theirs.get(key):
            raise ConfigError(
                f"{text} was embedded with {key} {theirs.get(key)}, the model's is {mine[key]}: set model.{key} so"
            )


def _vector_facts(card: ModelCard) -> dict[str, Any]:
    facts = card.model_dump(mode="json", include=_VECTOR_PARTS)
    encoder = {key: value for key, value in facts.pop("encoder").items() if key != "norm"}
    return facts | {f"encoder.{key}": value for key, value in encoder.items()}


def source_identity(name: str, weights: str | None, network: str | None = None) -> str:
    """The ``model_hash`` that `wsi-mmm embed` writes for an encoder: a model folder, or a bare one with its weights."""
    return model_identity(name, read_card(name)) if is_model(name) else source_encoder(name, weights, network).identity


def source_encoder(name: str, weights: str | None, network: str | None = None) -> ChosenEncoder:
    """The bare encoder that made vectors, with the ``weights`` that its user names now; ``network``: as their file says
    it works, None: as its name says."""
    if network is None:
        return choose_encoder(name, weights)
    recipe = parse_recipe(network, "the encoder of the features")
    return hash_encoder(unread_encoder(recipe, locate_weights(recipe, weights), weights))
