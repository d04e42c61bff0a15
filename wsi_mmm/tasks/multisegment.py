"""`multisegment`: several independent masks, which may lie on each other. Each class's regions are cut at the core's
rim here and dissolved later by `outputs.merge`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.outputs.ragged import concat, sort_by_anchor
from wsi_mmm.tasks.base import AnyTarget, Quantised, Scope, View, check_view
from wsi_mmm.tasks.params import Params, check_names, class_names, class_weights, number_within
from wsi_mmm.tasks.regions import core_part, draw_regions
from wsi_mmm.types import U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec


@dataclass(frozen=True, slots=True)
class Multisegment:
    """The `multisegment` task. ``channels`` is the number of classes; px of at least ``threshold`` (a byte) are drawn.

    ``weights``: see `masks_loss`.
    """

    info: TaskInfo
    channels: int
    threshold: int = 128
    weights: tuple[float, ...] | None = None
    scope: Scope = "pixel"
    stride: int = 2
    halo: int = 0

    heads: ClassVar[Mapping[Scope, str]] = {"pixel": "map"}

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        check_names(params, ("threshold", *class_names("weight", info)))
        threshold = int(number_within(info, params, "threshold", 128, (1, 255)))
        return cls(info, len(info.classes), threshold, class_weights(info, params))

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, classes, h, w]."""
        from wsi_mmm.model.heads import build_head

        return build_head("map", spec, self.channels)

    def target(self, value: AnyTarget) -> Tensor:
        """int8[K, h, w] (1, 0, negative: unknown) -> int8[K, h / 2, w / 2], the lower right px of each 2 x 2."""
        import torch

        masks = np.asarray(value, np.int8)[:, self.stride // 2 :: self.stride, self.stride // 2 :: self.stride]
        return torch.from_numpy(np.clip(masks, -1, 1))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross entropy in units of ln 2, unknown px left out, every class counting alike."""
        from wsi_mmm.tasks.losses_dense import masks_loss

        return masks_loss(logits, target, weights=self.weights)

    def quantise(self, logits: Tensor) -> Tensor:
        """Probability of each class per px as 0..255."""
        import torch

        return (torch.sigmoid(logits.float()) * 255.0).round().to(torch.uint8)

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """Mean over the classes that occur of intersection over union (mean_iou) and of Dice (mean_dice); 1 if none."""
        common, wanted, found = np.zeros((3, self.channels), np.int64)
        for value, maps in pairs:
            target = self.target(value).numpy()
            drawn = (maps >= self.threshold) & (target >= 0)
            common += (drawn & (target > 0)).sum((1, 2))
            wanted += (target > 0).sum((1, 2))
            found += drawn.sum((1, 2))
        seen = wanted + found > 0
        if not seen.any():
            return {"mean_iou": 1.0, "mean_dice": 1.0}
        both, either = common[seen], (wanted + found)[seen]
        return {"mean_iou": float((both / (either - both)).mean()), "mean_dice": float((2 * both / either).mean())}

    def interpret(self, window: U8, view: View) -> Objects:
        """One object per connected region of each class in the core, exact corners; anchor: its first px."""
        check_view(window, view, self.stride)
        drawn = core_part(window, view, self.stride) >= self.threshold
        each = [draw_regions(mask * np.int32(k + 1), view, self.stride, self.info.name) for k, mask in enumerate(drawn)]
        return sort_by_anchor(concat(each))

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """Pixel tasks have no tile table."""
        return {}
