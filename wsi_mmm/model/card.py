"""The model card: everything about a model but its weights. JSON, checked by pydantic; no torch here.

A model is a folder with ``card.json`` and ``model.safetensors``. "default" names the one that comes with the package.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from wsi_mmm.errors import ModelError
from wsi_mmm.model.bounds import (
    MAX_CARD_BYTES,
    MAX_CLASSES,
    MAX_LAYERS,
    MAX_TASKS,
    MAX_WIDTH,
    check_arguments,
)
from wsi_mmm.model.recipe import Interpolation, Pooling

FORMAT = "wsi-mmm-model/1"
CARD = "card.json"
WEIGHTS = "model.safetensors"
SCRIPT = "torchscript_model.pt"  # of the WSInfer zoo, see `model.wsinfer`
_ZOO = Path(__file__).parent / "zoo"

Color = tuple[int, int, int]
HeadKind = Literal["map", "vector", "bag", "dense", "image", "pixels"]

_LATER = frozenset(
    {"squeezer", "neck", "bag", "kind", "norm", "default_tasks"}
    | {"pooling", "registers", "input_px", "interpolation", "key_map", "package"}
)
"""Fields that the first cards did not have; see `_Part`."""


def _check_args(args: dict[str, Any]) -> dict[str, Any]:
    check_arguments(args)
    return args


class _CardPart(BaseModel):
    """Later fields are left out while they hold their default: old cards, and hashes made from them, stay the same."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_serializer(mode="wrap")
    def _drop_later_defaults(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        raw: dict[str, Any] = written(self)
        later = {name for name in raw if name in _LATER and not fields[name].is_required()}
        return {k: v for k, v in raw.items() if k not in later or getattr(self, k) != fields[k].default}


class TaskCard(_CardPart):
    """One task. ``head`` and ``outputs`` say which head holds its weights and how many logits that gives;
    ``params`` are numbers that its kind understands (thresholds, background class).

    Heads: "map" reads the decoder's map, "vector" the pooled vector of a tile, "bag" the vector that the aggregator
    makes of many tiles, "dense" the detection neck's map of stride 4, "image" draws px from the decoder's map.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    kind: str
    head: HeadKind
    outputs: int = Field(ge=1, le=MAX_CLASSES)
    classes: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    colors: tuple[Color, ...]
    params: dict[str, int | Annotated[float, Field(allow_inf_nan=False)]] = {}

    @model_validator(mode="after")
    def _one_color_each(self) -> TaskCard:
        if len(self.colors) != len(self.classes):
            raise ValueError(f"task '{self.name}' needs one color per class")
        if not all(0 <= v <= 255 for color in self.colors for v in color):
            raise ValueError(f"task '{self.name}' has a color outside 0..255")
        return self


class EncoderCard(_CardPart):
    """A timm model name and the arguments it is created with.

    ``norm``: batch norms learn their statistics in training ("train"), or keep those that came with the weights
    ("frozen"; gains and biases still learn). Which norms a backbone has is never changed.

    ``pooling``: how the network's last tokens or map become the vector of a tile, see `EncoderRecipe`, as are
    ``registers``, ``input_px``, ``interpolation`` and ``key_map``. "squeezer", as all first cards: `SqueezerCard` pools
    the coarsest map, before the network's last norm; the network is then as timm's ``features_only`` makes it.
    ``package``: that of the plug-in whose code is the network, "": it is timm's.
    """

    name: str = Field(min_length=1)
    args: Annotated[dict[str, Any], AfterValidator(_check_args)] = {}
    norm: Literal["train", "frozen"] = "train"
    pooling: Pooling | Literal["squeezer"] = "squeezer"
    registers: int | None = Field(default=None, ge=0)
    input_px: int = Field(default=0, ge=0, le=4096)
    interpolation: Interpolation = "bicubic"
    key_map: str = ""
    package: str = ""

    @property
    def own_pooling(self) -> Pooling | None:
        """The pooling that is the network's own; None: the squeezer pools."""
        return None if self.pooling == "squeezer" else self.pooling


class SqueezerCard(_CardPart):
    """How the coarsest map becomes a vector: mean, max, generalised mean (its power learns), or attention."""

    kind: Literal["mean", "max", "gem", "attention"] = "mean"
    heads: int = Field(default=4, ge=1, le=MAX_LAYERS)


class DecoderCard(_CardPart):
    """``bottleneck``: channels after squeezing (0: none). ``widths``: decoder channels per stride, finest first.

    ``kind``: see `model.blocks`; "fpn" wants all ``widths`` the same.
    """

    bottleneck: int = Field(default=128, ge=0, le=MAX_WIDTH)
    widths: tuple[Annotated[int, Field(ge=1, le=MAX_WIDTH)], ...] = Field(default=(32, 48, 64, 96), max_length=16)
    kind: Literal["unet", "fpn"] = "unet"


class NeckCard(_CardPart):
    """Channels of the map of stride 4 that dense heads read."""

    width: int = Field(default=64, ge=1, le=MAX_WIDTH)


class BagCard(_CardPart):
    """How tiles become one vector (`model.aggregator`). ``width``: its channels, 0: those of the tiles' vectors.

    ``hidden``: channels of the attention's inside; ``heads``: attentions side by side, each for its share of the
    channels; ``layers``: blocks of the transformer.
    """

    kind: Literal["mean", "gated", "transformer"] = "gated"
    width: int = Field(default=256, ge=0, le=MAX_WIDTH)
    hidden: int = Field(default=128, ge=1, le=MAX_WIDTH)
    heads: int = Field(default=1, ge=1, le=MAX_LAYERS)
    layers: int = Field(default=2, ge=1, le=MAX_LAYERS)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class ModelCard(_CardPart):
    """See the module text. ``tile_size`` and ``overlap`` are target px at ``mpp``; mean/std are of RGB in [0, 1].
    ``default_tasks``: those that a run answers when it names none (none listed: all)."""

    format: Literal["wsi-mmm-model/1"] = "wsi-mmm-model/1"
    name: str
    encoder: EncoderCard
    squeezer: SqueezerCard = SqueezerCard()
    decoder: DecoderCard = DecoderCard()
    neck: NeckCard = NeckCard()
    bag: BagCard = BagCard()
    mpp: float = Field(gt=0, allow_inf_nan=False)
    tile_size: int = Field(gt=0, le=MAX_WIDTH)
    overlap: int = Field(ge=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tasks: tuple[TaskCard, ...] = Field(default=(), max_length=MAX_TASKS)
    default_tasks: tuple[str, ...] = ()
    data: dict[str, Any] = {}
    licence: str = ""
    metrics: dict[str, Any] = {}
    limits: str = ""
    weights_sha256: str = ""

    @model_validator(mode="after")
    def _check_card(self) -> ModelCard:
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError("mean and std must be finite numbers, and std positive")
        if self.overlap * 2 > self.tile_size:
            raise ValueError("overlap must be at most half of tile_size")
        if len({task.name for task in self.tasks}) != len(self.tasks):
            raise ValueError("two tasks have one name")
        if not {*self.default_tasks} <= {task.name for task in self.tasks}:
            raise ValueError("default_tasks names a task that the model does not have")
        if self.encoder.pooling != "squeezer" and self.squeezer.kind != "mean":
            raise ValueError(f"the encoder pools by '{self.encoder.pooling}': leave the squeezer out")
        if self.encoder.input_px and any(task.head not in ("vector", "bag") for task in self.tasks):
            raise ValueError("tiles that are resized to encoder.input_px have no maps: use heads vector and bag only")
        return self

    def task(self, name: str) -> TaskCard:
        """The task called ``name``. ModelError naming those there are."""
        for task in self.tasks:
            if task.name == name:
                return task
        known = ", ".join(task.name for task in self.tasks) or "none"
        raise ModelError(f"model '{self.name}' has no task '{name}'; it has: {known}")


def zoo_names() -> tuple[str, ...]:
    """Models that come with the package."""
    return tuple(sorted(p.parent.name for p in _ZOO.glob(f"*/{CARD}")))


def model_path(name_or_path: str | Path) -> Path:
    """The folder of a packaged model, or the given folder. ModelError if it holds no card."""
    packaged = _ZOO / str(name_or_path)
    if str(name_or_path) in zoo_names():
        return packaged
    path = Path(name_or_path).expanduser()
    if not (path / CARD).is_file() and (path / SCRIPT).is_file():
        raise ModelError(f"{name_or_path} holds TorchScript, which is code: wsi-mmm run -m alone can use it")
    if not (path / CARD).is_file():
        raise ModelError(
            f"no model '{name_or_path}': give a folder with {CARD} and {WEIGHTS}, or one of: {', '.join(zoo_names())}"
        )
    return path


def read_card(name_or_path: str | Path) -> ModelCard:
    """The card of a model, checked. ModelError if it is missing, no JSON, of another format or incomplete."""
    path = model_path(name_or_path) / CARD
    try:
        if (size := path.stat().st_size) > MAX_CARD_BYTES:
            raise ModelError(f"the model card {path} has {size:,} bytes, more than {MAX_CARD_BYTES:,}: take another")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ModelError(f"the model card {path} cannot be read as JSON: {error}") from error
    return parse_card(raw, str(path))


def parse_card(raw: Any, source: str = "card") -> ModelCard:
    """Check a card that was read from JSON. ModelError names the first thing wrong with it."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ModelError(f"{source} is of format '{found}', not '{FORMAT}'; this version cannot read it")
    try:
        return ModelCard.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "card"
        raise ModelError(f"{source} is not a valid model card: {where}: {first['msg']}") from error


def card_json(card: ModelCard) -> str:
    """The card as the text of ``card.json``."""
    return json.dumps(card.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
