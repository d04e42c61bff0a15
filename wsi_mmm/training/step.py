"""One optimiser step over all tasks, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import Task
from wsi_mmm.training.compose import Batch

MAX_NORM = 5.0


def losses(model: MultiTaskModel, batch: Batch, tasks: Mapping[str, Task]) -> dict[str, Tensor]:
    """Each task's loss, from one encoder pass over the whole batch (so that batch norm sees every kind of picture)."""
    logits = model(model.prepare(batch.pixels.permute(0, 2, 3, 1) * 255.0), list(tasks))
    return {name: task.loss(logits[name], batch.targets[name]) for name, task in tasks.items()}


def accumulate(found: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """Backward, task by task, into the same gradients: their sum is the joint loss's gradient. Returns the values."""
    names = list(found)
    for name in names:
        (found[name] * weights.get(name, 1.0)).backward(retain_graph=name != names[-1])  # type: ignore[no-untyped-call]
    return {name: float(value.detach()) for name, value in found.items()}


def backward(found: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """The same gradients as `accumulate` in one pass over the shared graph: faster, and the default."""
    torch.stack([value * weights.get(name, 1.0) for name, value in found.items()]).sum().backward()  # type: ignore[no-untyped-call]
    return {name: float(value.detach()) for name, value in found.items()}


def apply(model: nn.Module, optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Clip the gradients to norm `MAX_NORM`, step at learning rate ``rate``, clear them."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def learning_rate(step: int, *, steps: int, top: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 2 % of ``top`` (Loshchilov & Hutter 2017)."""
    wave = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))
    return top * min(1.0, (step + 1) / max(1, warmup)) * (0.98 * wave + 0.02)


def follow(average: dict[str, Tensor], model: nn.Module, *, step: int, decay: float) -> None:
    """Exponential moving average of weights and batch-norm statistics, in place; faster in the first steps."""
    share = min(decay, (step + 1) / (step + 20))
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                average[key].mul_(share).add_(value, alpha=1.0 - share)
            else:
                average[key].copy_(value)
