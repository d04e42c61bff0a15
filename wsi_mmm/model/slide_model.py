"""Slide models: they make one vector of a slide from the vectors of its tiles. Chosen and checked without torch.

"mean"; a model folder of ours whose card has a bag head; or the attention MIL (ABMIL) of another tool: a safetensors
file, or the folder of one, whose tensors have the names of `ABMIL_MAPS`. Feather, over CONCH v1.5, UNI2-h or UNI, has
those of MIL-Lab.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import WEIGHTS, ModelCard, model_path, read_card
from wsi_mmm.model.fetch import fetch_model
from wsi_mmm.model.find_weights import choose_file, download_weights, find_weights, local_places
from wsi_mmm.model.identity import check_weights, is_model, model_identity
from wsi_mmm.model.recipe import EncoderRecipe
from wsi_mmm.model.weights_config import HUB, split_source
from wsi_mmm.model.weights_file import list_tensors, refuse_foreign
from wsi_mmm.storage import store
from wsi_mmm.types import F32

MEAN, BAG = "mean", "bag"
_LEARNT = "features"  # key of a card's ``data``: how the vectors were made that its bag heads learnt from
_MOST_README = 1 << 20

NamedShapes = Mapping[str, tuple[int, ...]]

ABMIL_MAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "MIL-Lab": (
        (r"patch_embed\.(\d+)\.", r"embed.\1."),
        (r"global_attn\.attention_a\.0\.", "value."),
        (r"global_attn\.attention_b\.0\.", "gate."),
        (r"global_attn\.attention_c\.", "out."),
        (r"global_attn\.module\.0\.", "value."),
        (r"global_attn\.module\.3\.", "out."),
        (r"classifier\.", ""),
    ),
    "CLAM": (
        (r"attention_net\.0\.", "embed.0."),
        (r"attention_net\.[23]\.attention_a\.0\.", "value."),
        (r"attention_net\.[23]\.attention_b\.0\.", "gate."),
        (r"attention_net\.[23]\.attention_c\.", "out."),
        (r"attention_net\.[23]\.module\.0\.", "value."),
        (r"attention_net\.[23]\.module\.[23]\.", "out."),
        (r"(classifiers|instance_classifiers)(\.\d+)?\.", ""),
    ),
}
"""By tool: pairs of (their part of a tensor's name, ours); the empty name: a classifier, which is left out. Ours:
``embed.N`` linear layers, each with a ReLU behind it; ``out`` (tanh ``value`` * sigmoid ``gate``), a score per
head; without ``gate``, ``out`` (tanh ``value``). Sources: MIL-Lab src/models/abmil.py and layers.py; CLAM
models/model_clam.py; TRIDENT slide_encoder_models/load.py takes ``forward_features`` of Feather as its vector."""

_WRAPPERS = ("module.", "model.")


@dataclass(frozen=True, slots=True)
class SlideModel:
    """``kind``: "mean", "bag", or the tool of `ABMIL_MAPS` whose names an ABMIL has. ``place``: where it lies, a path
    or URI; ``identity``: of its weights and all else that its vectors depend on; ``inputs``: numbers in a tile's vector
    (0: any). ``licence``: as its card or the README beside it says; empty: they do not."""

    kind: str = MEAN
    name: str = MEAN
    place: str = ""
    identity: str = MEAN
    inputs: int = 0
    licence: str = ""

    @property
    def foreign(self) -> bool:
        """The file does not say which encoder it learnt from."""
        return self.kind in ABMIL_MAPS

    def attributes(self) -> dict[str, str]:
        """Return the attributes of its vectors."""
        facts = {"slide_encoder": self.name, "slide_kind": self.kind, "slide_hash": self.identity}
        return facts | ({"slide_licence": self.licence} if self.licence else {})

    def check_width(self, width: int, encoder: str) -> None:
        """ModelError unless it takes vectors of ``width`` numbers, which ``encoder`` gives (0: not known)."""
        if width and self.inputs and width != self.inputs:
            raise ModelError(
                f"the slide model {self.name} takes tile vectors of {self.inputs} numbers, {encoder} gives {width}: "
                "embed with the encoder that it learnt from"
            )

    def describe_licence(self) -> tuple[str, bool]:
        """Return a line about its licence, empty where none is known, and whether that forbids commercial use."""
        closed = "nc" in re.split(r"[^a-z0-9]+", self.licence.lower())
        words = " (no commercial use)" if closed else ""
        return (f"slide model {self.name}: licence {self.licence}{words}" if self.licence else ""), closed

    def describe_source(self, encoder: str) -> str:
        """Return a line about what is taken for granted of an ABMIL of another tool; empty for others."""
        if not self.foreign:
            return ""
        return (
            f"slide model {self.name}: an ABMIL in the names of {self.kind}, which does not say the encoder that it "
            f"learnt from: {encoder} is taken for it, whose vectors have {self.inputs} numbers, too"
        )


@dataclass(frozen=True, slots=True)
class TileVectors:
    """How the vectors are made that a slide model is given: ``identity`` of the encoder, ``width`` of a vector (0: not
    known yet), tiles of ``tile`` px at ``mpp`` that share ``overlap`` px."""

    encoder: str
    identity: str
    width: int
    mpp: float
    tile: int
    overlap: int


def choose_slide_model(asked: str, cache: str | None, vectors: TileVectors) -> SlideModel:
    """The slide model that ``asked`` names, if it fits: "mean", a folder, a file, a model's URI, ``hf-hub:ORG/NAME``.

    ModelError naming the fix: none is there, no bag head, a pickle, tensors of no ABMIL that is known, made for other
    ``vectors``.
    """
    if asked == MEAN:
        return SlideModel()
    source, hub_id = split_source(asked)
    if source != HUB and is_model(here := fetch_model(asked, cache)):
        return _choose_bag_model(asked, here, vectors)
    path = locate_abmil(asked, cache)
    name = hub_id.partition("@")[0].rpartition("/")[2] if source == HUB else Path(asked).name.removesuffix(path.suffix)
    kind, names = known_names(read_shapes(path), str(path))
    found = SlideModel(
        kind, name, asked, abmil_identity(kind, check_weights(path)),
        check_shapes({ours: shape for ours, (_, shape) in names.items()}, str(path)), _read_licence(path.parent),
    )  # fmt: skip
    found.check_width(vectors.width, vectors.encoder)
    return found


def locate_abmil(place: str, cache: str | None) -> Path:
    """The safetensors file of an ABMIL: itself, in a folder, or of a repository of the hub (``hf-hub:ORG/NAME``), which
    is found where the weights of encoders are. ModelError naming the fix."""
    source, hub_id = split_source(place)
    if source == HUB:
        recipe, places = EncoderRecipe(name=place, architecture="abmil", hub_id=hub_id), local_places()
        return (find_weights(recipe, None, places) or download_weights(recipe, places)).path
    here = Path(fetch_model(place, cache))
    if not here.exists():
        raise ModelError(
            f"there is no slide model {store.redact(place)}: give mean, the folder of a bag model (with card.json), or "
            "an ABMIL: its .safetensors file, the folder of that, or hf-hub:ORG/NAME"
        )
    return choose_file(here, option="--slide")


def mean_vector(blocks: Iterable[F32]) -> F32:
    """The mean float32[D] of vectors float32[n, D] that come in blocks, summed in float64 in their sequence."""
    total, count = None, 0
    for block in blocks:
        part = block.sum(axis=0, dtype=np.float64)
        total = part if total is None else total + part
        count += len(block)
    if total is None or not count:
        raise ModelError("a slide without tiles has no vector")
    return np.asarray(total / count, np.float32)


# ---------------------------------------------------------------- bag models of ours


def _choose_bag_model(asked: str, here: str, vectors: TileVectors) -> SlideModel:
    card, shown = read_card(here), store.redact(asked)
    if not any(task.head == "bag" for task in card.tasks):
        raise ModelError(f"the model {shown} has no task with a bag head: --slide wants a bag model, or mean")
    path = model_path(here) / WEIGHTS
    check_weights(path, card.weights_sha256)
    identity = model_identity(here, card)
    _check_embedding(card, shown, identity, vectors)
    shapes = {key.removeprefix("grouper."): shape for key, shape in read_shapes(path).items()}
    first = next((shapes[key] for key in ("embed.0.weight", "score.value.weight") if key in shapes), (0,))
    found = SlideModel(BAG, card.name, asked, identity, first[-1], card.licence)
    found.check_width(vectors.width, vectors.encoder)
    return found


def _check_embedding(card: ModelCard, shown: str, identity: str, vectors: TileVectors) -> None:
    """ModelError unless ``vectors`` are those that the bag model learnt from, or those of its own encoder."""
    learnt = card.data.get(_LEARNT)
    said: Mapping[str, Any] = learnt if isinstance(learnt, dict) else {}
    if vectors.identity not in (identity, said.get("model_hash")):
        made = f"of '{said['encoder']}'" if said.get("encoder") else "of its own encoder"
        raise ModelError(
            f"the bag model {shown} learnt from vectors {made}, not of '{vectors.encoder}': give --encoder {shown}, "
            "or a bag model that learnt from these"
        )
    if (vectors.mpp, vectors.tile, vectors.overlap) != (card.mpp, card.tile_size, card.overlap):
        raise ModelError(
            f"the bag model {shown} learnt from tiles of {card.tile_size} px at {card.mpp:g} mpp that share "
            f"{card.overlap} px: give --mpp {card.mpp:g} --tile-size {card.tile_size} --overlap {card.overlap}"
        )


# ---------------------------------------------------------------- ABMIL of other tools


def abmil_identity(kind: str, sha256: str) -> str:
    """sha256 hex of an ABMIL: how its names are read, and the bytes of its weights."""
    return hashlib.sha256(json.dumps([kind, sha256]).encode()).hexdigest()


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file; no tensor is read. ModelError: a pickle, damaged, none."""
    refuse_foreign(path)
    return {key: shape for key, (_, shape) in list_tensors(path).items()}


def known_names(shapes: NamedShapes, source: str) -> tuple[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """The tool whose names the tensors have, and by our name of each: theirs, and its shape; classifiers left out.

    ModelError naming ``source`` and the first tensor that has no place in an ABMIL.
    """
    tool = max(ABMIL_MAPS, key=lambda name: sum(_our_name(key, name) is not None for key in shapes))
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for theirs, shape in shapes.items():
        ours = _our_name(theirs, tool)
        if ours is None or ours in found:
            raise ModelError(
                f"{source} holds '{theirs}', which no ABMIL has in the names of {' or '.join(ABMIL_MAPS)}: --slide "
                "takes a bag model of ours (with card.json) or such an ABMIL"
            )
        if ours:
            found[ours] = theirs, shape
    return tool, found


def _strip_wrappers(key: str) -> str:
    while (short := next((key.removeprefix(one) for one in _WRAPPERS if key.startswith(one)), key)) != key:
        key = short
    return key


def _our_name(key: str, tool: str) -> str | None:
    """Our name of a tensor, "" for one of a classifier, None for one that is not known."""
    plain = _strip_wrappers(key)
    for theirs, ours in ABMIL_MAPS[tool]:
        if found := re.fullmatch(rf"{theirs}(?P<kind>weight|bias)", plain):
            return found.expand(ours) + found.group("kind") if ours else ""
    return None


def embedding_layers(names: Iterable[str]) -> list[str]:
    """The layers ``embed.N`` among names of ours, first to last."""
    layers = {name.rpartition(".")[0] for name in names if name.startswith("embed.")}
    return sorted(layers, key=lambda name: int(name.rpartition(".")[2]))


def check_shapes(shapes: NamedShapes, source: str) -> int:
    """The numbers in a tile's vector. ModelError unless tensors in our names are all of an ABMIL and fit together."""
    layers = embedding_layers(shapes)
    gates = ["gate"] if any(name.startswith("gate.") for name in shapes) else []
    for name in (f"{part}.{kind}" for part in (*(layers or ["embed.0"]), "value", *gates, "out") for kind in _KINDS):
        if name not in shapes:
            raise ModelError(f"{source} is no whole ABMIL: it lacks the tensor that we call '{name}'; copy it again")
    inputs = width = shapes[f"{layers[0]}.weight"][-1]
    for part in (*layers, "value", *gates):
        width = _check_layer(part, shapes, width if part in layers else inner_width(shapes), source)
    if gates and shapes["gate.weight"] != shapes["value.weight"]:
        raise ModelError(f"{source} is no ABMIL: its attention branches have different shapes")
    _check_layer("out", shapes, shapes["value.weight"][0], source)
    return inputs


_KINDS = ("weight", "bias")


def inner_width(shapes: NamedShapes) -> int:
    """Numbers in a tile's vector behind the embedding."""
    return shapes[f"{embedding_layers(shapes)[-1]}.weight"][0]


def _check_layer(part: str, shapes: NamedShapes, width: int, source: str) -> int:
    weight, bias = (shapes[f"{part}.{kind}"] for kind in _KINDS)
    if len(weight) != 2 or weight[1] != width or bias != weight[:1] or not all(weight):
        raise ModelError(f"{source} is no ABMIL: '{part}' is {list(weight)} with bias {list(bias)}, not [n, {width}]")
    return weight[0]


def _read_licence(folder: Path) -> str:
    """The licence in the head of README.md, as the hub has it; empty where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        with (folder / "README.md").open(encoding="utf-8") as file:
            text = file.read(_MOST_README)
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        said = dict(re.findall(r"(?m)^(license|license_name):[ \t]*[\"']?([\w.+-]+)", head.group(1))) if head else {}
        name = said.get("license", "")
        return str(said.get("license_name", name) if name == "other" else name)
    return ""
