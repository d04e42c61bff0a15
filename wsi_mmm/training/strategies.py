"""Strategies: from the micro-batches of a step to gradients in ``.grad``, for all tasks together.

The joint loss of a step is the sum over tasks of weight x (mean of the task's loss over the micro-batches that have
targets of it, on all ranks): the number of micro-batches in a step does not change its size. Every strategy leaves the
gradient of this loss (`accumulate`, `joint`: exactly; the others: changed as their papers say), summed over the ranks,
and returns the losses by task. Parameters that no micro-batch of the step reached keep ``grad`` None.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from wsi_mmm.errors import ConfigError, NotFinite
from wsi_mmm.model.layers import layers
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.training.forward import TrainingContext, loss_of, passes, served, shared
from wsi_mmm.training.ranks import ALONE, Ranks, add, add_gradients, first_message, total

if TYPE_CHECKING:
    from wsi_mmm.training.loader import TrainBatch


@dataclass(frozen=True, slots=True)
class StrategyInputs:
    """The inputs of a strategy: this rank's micro-batches of a step, the tasks' weights (1 where absent), the number of
    the step, and the factor that losses are multiplied with against underflow in float16."""

    context: TrainingContext
    batches: tuple[TrainBatch, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    ranks: Ranks = ALONE
    scale: float = 1.0


class Strategy(Protocol):
    """``strategy(inputs)`` -> losses by task (means over the step, without weights). Raises NotFinite, on all ranks.

    ``own`` holds what the strategy itself learns or remembers; it is kept in checkpoints.
    """

    @property
    def own(self) -> nn.Module: ...

    def __call__(self, inputs: StrategyInputs) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class StrategyPlan:
    """A strategy by name. ``alpha`` and ``rate``: GradNorm's asymmetry and the rate of its weights."""

    name: str = "accumulate"
    alpha: float = 1.5
    rate: float = 0.025


