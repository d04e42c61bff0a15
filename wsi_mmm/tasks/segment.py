"""`segment`: one class per pixel. Regions are cut at the core's rim here and dissolved later by `outputs.merge`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.tasks.base import AnyTarget, Quantised, Scope, View, check_view
from wsi_mmm.tasks.params import Params, check_names, class_names, class_weights, number_within
from wsi_mmm.tasks.regions import core_part, draw_regions
from wsi_mmm.types import I32, U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec


@dataclass(frozen=True, slots=True)
class Segment:
    """The `segment` task. ``channels`` is the number of classes; class ``background`` (-1: none) is not drawn.

    ``smoothing`` and ``weights``: see `pixel_classes_loss`.
    """

    info: TaskInfo
    channels: int
    background: int = 0
    smoothing: float = 0.02
    weights: tuple[float, ...] | None = None
    scope: Scope = "pixel"
    stride: int = 2
    halo: int = 0

    heads: ClassVar[Mapping[Scope, str]] = {"pixel": "map"}

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        check_names(params, ("background", "smoothing", *class_names("weight", info)))
        return cls(
            info,
            len(info.classes),
            background=int(params.get("background", 0)),
            smoothing=number_within(info, params, "smoothing", 0.02, (0.0, 0.99)),
            weights=class_weights(info, params),
        )

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, classes, h, w]."""
        from wsi_mmm.model.heads import build_head

        return build_head("map", spec, self.channels)

    def target(self, value: AnyTarget) -> Tensor:
        """int32[h, w] class indices (negative: unknown) -> int64[h / 2, w / 2], the lower right px of each 2 x 2."""
        import torch

        labels = np.maximum(np.asarray(value, np.int64), -1)
        return torch.from_numpy(np.ascontiguousarray(labels[self.stride // 2 :: self.stride, 1 :: self.stride]))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy in units of ln(classes), unknown px left out."""
        from wsi_mmm.tasks.losses_dense import pixel_classes_loss

        return pixel_classes_loss(logits, target, smoothing=self.smoothing, weights=self.weights)

    def quantise(self, logits: Tensor) -> Tensor:
        """Softmax per px as 0..255."""
        import torch

        return (torch.softmax(logits.float(), dim=1) * 255.0).round().to(torch.uint8)

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """Mean intersection over union of the classes that occur, and pixel accuracy."""
        table = np.zeros((self.channels, self.channels), np.int64)
        for value, maps in pairs:
            wanted = self.target(value).numpy()
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
        """Class + 1 per map px of the core that lies on the slide; 0 for background and px that no tile covers."""
        part = core_part(window, view, self.stride)
        labels: I32 = np.argmax(part, axis=0).astype(np.int32) + 1
        labels[(labels == self.background + 1) | ~part.any(axis=0)] = 0
        return labels

    def interpret(self, window: U8, view: View) -> Objects:
        """One object per connected region of a class in the core, exact corners; anchor: its first px."""
        check_view(window, view, self.stride)
        return draw_regions(self.classes_of(window, view), view, self.stride, self.info.name)

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """Pixel tasks have no tile table."""
        return {}
