"""PORT Task: a head, the targets and the loss it is trained with, and how its quantised output becomes objects.

At inference: logits -> ``quantise`` (the last use of torch) -> maps blended over overlaps -> ``interpret`` (pixel
tasks) or ``table`` (tile and bag tasks). Everything after ``quantise`` is a pure, local function of integers, so that
results do not depend on how the slide was cut into blocks. Outputs of tile and bag tasks are never blended; they may
be float32, which depends on the blocks as little as the features do, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.tasks.params import Params
from wsi_mmm.types import U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec

AnyTarget = Any
"""A `tasks.targets.Target` of the task's own kind."""

Scope = Literal["pixel", "tile", "bag"]
Quantised = npt.NDArray[Any]
"""The output of `quantise`, of one image or stacked: uint8, of tile and bag tasks maybe float32."""


@dataclass(frozen=True, slots=True)
class View:
    """The position of a window of blended maps on its slide, and the part of it that is interpreted.

    ``y0``, ``x0``: target px of the window's first map px (multiples of the task's stride). ``core``: (y0, x0, y1, x1)
    in target px, half open: objects whose anchor lies in it belong to this view. ``scale_x``, ``scale_y``: level-0 px
    per target px. ``width``, ``height``: size of the slide in target px.
    """

    y0: int
    x0: int
    core: tuple[int, int, int, int]
    scale_x: float
    scale_y: float
    width: int
    height: int


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


def check_view(window: U8, view: View, stride: int) -> None:
    """ValueError if window and view do not lie on the map grid (a mistake of the caller, not of a user)."""
    values = (view.y0, view.x0, *view.core)
    if window.ndim != 3 or window.dtype != np.uint8 or any(v % stride for v in values):
        raise ValueError(f"window must be uint8[C, h, w] and the view on a grid of {stride} target px: {view}")
