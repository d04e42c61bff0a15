"""`classify`: one class per tile, from the pooled vector, or per bag of tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.tasks import scores
from wsi_mmm.tasks.base import AnyTarget, Quantised, Scope, View
from wsi_mmm.tasks.params import Params, class_weights, smoothing_share
from wsi_mmm.tasks.quantise import probabilities_of, quantise_probabilities
from wsi_mmm.types import F32, U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec


@dataclass(frozen=True, slots=True)
class Classify:
    """The `classify` task. ``channels`` is the number of classes. ``smoothing`` and ``weights``: see `classes_loss`."""

    info: TaskInfo
    channels: int
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0
    smoothing: float = 0.02
    weights: tuple[float, ...] | None = None

    heads: ClassVar[Mapping[Scope, str]] = {"tile": "vector", "bag": "bag"}

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        smoothing = smoothing_share(info, params, 0.02)
        return cls(info, len(info.classes), scope, smoothing=smoothing, weights=class_weights(info, params))

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, classes]."""
        from wsi_mmm.model.heads import build_head

        return build_head("bag" if self.scope == "bag" else "vector", spec, self.channels)

    def target(self, value: AnyTarget) -> Tensor:
        """A class index (negative: unknown) -> int64 scalar."""
        import torch

        return torch.tensor(max(int(value), -1))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy in units of ln(classes)."""
        from wsi_mmm.tasks.losses_tile import classes_loss

        return classes_loss(logits, target, smoothing=self.smoothing, weights=self.weights)

    def quantise(self, logits: Tensor) -> Tensor:
        """Softmax as 0..255; of bags as float32."""
        import torch

        return quantise_probabilities(torch.softmax(logits.float(), dim=1), self.scope)

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """accuracy, balanced_accuracy, f1 (macro), auroc (one against the rest, mean over classes) and ap (likewise).

        Of pairs whose target is known; metrics that they do not define are left out.
        """
        known = [(int(t), v) for t, v in pairs if int(t) >= 0]
        if not known:
            return {}
        target, chance = np.array([t for t, _ in known], np.int64), probabilities_of(np.stack([v for _, v in known]))
        table = scores.confusion(target, np.argmax(chance, axis=1), self.channels)
        each = [(target == c, chance[:, c]) for c in range(self.channels)]
        return scores.known_metrics({
            "accuracy": scores.accuracy(table),
            "balanced_accuracy": scores.balanced_accuracy(table),
            "f1": scores.f1_macro(table),
            "auroc": scores.mean(scores.auroc(*pair) for pair in each),
            "ap": scores.mean(scores.average_precision(*pair) for pair in each),
        })  # fmt: skip

    def interpret(self, window: U8, view: View) -> Objects:
        """Tile tasks draw no objects."""
        raise TypeError(f"task '{self.info.name}' answers per {self.scope}; use table()")

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """[n, classes] -> ``<task>`` int32[n] likeliest class (-1: none, every value is 0) and ``<task>:<class>``
        float32[n] probabilities, which add up to 1."""
        total = values.sum(axis=1, dtype=np.int64 if values.dtype == np.uint8 else np.float64)
        best = np.where(total > 0, np.argmax(values, axis=1), -1).astype(np.int32)
        columns: dict[str, npt.NDArray[Any]] = {self.info.name: best}
        for i, name in enumerate(self.info.classes):
            chance: F32 = (values[:, i] / np.where(total > 0, total, 1)).astype(np.float32)
            columns[f"{self.info.name}:{name}"] = chance
        return columns
