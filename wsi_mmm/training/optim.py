"""The optimiser's side of a step: which parameters learn how fast, schedules, clipping, averages, half precision.

Gradients come summed over the micro-batches of a step as `strategies` says (per task the mean over its micro-batches),
so how many micro-batches a step has changes neither the rate nor the clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from wsi_mmm.errors import ConfigError, NotFinite
from wsi_mmm.model.layers import depth_of, freeze, layers
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.training.ranks import ALONE, Ranks, owners, spread, total

Schedule = Literal["constant", "linear", "cosine", "poly"]
Precision = Literal["full", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class OptimPlan:
    """How weights move. ``rate`` at the top of the schedule, for the heads; a layer n depths below them has
    ``rate * layer_decay ** n`` (`model.layers`). ``frozen``: depths from the pixels on that do not learn, in evaluation
    mode. ``decay`` spares norms and biases. ``floor``: share of the rate that a schedule ends with. ``clip``: largest
    norm of all gradients together (0: no limit). ``average``: decay of the weights' moving average (0: none)."""

    kind: Literal["adamw", "sgd"] = "adamw"
    rate: float = 1e-3
    decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    layer_decay: float = 1.0
    frozen: int = 0
    schedule: Schedule = "cosine"
    warmup: int = 0
    floor: float = 0.0
    power: float = 0.9
    clip: float = 5.0
    average: float = 0.0
    precision: Precision = "full"


def factor(plan: OptimPlan, step: int, steps: int) -> float:
    """The factor of all learning rates at ``step`` (from 0) of ``steps``: a pure function of these.

    Warm-up rises linearly, reaching 1 at step ``warmup``. From there with p = the share of the rest that is done:
    linear 1 - p; cosine (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017); poly (1 - p) ** power (Chen et al. 2017); each
    raised to end at ``floor``, where it stays after the last step.
    """
    if step < plan.warmup:
        return (step + 1) / (plan.warmup + 1)
    done = min(1.0, (step - plan.warmup) / max(1, steps - plan.warmup))
    return plan.floor + (1.0 - plan.floor) * _SHAPES[plan.schedule](done, plan.power)


_SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda _done, _power: 1.0,
    "linear": lambda done, _power: 1.0 - done,
    "cosine": lambda done, _power: 0.5 * (1.0 + math.cos(math.pi * done)),
    "poly": lambda done, power: (1.0 - done) ** power,
}


# ------------------------------------------------------------------------------------------- what is trained
def begin(model: MultiTaskModel, plan: OptimPlan) -> None:
    """Training mode; the first ``plan.frozen`` depths stay as they are. ConfigError when nothing is left to learn."""
    check_frozen(model, plan)
    freeze(model, plan.frozen)
    training(model)


def check_frozen(model: MultiTaskModel, plan: OptimPlan) -> None:
    """ConfigError when nothing is left to learn."""
    if plan.frozen >= depth_of(model):
        raise ConfigError(f"frozen is {plan.frozen}, but the model has {depth_of(model)} depths; the heads must learn")


def training(model: nn.Module) -> None:
    """Training mode, but evaluation mode for parts none of whose parameters learn (their dropout rests, too)."""
    model.train()
    for part in model.modules():
        held = [p.requires_grad for p in part.parameters()]
        if held and not any(held):
            part.eval()


@dataclass(frozen=True, slots=True)
class Learner:
    """A parameter that learns: its name (unique, kept in checkpoints), its rate relative to the plan's, its decay."""

    name: str
    parameter: nn.Parameter
    factor: float
    decay: float


def learners(model: MultiTaskModel, own: nn.Module, plan: OptimPlan) -> tuple[Learner, ...]:
    """The model's, then the step rule's ("strategy." before their names; at the plan's rate, without decay)."""
    top = depth_of(model) - 1
    found = [
        Learner(x.name, x.parameter, plan.layer_decay ** (top - x.depth), plan.decay if x.parameter.ndim > 1 else 0.0)
        for x in layers(model)
        if x.parameter.requires_grad
    ]
    return (*found, *(Learner(f"strategy.{n}", p, 1.0, 0.0) for n, p in own.named_parameters()))


