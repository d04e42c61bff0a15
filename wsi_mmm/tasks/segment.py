"""`segment`: one class per pixel. Regions are cut at the core's rim here and dissolved later by `outputs.merge`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.outputs.polygons import Frame, to_objects, trace
from wsi_mmm.tasks.base import Scope, Truth, View, check_view
from wsi_mmm.types import I32, I64, U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec


@dataclass(frozen=True, slots=True)
class Segment:
    """The `segment` task. ``channels`` is the number of classes; class ``background`` (-1: none) is not drawn."""

    info: TaskInfo
    channels: int
    background: int = 0
    scope: Scope = "pixel"
    stride: int = 2
    halo: int = 0

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, classes, h, w]."""
        from wsi_mmm.model.heads import build_head

        return build_head("map", spec, self.channels)

    def target(self, truth: Truth) -> Tensor:
        """int32[h, w] class indices (negative: unknown) -> int64[h / 2, w / 2], the lower right px of each 2 x 2."""
        import torch

        labels = np.maximum(np.asarray(truth, np.int64), -1)
        return torch.from_numpy(np.ascontiguousarray(labels[self.stride // 2 :: self.stride, 1 :: self.stride]))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy in units of ln(classes), unknown px left out."""
        from wsi_mmm.tasks.losses import classes_loss

        return classes_loss(logits, target)

    def quantise(self, logits: Tensor) -> Tensor:
        """Softmax per px as 0..255."""
        import torch

        return (torch.softmax(logits.float(), dim=1) * 255.0).round().to(torch.uint8)

    def metrics(self, pairs: Iterable[tuple[Truth, U8]]) -> dict[str, float]:
        """Mean intersection over union of the classes that occur, and pixel accuracy."""
        table = np.zeros((self.channels, self.channels), np.int64)
        for truth, maps in pairs:
            wanted = self.target(truth).numpy()
            known = wanted >= 0
            both = wanted[known] * self.channels + np.argmax(maps, axis=0)[known]
            table += np.bincount(both, minlength=table.size).reshape(table.shape)
        hit = np.diag(table)
        union = table.sum(0) + table.sum(1) - hit
        seen = union > 0
        return {
            "mean_iou": float((hit[seen] / union[seen]).mean()) if seen.any() else 1.0,
            "pixel_accuracy": float(hit.sum() / max(int(table.sum()), 1)),
        }

    def classes_of(self, window: U8, view: View) -> I32:
        """Class + 1 per map px of the core; 0 for background, uncovered px and px beyond the slide."""
        y0, x0, y1, x1 = (v // self.stride for v in view.core)
        top, left = view.y0 // self.stride, view.x0 // self.stride
        part = window[:, max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)]
        labels: I32 = np.argmax(part, axis=0).astype(np.int32) + 1
        labels[(labels == self.background + 1) | ~part.any(axis=0)] = 0
        labels[max(0, -(-view.height // self.stride) - max(y0, top)) :] = 0
        labels[:, max(0, -(-view.width // self.stride) - max(x0, left)) :] = 0
        return labels

    def interpret(self, window: U8, view: View) -> Objects:
        """One object per connected region of a class in the core, exact corners; anchor: its first px."""
        check_view(window, view, self.stride)
        labels = self.classes_of(window, view)
        y, x = max(view.core[0], view.y0), max(view.core[1], view.x0)
        rings = trace(labels, "exact")
        first = rings.ring_offsets[rings.object_offsets[:-1]]
        objects = to_objects(
            rings,
            Frame(x, y, self.stride, view.scale_x, view.scale_y),
            task=self.info.name,
            class_index=rings.labels - 1,
            anchor=_anchors(rings.coords[first], (y, x), self.stride),
        )
        np.minimum(objects.coords, (view.width * view.scale_x, view.height * view.scale_y), out=objects.coords)
        return objects

    def table(self, values: U8) -> Mapping[str, npt.NDArray[Any]]:
        """Pixel tasks have no tile table."""
        return {}


def _anchors(corners: npt.NDArray[np.float64], origin: tuple[int, int], stride: int) -> I64:
    """(y, x) target px of the px at the top-left corner that each exterior begins with."""
    return corners[:, ::-1].astype(np.int64) * stride + np.array(origin, np.int64)
