"""`multilabel`: any number of labels per tile, from the pooled vector, or per bag of tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.tasks import scores
from wsi_mmm.tasks.answers import as_answer, shares, vectors_of
from wsi_mmm.tasks.base import Answer, Scope, Truth, View
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

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, labels]."""
        from wsi_mmm.model.heads import build_head

        return build_head("bag" if self.scope == "bag" else "vector", spec, self.channels)

    def target(self, truth: Truth) -> Tensor:
        """float32[K], 0 or 1 or a probability (NaN: unknown), as it is."""
        import torch

        return torch.from_numpy(vectors_of([truth], self.channels)[0])

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross entropy in units of ln 2."""
        from wsi_mmm.tasks.losses_tile import labels_loss

        return labels_loss(logits, target, smoothing=self.smoothing, weights=self.weights)

    def quantise(self, logits: Tensor) -> Tensor:
        """Sigmoid as 0..255; of bags as float32."""
        import torch

        return as_answer(torch.sigmoid(logits.float()), self.scope)

    def metrics(self, pairs: Iterable[tuple[Truth, Answer]]) -> dict[str, float]:
        """Means over labels of what is known of each: ap (mean average precision), auroc, f1 and accuracy at 0.5.

        Truths count as present from a probability of 0.5 on; what cannot be settled is left out.
        """
        both = list(pairs)
        if not both:
            return {}
        truth, chance = vectors_of([t for t, _ in both], self.channels), shares(np.stack([v for _, v in both]))
        figures: dict[str, list[float]] = {"ap": [], "auroc": [], "f1": [], "accuracy": []}
        for c in range(self.channels):
            known = ~np.isnan(truth[:, c])
            present, score = truth[known, c] >= 0.5, chance[known, c]
            said = score >= 0.5
            figures["ap"].append(scores.average_precision(present, score))
            figures["auroc"].append(scores.auroc(present, score))
            figures["f1"].append(scores.f1(present, said))
            figures["accuracy"].append(float((present == said).mean()) if known.any() else float("nan"))
        return scores.settled({name: scores.mean(values) for name, values in figures.items()})

    def interpret(self, window: U8, view: View) -> Objects:
        """Tile tasks draw no objects."""
        raise TypeError(f"task '{self.info.name}' answers per {self.scope}; use table()")

    def table(self, values: Answer) -> Mapping[str, npt.NDArray[Any]]:
        """[n, labels] -> ``<task>`` int32[n] the likeliest label of at least a half (-1: none) and ``<task>:<label>``
        float32[n] probabilities."""
        chance = shares(values)
        best = np.argmax(chance, axis=1)
        clear = chance[np.arange(len(chance)), best] >= 0.5
        named = {f"{self.info.name}:{name}": chance[:, i] for i, name in enumerate(self.info.classes)}
        return {self.info.name: np.where(clear, best, -1).astype(np.int32), **named}