# ------------------------------------------------------------------------------------------- the optimiser, in shards
class Optimiser:
    """AdamW or SGD over ``learners``, whose state is kept in shards: each rank holds and updates its share of the
    parameters (those `owners` names), then gives them to the others. With one rank it is torch's optimiser."""

    def __init__(self, learning: Sequence[Learner], plan: OptimPlan, ranks: Ranks = ALONE) -> None:
        self.learning = tuple(learning)
        self.plan = plan
        self.ranks = ranks
        self.owners = owners([x.parameter.numel() for x in learning], ranks.world)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for x, owner in zip(learning, self.owners, strict=True):
            if owner == ranks.rank:
                groups.setdefault((x.factor, x.decay), []).append(x.parameter)
        self._inner = _build_optimizer(groups, plan) if groups else None

    def step(self, factor: float) -> None:
        """One step at ``factor`` times the plan's rate; parameters without gradient stay. Gradients are cleared."""
        moved = [x.parameter.grad is not None for x in self.learning]
        if self._inner is not None:
            for group in self._inner.param_groups:
                group["lr"] = self.plan.rate * factor * group["factor"]
            self._inner.step()
        which = [(x.parameter.data, o) for x, o, m in zip(self.learning, self.owners, moved, strict=True) if m]
        spread(self.ranks, [t for t, _ in which], [o for _, o in which])
        self.clear()

    def clear(self) -> None:
        """Forget all gradients."""
        for learner in self.learning:
            learner.parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """ "<parameter>|<slot>" -> tensor, whole, on every rank: every rank must ask for it."""
        ages = total(self.ranks, [self._step_count(x.parameter) for x in self.learning])
        found: dict[str, Tensor] = {}
        for slot in _SLOTS[self.plan.kind]:
            kept = [(x, o) for x, o, age in zip(self.learning, self.owners, ages, strict=True) if age]
            tensors = [self._optimizer_state(x.parameter).get(slot, torch.empty_like(x.parameter)) for x, _ in kept]
            tensors = [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
            spread(self.ranks, tensors, [o for _, o in kept])
            found |= {f"{x.name}|{slot}": t for (x, _), t in zip(kept, tensors, strict=True)}
        steps = {f"{x.name}|step": torch.tensor(a) for x, a in zip(self.learning, ages, strict=True) if a}
        return found | (steps if self.plan.kind == "adamw" else {})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state` gave, also on another number of ranks. KeyError, RuntimeError: of another model."""
        for learner, owner in zip(self.learning, self.owners, strict=True):
            slots = [s for s in _SLOTS[self.plan.kind] if f"{learner.name}|{s}" in state]
            if owner != self.ranks.rank or self._inner is None or not slots:
                continue
            p = learner.parameter
            # Like the parameter in memory, too: the same kernels run, to the same bits.
            into = {s: torch.empty_like(p).copy_(state[f"{learner.name}|{s}"]) for s in slots}
            if self.plan.kind == "adamw":
                into["step"] = state[f"{learner.name}|step"].to(torch.float32)
            self._inner.state[p] = into

    def _optimizer_state(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        return self._inner.state.get(parameter, {}) if self._inner is not None else {}

    def _step_count(self, parameter: nn.Parameter) -> float:
        """Steps so far (SGD: 1 when there were any); 0 when it is another rank's."""
        slots = self._optimizer_state(parameter)
        return float(slots.get("step", 1.0 if any(s in slots for s in _SLOTS[self.plan.kind]) else 0.0))


_SLOTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def _build_optimizer(
    groups: Mapping[tuple[float, float], list[nn.Parameter]], plan: OptimPlan
) -> torch.optim.Optimizer:
    """Torch's optimiser; ``groups``: (rate relative to the plan's, decay) -> parameters."""
    made = [{"params": found, "factor": key[0], "weight_decay": key[1]} for key, found in groups.items()]
    if plan.kind == "adamw":
        return torch.optim.AdamW(made, lr=plan.rate, betas=plan.betas)
    return torch.optim.SGD(made, lr=plan.rate, momentum=plan.momentum)


# ------------------------------------------------------------------------------------------- gradients
@dataclass(frozen=True, slots=True)
class Scale:
    """The factor that keeps small float16 gradients from vanishing, by the rule of torch's GradScaler: halved when a
    gradient overflows, doubled after ``every`` steps without. A value of its own, so that shards and ranks agree and
    checkpoints hold two numbers."""

    value: float = 1.0
    good: int = 0
    every: int = 0

    def after(self, overflow: bool) -> Scale:
        """The scale of the next step. ``every`` 0: always the same."""
        if not self.every:
            return self
        if overflow:
            return replace(self, value=self.value * 0.5, good=0)
        if self.good + 1 >= self.every:
            return replace(self, value=self.value * 2.0, good=0)
        return replace(self, good=self.good + 1)


def first_scale(precision: Precision) -> Scale:
    """As torch begins: 65536, doubled every 2000 steps, for float16; 1 for others, whose exponents are wide enough."""
    return Scale(65536.0, 0, 2000) if precision == "fp16" else Scale()


def autocast_type(precision: Precision) -> torch.dtype | None:
    """The dtype that `TrainingContext.precision` asks for."""
    return {"full": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def ready(learning: Sequence[Learner], plan: OptimPlan, scale: Scale) -> float | None:
    """Undo the scale, clip, and return the norm of the model's gradients; None when float16 overflowed.

    NotFinite when a gradient is NaN or infinite without that excuse. Gradients are the same on every rank by now, so
    all of them come to the same answer.
    """
    found = {x.name: (x.parameter, x.parameter.grad) for x in learning if x.parameter.grad is not None}
    if scale.value != 1.0:
        for _, grad in found.values():
            grad.div_(scale.value)
    mine = {name: pair for name, pair in found.items() if not name.startswith("strategy.")}
    norm = nn.utils.get_total_norm([grad for _, grad in mine.values()])
    if not bool(torch.isfinite(norm)):
        if scale.every:
            return None
        bad = (name for name, (_, grad) in mine.items() if not bool(torch.isfinite(grad).all()))
        which = next(bad, "all parameters together")
        raise NotFinite(f"the gradient of '{which}' became NaN or infinite; lower the rate or the task's weight")
    if plan.clip:
        nn.utils.clip_grads_with_norm_([parameter for parameter, _ in mine.values()], plan.clip, norm)
    return float(norm)


# ------------------------------------------------------------------------------------------- averages
def first_average(model: nn.Module) -> dict[str, Tensor]:
    """A copy of weights and statistics, to be followed."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def follow(average: Mapping[str, Tensor], model: nn.Module, *, step: int, decay: float) -> None:
    """Exponential moving average of weights and batch-norm statistics, in place; faster in the first steps: the share
    of the past is at most (step + 1) / (step + 10)."""
    share = min(decay, (step + 1) / (step + 10))
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1.0 - share)
        else:
            average[key].copy_(value)


@contextmanager
def swapped(model: nn.Module, average: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Give the model the averaged weights, in evaluation mode; afterwards its own again."""
    kept = first_average(model) if average is not None else {}
    try:
        if average is not None:
            model.load_state_dict(dict(average))
        model.eval()
        yield
    finally:
        if average is not None:
            model.load_state_dict(kept)
        training(model)