def make_strategy(plan: StrategyPlan, tasks: Sequence[str]) -> Strategy:
    """The strategy that ``plan`` names, for these tasks. ConfigError for an unknown name."""
    if plan.name not in STRATEGIES:
        raise ConfigError(f"there is no strategy '{plan.name}'; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[plan.name](plan, tuple(tasks))


# ------------------------------------------------------------------------------------------- parts of all strategies
@dataclass(frozen=True, slots=True)
class _Pass:
    """A head that has been run and pulled back: ``pull`` is the gradient at ``read``, the shared tensor that it read
    (None when nothing before it learns)."""

    name: str
    read: Tensor
    pull: Tensor | None


@dataclass(frozen=True, slots=True)
class _PendingLoss:
    """A loss that is still on the device: losses are fetched once per step, not once per head."""

    name: str
    keys: tuple[str, ...]
    loss: Tensor


@dataclass(frozen=True, slots=True)
class _Shares:
    """``counts``: micro-batches of each task on all ranks. ``of``: what each of their losses is multiplied with."""

    counts: dict[str, float]
    of: dict[str, float]


def _task_shares(inputs: StrategyInputs, factors: Mapping[str, float] | None = None) -> _Shares:
    names = list(inputs.context.tasks)
    here = [served(inputs.context, batch) for batch in inputs.batches]
    found = total(inputs.ranks, [float(sum(name in some for some in here)) for name in names])
    counts = {name: count for name, count in zip(names, found, strict=True) if count}
    weights = {name: inputs.weights.get(name, 1.0) * (factors or {}).get(name, 1.0) for name in counts}
    return _Shares(counts, {name: inputs.scale * weights[name] / counts[name] for name in counts})


def _iter_batches(inputs: StrategyInputs) -> Iterator[tuple[TrainBatch, tuple[str, ...]]]:
    """Those that serve a task, with the tasks of one pass. Ranks take turns in the plan (`policy.of_rank`), which gives
    each micro-batch its place in it."""
    for number, batch in enumerate(inputs.batches):
        if inputs.context.norms is not None:
            inputs.context.norms.place = inputs.ranks.rank + number * inputs.ranks.world
        for names in passes(inputs.context, served(inputs.context, batch)):
            yield batch, names


def _iter_heads(
    inputs: StrategyInputs,
    batch: TrainBatch,
    names: Sequence[str],
    *,
    shares: _Shares,
    found_losses: list[_PendingLoss],
) -> Iterator[_Pass]:
    """Run the shared part once, then each head on a copy cut off from it, and free that head's graph."""
    for name, (read, target) in shared(inputs.context, batch, names).items():
        leaf = read.detach().requires_grad_(read.requires_grad)
        loss = loss_of(inputs.context, name, leaf, target)
        if loss.requires_grad:
            (loss * shares.of[name]).backward()  # type: ignore[no-untyped-call]
        found_losses.append(_PendingLoss(name, batch.keys, loss.detach()))
        del loss
        yield _Pass(name, read, leaf.grad)


def _task_by_task(
    inputs: StrategyInputs, shares: _Shares, each: Callable[[_Pass], None] | None = None
) -> list[_PendingLoss]:
    """Backward of the whole step: head by head down to the shared tensors, then once through the shared part."""
    found_losses: list[_PendingLoss] = []
    for batch, names in _iter_batches(inputs):
        pulls: dict[int, tuple[Tensor, Tensor]] = {}
        for one in _iter_heads(inputs, batch, names, shares=shares, found_losses=found_losses):
            if one.pull is None:
                continue
            if each:
                each(one)
            before = pulls.get(id(one.read))
            pulls[id(one.read)] = (one.read, one.pull if before is None else before[1].add_(one.pull))
        if pulls:
            reads, found = zip(*pulls.values(), strict=True)
            torch.autograd.backward(reads, found)
    return found_losses


def _agree_on_losses(inputs: StrategyInputs, shares: _Shares, found_losses: Sequence[_PendingLoss]) -> dict[str, float]:
    """Mean losses over all ranks. NotFinite on every rank when one of them found one: no rank steps alone."""
    values = torch.stack([pending.loss.double() for pending in found_losses]).tolist() if found_losses else []
    sums = dict.fromkeys(inputs.context.tasks, 0.0)
    fault = ""
    for pending, value in zip(found_losses, values, strict=True):
        sums[pending.name] += value
        if not math.isfinite(value) and not fault:
            shown = ", ".join(f"'{key}'" for key in pending.keys[:4])
            shown += f" and {len(pending.keys) - 4} more" if len(pending.keys) > 4 else ""
            fault = f"step {inputs.step}: the loss of task '{pending.name}' is {value} on {shown}; look at them"
    found = total(inputs.ranks, [*sums.values(), float(bool(fault))])
    if found[-1]:
        raise NotFinite(first_message(inputs.ranks, fault))
    means = dict(zip(sums, found, strict=False))
    return {name: means[name] / count for name, count in shares.counts.items()}


def _sum_over_ranks(inputs: StrategyInputs, shares: _Shares, found_losses: Sequence[_PendingLoss]) -> dict[str, float]:
    """Mean losses over all ranks, as `_agree_on_losses` says; the gradients of all parameters are summed, too."""
    losses = _agree_on_losses(inputs, shares, found_losses)
    add_gradients(inputs.ranks, [p for p in inputs.context.model.parameters() if p.requires_grad])
    return losses


# ------------------------------------------------------------------------------------------- accumulate, joint
@dataclass(frozen=True, slots=True)
class Accumulate:
    """Batch by batch, task by task: no more than the shared part of one batch and one head is in memory."""

    own: nn.Module = field(default_factory=nn.Module)

    def __call__(self, inputs: StrategyInputs) -> dict[str, float]:
        """See `Strategy`."""
        shares = _task_shares(inputs)
        return _sum_over_ranks(inputs, shares, _task_by_task(inputs, shares))


@dataclass(frozen=True, slots=True)
class Joint:
    """One graph of all batches and tasks, one backward pass: as the formula says, and as much memory as it takes."""

    own: nn.Module = field(default_factory=nn.Module)

    def __call__(self, inputs: StrategyInputs) -> dict[str, float]:
        """See `Strategy`."""
        shares = _task_shares(inputs)
        found_losses: list[_PendingLoss] = []
        terms: list[Tensor] = []
        for batch, names in _iter_batches(inputs):
            for name, (read, target) in shared(inputs.context, batch, names).items():
                loss = loss_of(inputs.context, name, read, target)
                found_losses.append(_PendingLoss(name, batch.keys, loss.detach()))
                terms.append(loss * shares.of[name])
        if terms:
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        return _sum_over_ranks(inputs, shares, found_losses)


# ------------------------------------------------------------------------------------------- PCGrad
@dataclass(frozen=True, slots=True)
class PCGrad:
    """Gradient surgery (Yu et al. 2020, algorithm 1) on the shared parameters; heads keep their own gradients.

    Holds one gradient of the shared part per task of the step.
    """

    own: nn.Module = field(default_factory=nn.Module)

    def __call__(self, inputs: StrategyInputs) -> dict[str, float]:
        """See `Strategy`."""
        shares = _task_shares(inputs)
        trunk = [
            p for n, p in inputs.context.model.named_parameters() if p.requires_grad and not n.startswith("heads.")
        ]
        found: dict[str, list[Tensor | None]] = {name: [None] * len(trunk) for name in shares.counts}
        found_losses: list[_PendingLoss] = []
        for batch, names in _iter_batches(inputs):
            for one in _iter_heads(inputs, batch, names, shares=shares, found_losses=found_losses):
                pairs = zip(found[one.name], _pull_back(one, trunk), strict=True)
                found[one.name] = [old if new is None else new if old is None else old + new for old, new in pairs]
        losses = _agree_on_losses(inputs, shares, found_losses)
        add_gradients(inputs.ranks, [p for n, p in inputs.context.model.named_parameters() if n.startswith("heads.")])
        self._project_gradients(inputs, trunk, list(found.values()))
        return losses

    def _project_gradients(
        self, inputs: StrategyInputs, trunk: Sequence[nn.Parameter], found: Sequence[Sequence[Tensor | None]]
    ) -> None:
        """Write the projected sum of the tasks' gradients into ``.grad``; None where no task reached."""
        here = [float(any(task[i] is not None for task in found)) for i in range(len(trunk))]
        reached = total(inputs.ranks, here)
        flats = [
            torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(task, trunk, strict=True)])
            for task in found
        ]
        add(inputs.ranks, flats)
        if not flats:
            return
        parts = torch.split(project(flats, inputs.step), [p.numel() for p in trunk])
        for parameter, part, some in zip(trunk, parts, reached, strict=True):
            parameter.grad = part.view(parameter.shape).clone() if some else None


