"""PORT Task: a head, the targets and the loss it is trained with, and how its quantised output becomes objects.

At inference: logits -> ``quantise`` (the last use of torch) -> maps blended over overlaps -> ``interpret`` (pixel
tasks) or ``table`` (tile and bag tasks). Everything after ``quantise`` is a pure, local function of integers, so that
results do not depend on how the slide was cut into blocks. Outputs of tile and bag tasks are never blended; they may
be float32, which depends on the blocks as little as the features do, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy.typing as npt

from wsi_mmm.errors import ModelError
from wsi_mmm.tasks.window import View
from wsi_mmm.types import U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec

AnyTarget = Any
"""A `tasks.targets.Target` of the task's own kind."""

Scope = Literal["pixel", "tile", "bag"]
Params = Mapping[str, float]
"""Parameters of a task's card: named numbers. ``<name>:<class>`` is the parameter of one class."""

Quantised = npt.NDArray[Any]
"""The output of `quantise`, of one image or stacked: uint8, of tile and bag tasks maybe float32."""


class Task(Protocol):
    """A kind of task; `wsi_mmm.tasks.TASK_KINDS` lists them. Cells beyond the slide count as zeros."""

    heads: ClassVar[Mapping[Scope, str]]
    """The kind of head (`model.heads`) for each scope that the task can have."""

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task with the parameters of its card, for one of the scopes in ``heads``.

        ModelError for a value that cannot be, TypeError naming an unknown parameter.
        """

    @property
    def info(self) -> TaskInfo:
        """Name, kind, classes, colors."""

    @property
    def scope(self) -> Scope:
        """The unit it predicts for: a pixel, a tile or a bag of tiles (a slide)."""

    @property
    def stride(self) -> int:
        """Target px per map px."""

    @property
    def channels(self) -> int:
        """Channels after `quantise`."""

    @property
    def halo(self) -> int:
        """Target px of context round a core that make its interpretation exact."""

    def head(self, spec: HeadSpec) -> nn.Module:
        """The module that turns the decoder's map (pixel) or the vector (tile, bag) into this task's logits."""

    def target(self, value: AnyTarget) -> Tensor:
        """The target of one image or bag (see `tasks.targets`) as the tensor that `loss` takes; targets stack."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar; about 1 for random predictions, so that tasks add up fairly."""

    def quantise(self, logits: Tensor) -> Tensor:
        """Logits float[n, K, ...] -> uint8[n, channels, ...]; tile and bag tasks may give float32."""

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """Metrics over images: pairs of target and quantised output."""

    def interpret(self, window: U8, view: View) -> Objects:
        """Pixel tasks: blended uint8[channels, h, w] -> the objects that the view's core owns, sorted by anchor."""

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """Tile and bag tasks: quantised [n, channels] -> columns for the tiles or the slides table. An integer column
        holds class indices (-1: none), the others float32."""


# ---------------------------------------------------------------- methods that several kinds share


def head_of_scope(self: Task, spec: HeadSpec) -> nn.Module:
    """Logits of as many channels as the task has, from the head that the kind names for its scope."""
    from wsi_mmm.model.heads import build_head

    return build_head(self.heads[self.scope], spec, self.channels)


def draws_nothing(self: Task, window: U8, view: View) -> Objects:
    """Tile tasks draw no objects."""
    raise TypeError(f"task '{self.info.name}' answers per {self.scope}; use table()")


def has_no_table(self: Task, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
    """Pixel tasks have no tile table."""
    return {}


# ---------------------------------------------------------------- parameters of a card


def check_names(params: Params, known: Iterable[str]) -> None:
    """TypeError, which `make_task` explains, naming the first parameter that is not in ``known``."""
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise TypeError(f"'{unknown[0]}'")


def number_within(info: TaskInfo, params: Params, name: str, default: float, span: tuple[float, float]) -> float:
    """The parameter ``name``; ModelError if it lies outside ``span``, both ends allowed."""
    value = float(params.get(name, default))
    if not span[0] <= value <= span[1]:
        raise ModelError(f"task '{info.name}': '{name}' is {value:g}: give a number from {span[0]:g} to {span[1]:g}")
    return value


def smoothing_share(info: TaskInfo, params: Params, default: float) -> float:
    """``smoothing`` of a task whose other parameters are weights of classes; ModelError if it is not in [0, 1)."""
    check_names(params, ("smoothing", *class_names("weight", info)))
    value = float(params.get("smoothing", default))
    if not 0 <= value < 1:
        raise ModelError(f"task '{info.name}': 'smoothing' is {value:g}: give a share from 0 to below 1")
    return value


def class_weights(info: TaskInfo, params: Params) -> tuple[float, ...] | None:
    """``weight:<class>`` of every class (1 by default), None if the card has none. ModelError for one below 0."""
    if not set(params) & set(class_names("weight", info)):
        return None
    weights = per_class(info, params, "weight", 1.0)
    if min(weights) < 0:
        raise ModelError(f"task '{info.name}': a weight is below 0")
    return weights


def per_class(info: TaskInfo, params: Params, name: str, default: float) -> tuple[float, ...]:
    """``<name>:<class>`` of every class, else ``name``, else ``default``."""
    common = params.get(name, default)
    return tuple(float(params.get(key, common)) for key in class_names(name, info))


def class_names(name: str, info: TaskInfo) -> list[str]:
    """The names ``<name>:<class>``, in the order of the classes."""
    return [f"{name}:{one}" for one in info.classes]
