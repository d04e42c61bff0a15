"""`detect`: a box round every object, of one class or several, without anchors.

The head says per map px of stride 4 how much it is the centre of an object of each class, and how far the four sides
are, as logarithms. `peaks` turns the bytes into boxes. Boxes larger than the overlap of tiles are seen whole in the
middle of a tile only: choose a coarser mpp for large objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.tasks import peaks
from wsi_mmm.tasks.base import (
    AnyTarget,
    Params,
    Quantised,
    Scope,
    check_names,
    has_no_table,
    head_of_scope,
    number_within,
)
from wsi_mmm.tasks.facts import parameter_names
from wsi_mmm.tasks.metrics import box_metrics
from wsi_mmm.tasks.targets import Boxes
from wsi_mmm.tasks.window import View, check_view
from wsi_mmm.types import F32, F64, U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 0.3
"""Px whose heat is at least this learn the sides of their object, too."""


@dataclass(frozen=True, slots=True)
class Detect:
    """The `detect` task. ``channels``: K classes + 4 sides. ``threshold``: byte of a centre; ``overlap``: intersection
    over union above which one of two boxes goes; ``size``: usual side of an object in target px, for which an
    untrained head guesses right.

    Logits float[n, K + 4, h, w]: centres, then log2 of the distances of left, top, right and bottom in units of half
    ``size``.
    """

    info: TaskInfo
    channels: int
    threshold: int = 90
    overlap: float = 0.4
    size: float = 16.0
    scope: Scope = "pixel"
    stride: int = peaks.STRIDE
    halo: int = peaks.STRIDE * peaks.HALO

    heads: ClassVar[Mapping[Scope, str]] = {"pixel": "dense"}
    head = head_of_scope
    table = has_no_table

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        check_names(params, parameter_names("detect", info.classes))
        return cls(
            info,
            len(info.classes) + 4,
            int(number_within(info, params, "threshold", 90, (1, 255))),
            overlap=number_within(info, params, "overlap", 0.4, (0.05, 1.0)),
            size=number_within(info, params, "size", 16.0, (1.0, 1000.0)),
        )

    def target(self, value: AnyTarget) -> Tensor:
        """`Boxes` -> float32[K + 5, h / 4, w / 4]: heat per class (1 at centres, NaN: unknown), logarithms of the four
        distances, and the weight of those (1 in sum per object)."""
        import torch

        return torch.from_numpy(_make_target(value, self.channels - 4, self.size / 2))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See `detect_loss`: 1 for an untrained head whose guess of the size is off by an octave."""
        from wsi_mmm.tasks.losses_dense import detect_loss

        return detect_loss(logits, target)

    def quantise(self, logits: Tensor) -> Tensor:
        """Probabilities as 0..255; distances as `peaks.OCTAVE` bytes per doubling."""
        import torch

        from wsi_mmm.tasks.losses_dense import PRIOR

        count = self.channels - 4
        chance = torch.sigmoid(logits[:, :count].float() + PRIOR) * 255.0
        sides = (logits[:, count:].float() + float(np.log2(self.size / 2 / peaks.LEAST))) * peaks.OCTAVE
        return torch.cat([chance, sides], dim=1).round().clamp(0.0, 255.0).byte()

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """ap50 (mean over classes), and f1, precision and recall of what the threshold lets through, at IoU 0.5."""
        scenes = [(value, peaks.boxes_of(maps, (0, 0), threshold=13, overlap=self.overlap)) for value, maps in pairs]
        return box_metrics(scenes, classes=self.channels - 4, threshold=self.threshold)

    def interpret(self, window: U8, view: View) -> Objects:
        """Rectangles whose centre px lies in the core, cut at the slide's edge, with their ``probability``."""
        check_view(window, view, self.stride)
        corner = (view.y0 // self.stride, view.x0 // self.stride)
        found = peaks.boxes_of(window, corner, threshold=self.threshold, overlap=self.overlap)
        (y0, x0, y1, x1), (y, x) = view.core, found.anchor.T
        found = found.where((y >= y0) & (y < min(y1, view.height)) & (x >= x0) & (x < min(x1, view.width)))
        corners = np.clip(found.xyxy, 0.0, (view.width, view.height) * 2) * ((view.scale_x, view.scale_y) * 2)
        count = len(corners)
        return Objects(
            self.info.name,
            corners[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2),
            np.arange(0, 4 * count + 1, 4),
            np.arange(count + 1),
            found.kind,
            found.anchor,
            {"probability": found.score / 255.0},
        )


def _make_target(value: Boxes, classes: int, unit: float) -> F32:
    """See `Detect.target`. Small boxes are drawn last: where objects lie on each other the smaller one is learnt.

    ValueError for a class that the task does not have.
    """
    if len(value.labels) and int(value.labels.max()) >= classes:
        raise ValueError(f"a box has class {int(value.labels.max())}, the task has {classes} classes")
    height, width = value.height // peaks.STRIDE, value.width // peaks.STRIDE
    out = np.zeros((classes + 5, height, width), np.float32)
    owner = np.full((height, width), -1)
    xyxy = value.xyxy.astype(np.float64)
    for x0, y0, x1, y1 in xyxy[value.labels < 0] / peaks.STRIDE - 0.5:
        out[:classes, _first_pixel(y0) : _first_pixel(y1), _first_pixel(x0) : _first_pixel(x1)] = np.nan
    by_size = np.argsort(-peaks.area(xyxy), kind="stable")
    for number in by_size[value.labels[by_size] >= 0].tolist():
        _draw_object(out[value.labels[number]], owner, xyxy[number], number)
    _fill_sides(out[classes:], owner, xyxy, unit)
    return out


def _first_pixel(edge: float) -> int:
    """First map px whose middle lies at or beyond ``edge``, given in map px less a half."""
    return max(0, int(np.ceil(edge)))


def _draw_object(heat: F32, owner: npt.NDArray[np.int64], box: F64, number: int) -> None:
    """Add an object's hill to its class's heat, and its number to the px that learn its sides."""
    rows, row = _centre_profile(box[1], box[3], heat.shape[0])
    columns, column = _centre_profile(box[0], box[2], heat.shape[1])
    hill = np.multiply.outer(row, column).astype(np.float32)
    area = heat[rows, columns]
    known = ~np.isnan(area)
    area[known] = np.maximum(area[known], hill[known])
    area[hill == 1.0] = 1.0  # the centre is known, also inside an unknown area
    owner[rows, columns][hill >= NEAR] = number


def _centre_profile(low: float, high: float, size: int) -> tuple[slice, F64]:
    """Map px along one side and the hill there: exactly 1 at the px that holds the middle, a bell beside it."""
    middle = min(max(int((low + high) / 2 // peaks.STRIDE), 0), size - 1)
    sigma = max((high - low) / peaks.STRIDE / 6.0, 0.4)
    reach = int(3 * sigma) + 1
    first, last = max(0, middle - reach), min(size, middle + reach + 1)
    return slice(first, last), np.exp(-0.5 * ((np.arange(first, last) - middle) / sigma) ** 2)


def _fill_sides(out: F32, owner: npt.NDArray[np.int64], xyxy: F64, unit: float) -> None:
    """Fill logarithms of distances and weights float32[5, h, w] for the px that have an owner."""
    y, x = np.nonzero(owner >= 0)
    number = owner[y, x]
    middle_y, middle_x = (y + 0.5) * peaks.STRIDE, (x + 0.5) * peaks.STRIDE
    x0, y0, x1, y1 = xyxy[number].T
    sides = np.stack([middle_x - x0, middle_y - y0, x1 - middle_x, y1 - middle_y])
    out[:4, y, x] = np.log2(np.maximum(sides, peaks.LEAST) / unit)
    out[4, y, x] = 1.0 / np.bincount(number)[number]
