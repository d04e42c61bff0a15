"""The configuration of a training: typed, checked before anything is read, with a JSON schema for editors."""

from __future__ import annotations

import colorsys
import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from wsi_mmm.errors import ConfigError, OptionError, WsiError
from wsi_mmm.model.card import (
    BagCard,
    Color,
    DecoderCard,
    EncoderCard,
    ModelCard,
    NeckCard,
    SqueezerCard,
    TaskCard,
)
from wsi_mmm.model.choose import RANDOM, bare_card
from wsi_mmm.model.registry import find_entry
from wsi_mmm.tasks import find_kind
from wsi_mmm.tasks.base import Scope
from wsi_mmm.tasks.facts import METRICS, PARAMETERS, find_metric, parameter_names
from wsi_mmm.training.augment import Augment
from wsi_mmm.training.data.base import ConfigTable
from wsi_mmm.training.data.entries import DataEntry
from wsi_mmm.training.optim import OptimPlan
from wsi_mmm.training.policy import Policy
from wsi_mmm.training.strategies import StrategyPlan
from wsi_mmm.training.warp import Change
from wsi_mmm.types import TaskInfo

BAGS = ("bags", "tile-bags")
"""Kinds of data whose items are bags."""


class EncoderPart(EncoderCard):
    """An encoder of timm, or a published one of `wsi-mmm models encoders`. ``weights``: "random", "pretrained" (timm's
    own, of an ``hf-hub:`` id, or the published ones, which are meant if nothing is said), or a .safetensors."""

    weights: str = "random"

    @model_validator(mode="before")
    @classmethod
    def _fill_published(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "weights" not in raw and find_entry(str(raw.get("name"))) is not None:
            return {**raw, "weights": "pretrained"}
        return raw


def _table_of_name(raw: Any) -> Any:
    return {"name": raw} if isinstance(raw, str) else raw


class ModelPart(ConfigTable):
    """The model to train; as in a model card.

    ``crop``: px side of the pictures that it learns from (None: ``tile_size``, which is what `run` cuts).
    ``start``: a model folder (or "default") whose weights, as far as names and shapes agree, are begun with: encoder,
    decoder and heads of the same name. ``mean``, ``std``: None takes those of the encoder's weights. ``repeat``: the
    command by which the card says that the model can be made again, where that is more than `wsi-mmm train`.
    """

    name: str = "model"
    mpp: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    tile_size: int = Field(default=256, gt=0, multiple_of=32)
    overlap: int = Field(default=32, ge=0)
    crop: int | None = Field(default=None, gt=0, multiple_of=32)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    encoder: Annotated[EncoderPart, BeforeValidator(_table_of_name, json_schema_input_type=EncoderPart | str)] = (
        EncoderPart(name="resnet18d")
    )
    squeezer: SqueezerCard = SqueezerCard()
    decoder: DecoderCard = DecoderCard()
    neck: NeckCard = NeckCard()
    bag: BagCard = BagCard()
    start: str | None = None
    licence: str = ""
    limits: str = ""
    repeat: str = ""

    @model_validator(mode="after")
    def _check_within(self) -> ModelPart:
        if self.overlap >= self.tile_size:
            raise ValueError(
                f"overlap is {self.overlap} px of tiles of {self.tile_size}: give less than the tile's side"
            )
        return self

    @property
    def learnt_px(self) -> int:
        """Side of the pictures in training, px."""
        return self.crop or self.tile_size


class TaskPart(ConfigTable):
    """A task. ``scope`` "bag" lets a tile kind answer for a whole slide. ``weight`` of its loss. ``colors``: chosen
    when not given. ``background``, of `segment`: the class that is not drawn ("": all are drawn; none given: the class
    called "background", in any case of letters, where there is one, else all are drawn)."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    kind: str
    classes: tuple[str, ...] = Field(min_length=1)
    colors: tuple[Color, ...] | None = None
    params: dict[str, int | float] = Field(default_factory=dict)
    scope: Literal["tile", "bag"] = "tile"
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    background: str | None = None

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        try:
            find_kind(kind)
        except WsiError as error:
            raise ValueError(str(error)) from error
        return kind


class SplitPart(ConfigTable):
    """How items are shared out: by group (patient or slide), stratified, drawn by ``seed``.

    ``val``, ``test``: shares; the test items are never read in training. ``folds`` > 0: k-fold instead of shares, of
    which ``fold`` is held out (beside ``test``). ``pictures``: before learning, read every picture once and refuse
    equal ones on two sides.
    """

    val: float = Field(default=0.2, ge=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)
    folds: int = Field(default=0, ge=0)
    fold: int = Field(default=0, ge=0)
    seed: int = 0
    pictures: bool = False


class SamplingPart(ConfigTable):
    """How a step draws its data; see `training.policy`. ``fraction`` of the training items, for runs on less data;
    ``fraction_of``: the data sets that it holds for (none named: all). ``mixed``: all pictures of a step go through the
    encoder together, as one micro-batch, so that batch norms see every kind of them; takes more memory."""

    policy: Policy = "balanced"
    temperature: float = Field(default=2.0, gt=0)
    rounds: int = Field(default=1, ge=1)
    class_balance: bool = False
    mixed: bool = False
    fraction: float = Field(default=1.0, gt=0, le=1)
    fraction_of: tuple[str, ...] = ()


class ValidationPart(ConfigTable):
    """``every``: steps (0: only at the end). ``best``: "task.metric" by which the model is chosen: that of the best
    validation ("": that of the last step); ``lower``: the lower the better. ``patience``: validations without a better
    one until training stops (0: never). ``items``: at most so many per data set (0: all), the same ones each time."""

    every: int = Field(default=0, ge=0)
    best: str = ""
    lower: bool = False
    patience: int = Field(default=0, ge=0)
    items: int = Field(default=512, ge=0)


class CheckpointPart(ConfigTable):
    """``every``: steps (0: only at the end); ``keep``: how many besides the best one. ``folder``: a folder or an
    ``s3://`` prefix ("": below ``out``)."""

    every: int = Field(default=500, ge=0)
    keep: int = Field(default=2, ge=1)
    folder: str = ""


class TrackingPart(ConfigTable):
    """Trackers that metrics are sent to. ``wandb`` and ``mlflow``: project or experiment names, which need their
    packages.

    ``images`` True also writes a few augmented training pictures of the first step: to TensorBoard only, which stays on
    this machine.
    """

    tensorboard: bool = True
    wandb: str = ""
    mlflow: str = ""
    images: bool = False


class TrainConfig(ConfigTable):
    """A training. ``out``: folder of the model, of checkpoints and of logs; ``threads``: readers."""

    out: str = Field(default="runs/model", min_length=1)
    seed: int = 0
    steps: int = Field(default=1000, ge=1)
    device: str = "auto"
    threads: int = Field(default=2, ge=0)
    model: ModelPart = ModelPart()
    task: tuple[TaskPart, ...] = Field(min_length=1)
    data: tuple[DataEntry, ...] = Field(min_length=1)
    split: SplitPart = SplitPart()
    sampling: SamplingPart = SamplingPart()
    optim: OptimPlan = OptimPlan()
    strategy: StrategyPlan = StrategyPlan()
    change: Change = Change()
    augment: Augment = Augment()
    not_finite: Literal["error", "skip"] = "error"
    validation: ValidationPart = ValidationPart()
    checkpoint: CheckpointPart = CheckpointPart()
    tracking: TrackingPart = TrackingPart()

    @model_validator(mode="after")
    def _check_parts_agree(self) -> TrainConfig:
        _check_unique("task", [task.name for task in self.task])
        _check_unique("data", [entry.name for entry in self.data])
        known = [task.name for task in self.task]
        for entry in self.data:
            _check_tasks(entry, self.task)
        idle = sorted(set(known) - {name for entry in self.data for name in entry.tasks})
        if idle:
            raise ValueError(f"no data is of task '{idle[0]}': add some, or take the task out")
        best = self.validation.best
        if best:
            self._check_best()
        if self.validation.patience and not best:
            raise ValueError("validation.patience wants a figure to go by: give validation.best")
        sets = [entry.name for entry in self.data]
        for name in self.sampling.fraction_of:
            if name not in sets:
                raise ValueError(f"sampling.fraction_of names '{name}'; data sets are: {', '.join(sets)}")
        return self

    def metric_fault(self, metric: str) -> str:
        """The fault of a "task.metric" that is to be looked at, "" if there is none. What tasks of plug-ins measure is
        not known here."""
        name, _, which = metric.partition(".")
        kinds = {task.name: task.kind for task in self.task}
        if name not in kinds or not which:
            return f"'{metric}': give task.metric; tasks are: {', '.join(kinds)}"
        kind = kinds[name]
        if kind in METRICS and find_metric(kind, which) is None:
            return f"'{metric}': a task of kind '{kind}' gives {', '.join(one.name for one in METRICS[kind])}"
        return ""

    def _check_best(self) -> None:
        best, lower = self.validation.best, self.validation.lower
        if fault := self.metric_fault(best):
            raise ValueError(f"validation.best is {fault}")
        name, _, which = best.partition(".")
        found = next((find_metric(task.kind, which) for task in self.task if task.name == name), None)
        if found is not None and found.lower != lower:
            better, fix = ("lower", "true") if found.lower else ("higher", "false")
            raise ValueError(f"{best} is better the {better} it is: set validation.lower = {fix}")

    def task_cards(self) -> tuple[TaskCard, ...]:
        """The tasks as a model card lists them. ConfigError when one has classes or parameters that do not fit."""
        before = np.cumsum([0, *(len(part.classes) for part in self.task)]).tolist()
        return tuple(task_card(part, first, before[-1]) for part, first in zip(self.task, before, strict=False))


def _check_tasks(entry: DataEntry, tasks: Sequence[TaskPart]) -> None:
    """Check that every task of a data set exists and has the scope of its items: tiles, or bags of tiles."""
    scopes = {task.name: task.scope for task in tasks}
    wanted = "bag" if entry.kind in BAGS else "tile"
    for name in entry.tasks:
        if name not in scopes:
            raise ValueError(f"data '{entry.name}' is of task '{name}'; tasks are: {', '.join(scopes)}")
        if scopes[name] != wanted:
            fix = 'set its scope to "bag"' if wanted == "bag" else f"give it data of kind {' or '.join(BAGS)}"
            raise ValueError(f"data '{entry.name}' holds {wanted}s, task '{name}' is of scope {scopes[name]!r}: {fix}")


def _check_unique(what: str, names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two [[{what}]] are called '{twice[0]}'")


def task_card(part: TaskPart, first: int, count: int) -> TaskCard:
    """``part`` with its head, outputs and colours, as classes ``first`` onwards of ``count`` of all tasks."""
    colors = part.colors or tuple(_default_colour(first + i, count) for i in range(len(part.classes)))
    info = TaskInfo(part.name, part.kind, part.classes, colors)
    kind = find_kind(part.kind)
    if part.scope == "bag" and "bag" not in kind.heads:
        raise ConfigError(f"task '{part.name}': '{part.kind}' answers for pixels, not for bags")
    scope: Scope = part.scope if part.scope in kind.heads else "pixel"
    params = {**part.params, **_background_param(part)}
    try:
        outputs = kind.from_params(info, params, scope).channels
    except TypeError as error:
        known = f": it knows {', '.join(parameter_names(part.kind, part.classes))}" if part.kind in PARAMETERS else ""
        raise ConfigError(
            f"task '{part.name}': params has {error}, which '{part.kind}' does not know{known}"
        ) from error
    return TaskCard.model_validate({
        "name": part.name, "kind": part.kind, "head": kind.heads[scope], "outputs": outputs, "classes": part.classes,
        "colors": colors, "params": params,
    })  # fmt: skip


def _background_param(part: TaskPart) -> dict[str, int]:
    """``background`` of a `segment` card, always explicit: cards without it (older ones) mean the first class."""
    if part.kind != "segment":
        if part.background is not None:
            raise ConfigError(f"task '{part.name}': only 'segment' has a background, not '{part.kind}': leave it out")
        return {}
    if len(part.classes) < 2:
        fix = 'list what is not of it, too, such as "background", or take kind multisegment'
        raise ConfigError(f"task '{part.name}': 'segment' chooses among classes and has only one: {fix}")
    named = part.background
    if named is None and "background" in part.params:
        if part.params["background"] not in range(-1, len(part.classes)):
            raise ConfigError(f"task '{part.name}': params.background: give the number of a class, or -1 to draw all")
        return {}
    if named:
        if named not in part.classes:
            raise ConfigError(f"task '{part.name}': background '{named}' is none of {', '.join(part.classes)}")
        return {"background": part.classes.index(named)}
    usual = [n for n, name in enumerate(part.classes) if named is None and name.casefold() == "background"]
    return {"background": usual[0] if usual else -1}


def _default_colour(number: int, count: int) -> Color:
    """Hues spread over the circle."""
    red, green, blue = colorsys.hsv_to_rgb(number / max(count, 1), 0.75, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def model_card(config: TrainConfig, mean: tuple[float, float, float], std: tuple[float, float, float]) -> ModelCard:
    """The card of the model to be trained; ``mean`` and ``std`` where the configuration leaves them to the encoder."""
    part, tasks = config.model, config.task_cards()
    encoder = _encoder_card(part.encoder, resized=all(task.head in ("vector", "bag") for task in tasks))
    return ModelCard(
        name=part.name, encoder=encoder, squeezer=part.squeezer, decoder=part.decoder, neck=part.neck, bag=part.bag,
        mpp=part.mpp, tile_size=part.tile_size, overlap=part.overlap, mean=part.mean or mean, std=part.std or std,
        tasks=tasks, licence=_licence_text(part), limits=part.limits,
    )  # fmt: skip


def _encoder_card(part: EncoderPart, *, resized: bool) -> EncoderCard:
    """The encoder as a card describes it; a published one as its entry says, but for what the configuration says.
    ``resized``: tiles may be, to the image that it was published for, because no task needs maps."""
    said = part.model_dump(include=part.model_fields_set - {"weights"})
    if (entry := find_entry(part.name)) is not None:
        own = bare_card(entry.recipe).encoder
        kept = {} if resized else {"input_px": 0}
        said = {**own.model_dump(), **kept, **said, "name": own.name, "args": {**own.args, **part.args}}
    return EncoderCard.model_validate(said)


def _licence_text(part: ModelPart) -> str:
    """The licence of the configuration, and that of a published encoder whose weights the model begins with."""
    entry = find_entry(part.encoder.name) if part.encoder.weights != RANDOM else None
    own = f"its encoder {entry.name}: {entry.recipe.licence}" if entry is not None else ""
    return "; ".join(filter(None, (part.licence, own)))


# ---------------------------------------------------------------- from words


def parse(raw: Mapping[str, Any], settings: Sequence[str] = (), source: str = "configuration") -> TrainConfig:
    """A configuration from a parsed file and ``key=value`` settings on top. ConfigError names the first mistake."""
    whole = json.loads(json.dumps(raw, default=str))
    for setting in settings:
        _apply_setting(whole, setting)
    try:
        return TrainConfig.model_validate(whole)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        text = _WORDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        raise ConfigError(": ".join([source, *([where] if where else []), text[0].lower() + text[1:]])) from error


_WORDS = dict.fromkeys(
    ("extra_forbidden", "unexpected_keyword_argument"), "there is no such option; wsi-mmm train --schema lists them"
)


def _apply_setting(whole: dict[str, Any], setting: str) -> None:
    """``a.b=value`` -> whole["a"]["b"] = value; items of lists by their number or their name: ``data.crc.batch=4``."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise OptionError(f"--set {setting}: give key=value, such as optim.rate=1e-3")
    place: Any = whole
    *path, last = key.strip().split(".")
    for name in path:
        place = _step_into(place, name, setting)
    if isinstance(place, list):
        raise OptionError(f"--set {setting}: name a field after the item, such as {key}.batch=4")
    if not isinstance(place, dict):
        raise OptionError(f"--set {setting}: there is nothing below '{'.'.join(path)}'")
    place[last] = _parse_value(text.strip())


def _step_into(place: Any, name: str, setting: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(name, {})
    if isinstance(place, list):
        for number, item in enumerate(place):
            if name == str(number) or (isinstance(item, dict) and item.get("name") == name):
                return item
    raise OptionError(f"--set {setting}: there is no '{name}'")


def _parse_value(text: str) -> Any:
    """A TOML value, or the text as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def json_schema() -> dict[str, Any]:
    """The JSON schema of a training file, for editors."""
    return TrainConfig.model_json_schema()
