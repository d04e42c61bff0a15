"""The kinds that answer once per tile, from its pooled vector, or once per bag of tiles: `classify`, `multilabel`,
`regress`, `survive`. Probabilities of tiles, of which there are many, are kept as bytes, all else as float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from wsi_mmm.errors import ModelError
from wsi_mmm.tasks import scores
from wsi_mmm.tasks.base import (
    AnyTarget,
    Params,
    Quantised,
    Scope,
    check_names,
    class_weights,
    draws_nothing,
    head_of_scope,
    number_within,
    per_class,
    smoothing_share,
)
from wsi_mmm.tasks.facts import parameter_names
from wsi_mmm.types import F32, F64, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor

_HEADS: Mapping[Scope, str] = {"tile": "vector", "bag": "bag"}


def quantise_probabilities(probabilities: Tensor, scope: Scope) -> Tensor:
    """Probabilities in [0, 1] as 0..255 for tiles; as they are for bags."""
    return probabilities if scope == "bag" else (probabilities * 255.0).round().byte()


def probabilities_of(values: Quantised) -> F32:
    """The probabilities that `quantise_probabilities` was given, to within 1/510 of those of tiles."""
    return values.astype(np.float32) / np.float32(255.0) if values.dtype == np.uint8 else values.astype(np.float32)


def stack_targets(targets: Sequence[Any], count: int) -> F32:
    """Numbers, or arrays of ``count``, as one float32[n, count]."""
    return np.stack([np.array(target, np.float32).reshape(count) for target in targets])


@dataclass(frozen=True, slots=True)
class Classify:
    """`classify`: one class. ``channels`` is the number of classes. ``smoothing`` and ``weights``: `classes_loss`."""

    info: TaskInfo
    channels: int
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0
    smoothing: float = 0.02
    weights: tuple[float, ...] | None = None

    heads: ClassVar[Mapping[Scope, str]] = _HEADS
    head = head_of_scope
    interpret = draws_nothing

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        smoothing = smoothing_share(info, params, 0.02)
        return cls(info, len(info.classes), scope, smoothing=smoothing, weights=class_weights(info, params))

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
        return quantise_probabilities(logits.float().softmax(1), self.scope)

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

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """[n, classes] -> ``<task>`` int32[n] likeliest class (-1: none, every value is 0) and ``<task>:<class>``
        float32[n] probabilities, which add up to 1."""
        total = values.sum(axis=1, dtype=np.int64 if values.dtype == np.uint8 else np.float64)
        columns: dict[str, npt.NDArray[Any]] = {
            self.info.name: np.where(total > 0, np.argmax(values, axis=1), -1).astype(np.int32)
        }
        for i, name in enumerate(self.info.classes):
            columns[f"{self.info.name}:{name}"] = (values[:, i] / np.where(total > 0, total, 1)).astype(np.float32)
        return columns


@dataclass(frozen=True, slots=True)
class Multilabel:
    """`multilabel`: any number of labels, ``channels`` to choose from. ``smoothing`` and ``weights``: `labels_loss`."""

    info: TaskInfo
    channels: int
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0
    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None

    heads: ClassVar[Mapping[Scope, str]] = _HEADS
    head = head_of_scope
    interpret = draws_nothing

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        smoothing = smoothing_share(info, params, 0.0)
        return cls(info, len(info.classes), scope, smoothing=smoothing, weights=class_weights(info, params))

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
        return quantise_probabilities(logits.float().sigmoid(), self.scope)

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """Means over labels of what is known of each: ap (mean average precision), auroc, f1 and accuracy at 0.5.

        Targets count as present from a probability of 0.5 on; undefined metrics are left out.
        """
        both = list(pairs)
        if not both:
            return {}
        target = stack_targets([t for t, _ in both], self.channels)
        chance = probabilities_of(np.stack([v for _, v in both]))
        return scores.mean_metrics(_label_metrics(target[:, c], chance[:, c]) for c in range(self.channels))

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """[n, labels] -> ``<task>`` int32[n] the likeliest label of at least a half (-1: none) and ``<task>:<label>``
        float32[n] probabilities."""
        chance = probabilities_of(values)
        best = np.argmax(chance, axis=1)
        clear = chance[np.arange(len(chance)), best] >= 0.5
        named = {f"{self.info.name}:{name}": chance[:, i] for i, name in enumerate(self.info.classes)}
        return {self.info.name: np.where(clear, best, -1).astype(np.int32), **named}


def _label_metrics(target: F32, chance: F32) -> dict[str, float]:
    known = ~np.isnan(target)
    present, score = target[known] >= 0.5, chance[known]
    found = score >= 0.5
    return {
        "ap": scores.average_precision(present, score),
        "auroc": scores.auroc(present, score),
        "f1": scores.f1(present, found),
        "accuracy": float((present == found).mean()) if known.any() else float("nan"),
    }


@dataclass(frozen=True, slots=True)
class Regress:
    """`regress`: one number per class of its card. A head says ``(value - centre) / spread``, so ``centre`` and
    ``spread`` (K of each) are best the mean and standard deviation of the training targets."""

    info: TaskInfo
    channels: int
    centre: tuple[float, ...]
    spread: tuple[float, ...]
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0
    huber: bool = False

    heads: ClassVar[Mapping[Scope, str]] = _HEADS
    head = head_of_scope
    interpret = draws_nothing

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        check_names(params, parameter_names("regress", info.classes))
        centre, spread = per_class(info, params, "centre", 0.0), per_class(info, params, "spread", 1.0)
        if min(spread) <= 0:
            raise ModelError(
                f"task '{info.name}': 'spread' must be above 0, such as the standard deviation of the targets"
            )
        return cls(info, len(info.classes), centre, spread, scope, huber=bool(params.get("huber", 0)))

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
        """The values themselves, float32[n, K]: a byte would be too coarse."""
        x = logits.float()
        return x * x.new_tensor(self.spread) + x.new_tensor(self.centre)

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """mae (in units of the target), r2, spearman: means over the K numbers; undefined metrics are left out."""
        both = list(pairs)
        if not both:
            return {}
        target = stack_targets([t for t, _ in both], self.channels).astype(np.float64)
        found = np.stack([v for _, v in both]).astype(np.float64)
        return scores.mean_metrics(_value_metrics(target[:, c], found[:, c]) for c in range(self.channels))

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """float32[n, K] -> ``<task>`` float32[n] of a single number, else ``<task>:<class>`` each."""
        if self.channels == 1:
            return {self.info.name: values[:, 0]}
        return {f"{self.info.name}:{name}": values[:, i] for i, name in enumerate(self.info.classes)}


def _value_metrics(target: F64, found: F64) -> dict[str, float]:
    known = ~np.isnan(target)
    pair = target[known], found[known]
    return {"mae": scores.mean_absolute_error(*pair), "r2": scores.r2(*pair), "spearman": scores.spearman(*pair)}


@dataclass(frozen=True, slots=True)
class Survive:
    """`survive`: time to one event. Without ``edges`` one logit, the log of the relative hazard (Cox's proportional
    hazards). With them one per interval of time, (0, edges[0]] and so on: the log odds that the event happens in it
    (Gensheimer and Narasimhan 2019).

    Answers are float32: the log hazard, or the chance to be without event after each interval.
    """

    info: TaskInfo
    edges: tuple[float, ...] = ()
    scope: Scope = "tile"
    stride: int = 1
    halo: int = 0
    efron: bool = True

    heads: ClassVar[Mapping[Scope, str]] = _HEADS
    head = head_of_scope
    interpret = draws_nothing

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        if len(info.classes) != 1:
            raise ModelError(
                f"task '{info.name}': 'survive' takes exactly one class, the event, not {len(info.classes)}"
            )
        bins = int(number_within(info, params, "bins", 0, (0, 1000)))
        named = [f"edge:{i + 1}" for i in range(bins)]
        check_names(params, {*parameter_names("survive", ()), *named} - {"edge:<bin>"})
        horizon = params.get("horizon", 0.0)
        edges = tuple(float(params.get(name, horizon * (i + 1) / bins)) for i, name in enumerate(named))
        if any(b <= a for a, b in zip((0.0, *edges), edges, strict=False)):
            raise ModelError(f"task '{info.name}': give 'horizon' above 0, or rising 'edge:1' to 'edge:{bins}'")
        return cls(info, edges, scope, efron=bool(params.get("efron", 1)))

    @property
    def channels(self) -> int:
        """One, or the number of intervals."""
        return len(self.edges) or 1

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
        risk = self.risk(np.stack([v for _, v in known]))
        return scores.known_metrics({"concordance": scores.concordance(time, event, risk)})

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """[n, channels] -> ``<task>`` float32[n] `risk`; discrete also ``<task>:S(<edge>)`` survival to each edge."""
        columns: dict[str, npt.NDArray[Any]] = {self.info.name: self.risk(values).astype(np.float32)}
        columns |= {f"{self.info.name}:S({edge:g})": values[:, i] for i, edge in enumerate(self.edges)}
        return columns
