"""`survive`: time to one event, per bag of tiles or per tile: Cox's proportional hazards, or discrete hazards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.errors import ModelError
from wsi_mmm.tasks import scores
from wsi_mmm.tasks.base import AnyTarget, Quantised, Scope, View
from wsi_mmm.tasks.params import Params, check_names
from wsi_mmm.types import F64, U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec


@dataclass(frozen=True, slots=True)
class Survive:
    """The `survive` task. Without ``edges`` one logit, the log of the relative hazard (Cox). With them one per interval
    of time, (0, edges[0]] and so on: the log odds that the event happens in it (Gensheimer and Narasimhan 2019).

    Answers are float32: the log hazard, or the chance to be without event after each interval.
    """

    info: TaskInfo
    edges: tuple[float, ...] = ()
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0
    efron: bool = True

    heads: ClassVar[Mapping[Scope, str]] = {"tile": "vector", "bag": "bag"}

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        if len(info.classes) != 1:
            raise ModelError(
                f"task '{info.name}': 'survive' takes exactly one class, the event, not {len(info.classes)}"
            )
        bins = int(params.get("bins", 0))
        named = [f"edge:{i + 1}" for i in range(bins)]
        check_names(params, ("bins", "horizon", "efron", *named))
        horizon = params.get("horizon", 0.0)
        edges = tuple(float(params.get(name, horizon * (i + 1) / bins)) for i, name in enumerate(named))
        if any(b <= a for a, b in zip((0.0, *edges), edges, strict=False)):
            raise ModelError(f"task '{info.name}': give 'horizon' above 0, or rising 'edge:1' to 'edge:{bins}'")
        return cls(info, edges, scope, efron=bool(params.get("efron", 1)))

    @property
    def channels(self) -> int:
        """One, or the number of intervals."""
        return len(self.edges) or 1

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, channels]."""
        from wsi_mmm.model.heads import build_head

        return build_head("bag" if self.scope == "bag" else "vector", spec, self.channels)

    def target(self, value: AnyTarget) -> Tensor:
        """`Survival` -> float32[2]: time (NaN: unknown) and 1 where the event happened."""
        import torch

        return torch.tensor([float(value.time), float(value.event)], dtype=torch.float32)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cox: the batch is the risk set, so it should hold many items. Discrete: items on their own."""
        from wsi_mmm.tasks.losses_tile import cox_loss, hazards_loss

        if self.edges:
            return hazards_loss(logits, target, edges=self.edges)
        return cox_loss(logits, target, efron=self.efron)

    def quantise(self, logits: Tensor) -> Tensor:
        """Cox: float32[n, 1] log hazards. Discrete: float32[n, B], the product of 1 - hazard up to each interval."""
        from torch.nn.functional import logsigmoid

        return logsigmoid(-logits.float()).cumsum(1).exp() if self.edges else logits.float()

    def risk(self, values: Quantised) -> F64:
        """One number per item, higher for earlier events: the log hazard, or the expected share of the time up to the
        last edge that is lost (1 less the area under the survival curve taken as steps)."""
        if not self.edges:
            return values[:, 0].astype(np.float64)
        widths = np.diff(np.array(self.edges), prepend=0.0)
        lost: F64 = 1.0 - values.astype(np.float64) @ (widths / self.edges[-1])
        return lost

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """concordance (Harrell) of the pairs whose time is known; left out when none are comparable."""
        known = [(t, v) for t, v in pairs if not np.isnan(t.time)]
        if not known:
            return {}
        time = np.array([t.time for t, _ in known], np.float64)
        event = np.array([t.event for t, _ in known], np.bool_)
        return scores.known_metrics(
            {"concordance": scores.concordance(time, event, self.risk(np.stack([v for _, v in known])))}
        )

    def interpret(self, window: U8, view: View) -> Objects:
        """Tile tasks draw no objects."""
        raise TypeError(f"task '{self.info.name}' answers per {self.scope}; use table()")

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """[n, channels] -> ``<task>`` float32[n] `risk`; discrete also ``<task>:S(<edge>)`` survival to each edge."""
        columns: dict[str, npt.NDArray[Any]] = {self.info.name: self.risk(values).astype(np.float32)}
        columns |= {f"{self.info.name}:S({edge:g})": values[:, i] for i, edge in enumerate(self.edges)}
        return columns
