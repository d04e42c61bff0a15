"""`classify`: one class per tile, from the pooled vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.tasks.base import Scope, Truth, View
from wsi_mmm.types import F32, U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec


@dataclass(frozen=True, slots=True)
class Classify:
    """The `classify` task. ``channels`` is the number of classes."""

    info: TaskInfo
    channels: int
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, classes]."""
        from wsi_mmm.model.heads import build_head

        return build_head("vector", spec, self.channels)

    def target(self, truth: Truth) -> Tensor:
        """A class index (negative: unknown) -> int64 scalar."""
        import torch

        return torch.tensor(max(int(truth), -1))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy in units of ln(classes)."""
        from wsi_mmm.tasks.losses import classes_loss

        return classes_loss(logits, target)

    def quantise(self, logits: Tensor) -> Tensor:
        """Softmax as 0..255."""
        import torch

        return (torch.softmax(logits.float(), dim=1) * 255.0).round().to(torch.uint8)

    def metrics(self, pairs: Iterable[tuple[Truth, U8]]) -> dict[str, float]:
        """Accuracy over all pictures and averaged over classes (balanced)."""
        known = [(int(t), int(np.argmax(v))) for t, v in pairs if int(t) >= 0]
        if not known:
            return {"accuracy": 1.0, "balanced_accuracy": 1.0}
        truth, found = np.array(known).T
        share = [float((found[truth == c] == c).mean()) for c in np.unique(truth)]
        return {"accuracy": float((truth == found).mean()), "balanced_accuracy": float(np.mean(share))}

    def interpret(self, window: U8, view: View) -> Objects:
        """Tile tasks draw no objects."""
        raise TypeError(f"task '{self.info.name}' answers per tile; use table()")

    def table(self, values: U8) -> Mapping[str, npt.NDArray[Any]]:
        """uint8[n, classes] -> ``<task>`` int32[n] class index and ``<task>:<class>`` float32[n] probabilities."""
        total = np.maximum(values.sum(axis=1, dtype=np.int64), 1)
        columns: dict[str, npt.NDArray[Any]] = {self.info.name: np.argmax(values, axis=1).astype(np.int32)}
        for i, name in enumerate(self.info.classes):
            chance: F32 = (values[:, i] / total).astype(np.float32)
            columns[f"{self.info.name}:{name}"] = chance
        return columns
