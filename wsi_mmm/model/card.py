"""The model card: everything about a model but its weights. JSON, checked by pydantic; no torch here.

A model is a folder with ``card.json`` and ``model.safetensors``. "default" names the one that comes with the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsi_mmm.errors import ModelError

FORMAT = "wsi-mmm-model/1"
CARD = "card.json"
WEIGHTS = "model.safetensors"
_ZOO = Path(__file__).parent / "zoo"

Color = tuple[int, int, int]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TaskCard(_Part):
    """One task. ``head`` and ``outputs`` say which head holds its weights and how many logits that gives;
    ``params`` are integers that its kind understands (thresholds, background class)."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    kind: str
    head: Literal["map", "vector"]
    outputs: int = Field(ge=1)
    classes: tuple[str, ...] = Field(min_length=1)
    colors: tuple[Color, ...]
    params: dict[str, int] = {}

    @model_validator(mode="after")
    def _one_color_each(self) -> TaskCard:
        if len(self.colors) != len(self.classes):
            raise ValueError(f"task '{self.name}' needs one color per class")
        if not all(0 <= v <= 255 for color in self.colors for v in color):
            raise ValueError(f"task '{self.name}' has a color outside 0..255")
        return self


class EncoderCard(_Part):
    """A timm model name and the arguments it is created with."""

    name: str = Field(min_length=1)
    args: dict[str, Any] = {}


class DecoderCard(_Part):
    """``bottleneck``: channels after squeezing (0: none). ``widths``: decoder channels per stride, finest first."""

    bottleneck: int = Field(default=128, ge=0)
    widths: tuple[int, ...] = (32, 48, 64, 96)


class ModelCard(_Part):
    """See the module text. ``tile_size`` and ``overlap`` are target px at ``mpp``; mean/std are of RGB in [0, 1]."""

    format: Literal["wsi-mmm-model/1"] = "wsi-mmm-model/1"
    name: str
    encoder: EncoderCard
    decoder: DecoderCard = DecoderCard()
    mpp: float = Field(gt=0, allow_inf_nan=False)
    tile_size: int = Field(gt=0)
    overlap: int = Field(ge=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tasks: tuple[TaskCard, ...] = ()
    data: dict[str, Any] = {}
    licence: str = ""
    metrics: dict[str, Any] = {}
    limits: str = ""
    weights_sha256: str = ""

    @model_validator(mode="after")
    def _sound(self) -> ModelCard:
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.overlap * 2 > self.tile_size:
            raise ValueError("overlap must be at most half of tile_size")
        if len({task.name for task in self.tasks}) != len(self.tasks):
            raise ValueError("two tasks have one name")
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
    if not (path / CARD).is_file():
        raise ModelError(
            f"no model '{name_or_path}': give a folder with {CARD} and {WEIGHTS}, or one of: {', '.join(zoo_names())}"
        )
    return path


def read_card(name_or_path: str | Path) -> ModelCard:
    """The card of a model, checked. ModelError if it is missing, no JSON, of another format or incomplete."""
    path = model_path(name_or_path) / CARD
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