def _pull_back(one: _Pass, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """The gradient of a task's loss at each of ``parameters`` of the shared part; None where there is none."""
    if one.pull is None:
        return [None] * len(parameters)
    return torch.autograd.grad(one.read, parameters, one.pull, retain_graph=True, allow_unused=True)


def project(gradients: Sequence[Tensor], seed: int) -> Tensor:
    """Sum of the gradients, each cleared of what conflicts: for every other gradient h in random order, where
    g . h < 0, g becomes g - (g . h / h . h) h, with h as it was at first (Yu et al. 2020). Pure in ``seed``."""
    shuffler = random.Random(seed)
    out = torch.zeros_like(gradients[0])
    for number, gradient in enumerate(gradients):
        g = gradient.clone()
        others = [i for i in range(len(gradients)) if i != number]
        shuffler.shuffle(others)
        for other in others:
            h = gradients[other]
            inner = torch.dot(g, h)
            g = torch.where(inner < 0, g - (inner / torch.dot(h, h).clamp_min(torch.finfo(h.dtype).tiny)) * h, g)
        out += g
    return out


# ------------------------------------------------------------------------------------------- GradNorm
class Balance(nn.Module):
    """The state of GradNorm, by task in the order of its plan: ``weight`` and the ``first`` loss (NaN: none yet)."""

    weight: Tensor
    first: Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(tasks, dtype=torch.float64))
        self.register_buffer("first", torch.full((tasks,), math.nan, dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class GradNorm:
    """Tasks that learn slowly get more weight (Chen et al. 2018): with the norms G of the weighted gradients at the
    last shared layer and the relative losses r = (L / first L) / mean, weights descend on sum |G - mean(G) r^alpha|.

    The derivative of G by a weight is G / weight, so no second backward pass is needed. Weights of the tasks of a step
    keep their sum. A task without gradient at that layer (bags of stored features) keeps its weight.
    """

    tasks: tuple[str, ...]
    alpha: float
    rate: float
    own: Balance

    def __call__(self, inputs: StrategyInputs) -> dict[str, float]:
        """See `Strategy`."""
        shares = _task_shares(inputs, dict(zip(self.tasks, self.own.weight.tolist(), strict=True)))
        layer = last_shared(inputs.context.model)
        sums = {name: [torch.zeros_like(p) for p in layer] for name in shares.counts}

        def each(one: _Pass) -> None:
            for kept, grad in zip(sums[one.name], _pull_back(one, layer), strict=True):
                if grad is not None:
                    kept += grad

        losses = _sum_over_ranks(inputs, shares, _task_by_task(inputs, shares, each))
        add(inputs.ranks, [g for grads in sums.values() for g in grads])
        norms = {name: float(nn.utils.get_total_norm(grads)) / inputs.scale for name, grads in sums.items()}
        self._update_balance(losses, norms)
        return losses

    def _update_balance(self, losses: Mapping[str, float], norms: Mapping[str, float]) -> None:
        """One step of the weights. ``norms`` of the weighted losses' gradients."""
        index = [self.tasks.index(name) for name in losses]
        first, found = self.own.first, torch.tensor(list(losses.values()), dtype=torch.float64)
        first[index] = torch.where(first[index].isnan(), found, first[index])
        seen = [n for n, name in enumerate(losses) if 0 < norms[name] < math.inf]
        if len(seen) < 2:
            return
        index, found = [index[n] for n in seen], found[seen]
        weight = self.own.weight[index]
        g = torch.tensor([norms[self.tasks[i]] for i in index], dtype=torch.float64)
        pace = found / first[index].clamp_min(1e-8)
        slope = torch.sign(g - g.mean() * (pace / pace.mean().clamp_min(1e-8)) ** self.alpha) * g / weight
        new = (weight - self.rate * slope).clamp_min(1e-2)
        self.own.weight[index] = new * weight.sum() / new.sum()


def last_shared(model: MultiTaskModel) -> list[nn.Parameter]:
    """The trainable parameters of the encoder's last stage, which everything that sees pixels passes. Not only its last
    kernel: residual branches often begin as zeros, without gradient."""
    found = [x for x in layers(model) if x.parameter.requires_grad and x.name.startswith("encoder.")]
    if not found:
        raise ConfigError("gradnorm balances tasks at the encoder, which is frozen; let it learn or take 'accumulate'")
    return [x.parameter for x in found if x.depth == found[-1].depth]


# ------------------------------------------------------------------------------------------- uncertainty
class LogVariances(nn.Module):
    """s by task, learnt with the model's own optimiser."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.s = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(tasks))


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """Weights from the tasks' homoscedastic uncertainty (Kendall et al. 2018): sum of exp(-s) L + s, s = log variance.

    Both terms count fully, so s stays 0 at a loss of 1, which is what our losses are for a random predictor.
    """

    tasks: tuple[str, ...]
    own: LogVariances

    def __call__(self, inputs: StrategyInputs) -> dict[str, float]:
        """See `Strategy`."""
        factors = {name: math.exp(-float(s.detach())) for name, s in zip(self.tasks, self.own.s, strict=True)}
        shares = _task_shares(inputs, factors)
        losses = _sum_over_ranks(inputs, shares, _task_by_task(inputs, shares))
        for name, loss in losses.items():
            s = self.own.s[self.tasks.index(name)]
            slope = inputs.weights.get(name, 1.0) * (1.0 - factors[name] * loss)
            s.grad = torch.full_like(s, slope * inputs.scale)
        return losses


STRATEGIES: dict[str, Callable[[StrategyPlan, tuple[str, ...]], Strategy]] = {
    "accumulate": lambda _plan, _tasks: Accumulate(),
    "joint": lambda _plan, _tasks: Joint(),
    "pcgrad": lambda _plan, _tasks: PCGrad(),
    "gradnorm": lambda plan, tasks: GradNorm(tasks, plan.alpha, plan.rate, Balance(len(tasks))),
    "uncertainty": lambda _plan, tasks: Uncertainty(tasks, LogVariances(len(tasks))),
}
