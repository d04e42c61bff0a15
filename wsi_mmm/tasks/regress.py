"""`regress`: numbers per tile, from the pooled vector, or per bag of tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.errors import ModelError
from wsi_mmm.tasks import scores
from wsi_mmm.tasks.base import AnyTarget, Quantised, Scope, View
from wsi_mmm.tasks.params import Params, check_names, class_names, per_class
from wsi_mmm.tasks.quantise import stack_targets
from wsi_mmm.types import U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec


@dataclass(frozen=True, slots=True)
class Regress:
    """The `regress` task: one number per class of its card. A head says ``(value - centre) / spread``, so ``centre``
    and ``spread`` (K of each) are best the mean and standard deviation of the training targets. Outputs are float32:
    a byte would be too coarse."""

    info: TaskInfo
    channels: int
    centre: tuple[float, ...]
    spread: tuple[float, ...]
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0
    huber: bool = False

    heads: ClassVar[Mapping[Scope, str]] = {"tile": "vector", "bag": "bag"}

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        check_names(params, ("huber", "centre", "spread", *class_names("centre", info), *class_names("spread", info)))
        centre, spread = per_class(info, params, "centre", 0.0), per_class(info, params, "spread", 1.0)
        if min(spread) <= 0:
            raise ModelError(
                f"task '{info.name}': 'spread' must be above 0, such as the standard deviation of the targets"
            )
        return cls(info, len(info.classes), centre, spread, scope, huber=bool(params.get("huber", 0)))

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, K] in units of ``spread`` round ``centre``."""
        from wsi_mmm.model.heads import build_head

        return build_head("bag" if self.scope == "bag" else "vector", spec, self.channels)

    def target(self, value: AnyTarget) -> Tensor:
        """A number or float32[K] (NaN: unknown) -> float32[K] in units of ``spread`` round ``centre``."""
        import torch

        values = stack_targets([value], self.channels)[0]
        return torch.from_numpy(((values - np.array(self.centre)) / np.array(self.spread)).astype(np.float32))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Squared (or Huber) error in units of the variance."""
        from wsi_mmm.tasks.losses_tile import values_loss

        return values_loss(logits, target, huber=self.huber)

    def quantise(self, logits: Tensor) -> Tensor:
        """The values themselves, float32[n, K]."""
        x = logits.float()
        return x * x.new_tensor(self.spread) + x.new_tensor(self.centre)

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """mae (in units of the target), r2, spearman: means over the K numbers; undefined metrics are left out."""
        both = list(pairs)
        if not both:
            return {}
        target, found = stack_targets([t for t, _ in both], self.channels), np.stack([v for _, v in both])
        by_metric: dict[str, list[float]] = {"mae": [], "r2": [], "spearman": []}
        for c in range(self.channels):
            known = ~np.isnan(target[:, c])
            a, b = target[known, c].astype(np.float64), found[known, c].astype(np.float64)
            by_metric["mae"].append(scores.mean_absolute_error(a, b))
            by_metric["r2"].append(scores.r2(a, b))
            by_metric["spearman"].append(scores.spearman(a, b))
        return scores.known_metrics({name: scores.mean(values) for name, values in by_metric.items()})

    def interpret(self, window: U8, view: View) -> Objects:
        """Tile tasks draw no objects."""
        raise TypeError(f"task '{self.info.name}' answers per {self.scope}; use table()")

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """float32[n, K] -> ``<task>`` float32[n] of a single number, else ``<task>:<class>`` each."""
        if self.channels == 1:
            return {self.info.name: values[:, 0]}
        return {f"{self.info.name}:{name}": values[:, i] for i, name in enumerate(self.info.classes)}
