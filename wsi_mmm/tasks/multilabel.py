"""`multilabel`: any number of labels per tile, from the pooled vector, or per bag of tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.tasks import scores
from wsi_mmm.tasks.base import AnyTarget, Quantised, Scope, View
from wsi_mmm.tasks.params import Params, class_weights, smoothing_share
from wsi_mmm.tasks.quantise import probabilities_of, quantise_probabilities, stack_targets
from wsi_mmm.types import U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec


@dataclass(frozen=True, slots=True)
class Multilabel:
    """The `multilabel` task. ``channels`` is the number of labels. ``smoothing`` and ``weights``: see `labels_loss`."""

    info: TaskInfo
    channels: int
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0
    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None

    heads: ClassVar[Mapping[Scope, str]] = {"tile": "vector", "bag": "bag"}

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        smoothing = smoothing_share(info, params, 0.0)
        return cls(info, len(info.classes), scope, smoothing=smoothing, weights=class_weights(info, params))

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, labels]."""
        from wsi_mmm.model.heads import build_head

        return build_head("bag" if self.scope == "bag" else "vector", spec, self.channels)

    def target(self, value: AnyTarget) -> Tensor:
        """float32[K], 0 or 1 or a probability (NaN: unknown), as it is."""
        import torch

        return torch.from_numpy(stack_targets([value], self.channels)[0])

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross entropy in units of ln 2."""
        from wsi_mmm.tasks.losses_tile import labels_loss

        return labels_loss(logits, target, smoothing=self.smoothing, weights=self.weights)

    def quantise(self, logits: Tensor) -> Tensor:
        """Sigmoid as 0..255; of bags as float32."""
        import torch

        return quantise_probabilities(torch.sigmoid(logits.float()), self.scope)

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """Means over labels of what is known of each: ap (mean average precision), auroc, f1 and accuracy at 0.5.

        Targets count as present from a probability of 0.5 on; undefined metrics are left out.
        """
        both = list(pairs)
        if not both:
            return {}
        target, chance = (
            stack_targets([t for t, _ in both], self.channels),
            probabilities_of(np.stack([v for _, v in both])),
        )
        by_metric: dict[str, list[float]] = {"ap": [], "auroc": [], "f1": [], "accuracy": []}
        for c in range(self.channels):
            known = ~np.isnan(target[:, c])
            present, score = target[known, c] >= 0.5, chance[known, c]
            said = score >= 0.5
            by_metric["ap"].append(scores.average_precision(present, score))
            by_metric["auroc"].append(scores.auroc(present, score))
            by_metric["f1"].append(scores.f1(present, said))
            by_metric["accuracy"].append(float((present == said).mean()) if known.any() else float("nan"))
        return scores.known_metrics({name: scores.mean(values) for name, values in by_metric.items()})

    def interpret(self, window: U8, view: View) -> Objects:
        """Tile tasks draw no objects."""
        raise TypeError(f"task '{self.info.name}' answers per {self.scope}; use table()")

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """[n, labels] -> ``<task>`` int32[n] the likeliest label of at least a half (-1: none) and ``<task>:<label>``
        float32[n] probabilities."""
        chance = probabilities_of(values)
        best = np.argmax(chance, axis=1)
        clear = chance[np.arange(len(chance)), best] >= 0.5
        named = {f"{self.info.name}:{name}": chance[:, i] for i, name in enumerate(self.info.classes)}
        return {self.info.name: np.where(clear, best, -1).astype(np.int32), **named}
