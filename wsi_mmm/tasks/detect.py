"""`detect`: a box round every object, of one class or several, without anchors.

The head says per map px of stride 4 how much it is the centre of an object of each class, and how far the four sides
are, as logarithms. `peaks` turns the bytes into boxes. Boxes larger than the overlap of tiles are seen whole in the
middle of a tile only: choose a coarser mpp for large objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.tasks import metrics_boxes, peaks
from wsi_mmm.tasks.base import Answer, Scope, Truth, View, check_view
from wsi_mmm.tasks.truth import Boxes
from wsi_mmm.types import F32, F64, U8, Mask, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec

NEAR = 0.3
"""Px whose heat is at least this learn the sides of their object, too."""


@dataclass(frozen=True, slots=True)
class Detect:
    """The `detect` task. ``channels``: K classes + 4 sides. ``threshold``: byte of a centre; ``overlap``: intersection
    over union above which one of two boxes goes; ``size``: usual side of an object in target px, for which an
    untrained head guesses right."""

    info: TaskInfo
    channels: int
    threshold: int = 90
    overlap: float = 0.4
    size: float = 16.0
    scope: Scope = "pixel"
    stride: int = peaks.STRIDE
    halo: int = peaks.STRIDE * peaks.HALO

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, K + 4, h, w]: centres, then log2 of the distances of left, top, right and bottom in units
        of half ``size``."""
        from wsi_mmm.model.heads import build_head

        return build_head("dense", spec, self.channels)

    def target(self, truth: Truth) -> Tensor:
        """`Boxes` -> float32[K + 5, h / 4, w / 4]: heat per class (1 at centres, NaN: unknown), logarithms of the four
        distances, and the weight of those (1 in sum per object)."""
        import torch

        return torch.from_numpy(_target(truth, self.channels - 4, self.size / 2))

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
        return torch.cat([chance, sides], dim=1).round().clamp(0.0, 255.0).to(torch.uint8)

    def metrics(self, pairs: Iterable[tuple[Truth, Answer]]) -> dict[str, float]:
        """ap50 (mean over classes), and f1, precision and recall of what the threshold lets through, at IoU 0.5."""
        scenes = [(truth, self._boxes(maps, threshold=13)) for truth, maps in pairs]
        return metrics_boxes.figures(scenes, classes=self.channels - 4, threshold=self.threshold)

    def _boxes(self, maps: U8, threshold: int) -> peaks.Found:
        return peaks.boxes_of(maps, (0, 0), threshold=threshold, overlap=self.overlap)

    def interpret(self, window: U8, view: View) -> Objects:
        """Rectangles whose centre px lies in the core, cut at the slide's edge, with their ``probability``."""
        check_view(window, view, self.stride)
        corner = (view.y0 // self.stride, view.x0 // self.stride)
        found = peaks.boxes_of(window, corner, threshold=self.threshold, overlap=self.overlap)
        found = found.where(_inside(found, view))
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

    def table(self, values: Answer) -> Mapping[str, npt.NDArray[Any]]:
        """Pixel tasks have no tile table."""
        return {}


def _inside(found: peaks.Found, view: View) -> Mask:
    y0, x0, y1, x1 = view.core
    y, x = found.anchor.T
    inside: Mask = (y >= y0) & (y < min(y1, view.height)) & (x >= x0) & (x < min(x1, view.width))
    return inside


def _target(truth: Boxes, classes: int, unit: float) -> F32:
    """See `Detect.target`. Small boxes are drawn last: where objects lie on each other the smaller one is learnt.

    ValueError for a class that the task does not have.
    """
    if len(truth.labels) and int(truth.labels.max()) >= classes:
        raise ValueError(f"a box has class {int(truth.labels.max())}, the task has {classes} classes")
    height, width = truth.height // peaks.STRIDE, truth.width // peaks.STRIDE
    out = np.zeros((classes + 5, height, width), np.float32)
    owner = np.full((height, width), -1)
    xyxy = truth.xyxy.astype(np.float64)
    for x0, y0, x1, y1 in xyxy[truth.labels < 0] / peaks.STRIDE - 0.5:
        out[:classes, _from(y0) : _from(y1), _from(x0) : _from(x1)] = np.nan
    order = np.argsort(-peaks.area(xyxy), kind="stable")
    for number in order[truth.labels[order] >= 0].tolist():
        _draw(out[truth.labels[number]], owner, xyxy[number], number)
    _sides(out[classes:], owner, xyxy, unit)
    return out


def _from(edge: float) -> int:
    """First map px whose middle lies at or beyond ``edge``, given in map px less a half."""
    return max(0, int(np.ceil(edge)))


def _draw(heat: F32, owner: npt.NDArray[np.int64], box: F64, number: int) -> None:
    """Add an object's hill to its class's heat, and its number to the px that learn its sides."""
    rows, row = _line(box[1], box[3], heat.shape[0])
    columns, column = _line(box[0], box[2], heat.shape[1])
    hill = np.multiply.outer(row, column).astype(np.float32)
    place = heat[rows, columns]
    known = ~np.isnan(place)
    place[known] = np.maximum(place[known], hill[known])
    place[hill == 1.0] = 1.0  # the centre is known, also inside an unknown area
    owner[rows, columns][hill >= NEAR] = number


def _line(low: float, high: float, size: int) -> tuple[slice, F64]:
    """Map px along one side and the hill there: exactly 1 at the px that holds the middle, a bell beside it."""
    middle = min(max(int((low + high) / 2 // peaks.STRIDE), 0), size - 1)
    sigma = max((high - low) / peaks.STRIDE / 6.0, 0.4)
    reach = int(3 * sigma) + 1
    first, last = max(0, middle - reach), min(size, middle + reach + 1)
    return slice(first, last), np.exp(-0.5 * ((np.arange(first, last) - middle) / sigma) ** 2)


def _sides(out: F32, owner: npt.NDArray[np.int64], xyxy: F64, unit: float) -> None:
    """Fill logarithms of distances and weights float32[5, h, w] for the px that have an owner."""
    y, x = np.nonzero(owner >= 0)
    number = owner[y, x]
    middle_y, middle_x = (y + 0.5) * peaks.STRIDE, (x + 0.5) * peaks.STRIDE
    x0, y0, x1, y1 = xyxy[number].T
    sides = np.stack([middle_x - x0, middle_y - y0, x1 - middle_x, y1 - middle_y])
    out[:4, y, x] = np.log2(np.maximum(sides, peaks.LEAST) / unit)
    out[4, y, x] = 1.0 / np.bincount(number)[number]
