"""From a micro-batch to its losses: the shared part of the model once, then head by head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wsi_mmm.model.multitask import MultiTaskModel, normalise
from wsi_mmm.tasks import Task
from wsi_mmm.tasks.reconstruct import Reconstruct

if TYPE_CHECKING:
    from wsi_mmm.training.loader import TrainBatch
    from wsi_mmm.training.norms import Norms

Preprocess = Callable[[MultiTaskModel, "TrainBatch"], Tensor]


def plain(model: MultiTaskModel, batch: TrainBatch) -> Tensor:
    """The pixels as they are, normalised: float[n, 3, h, w]."""
    if batch.pixels is None:
        raise ValueError(f"a batch of '{batch.feed}' has no pixels")
    return model.prepare(batch.pixels)


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """A model with its tasks, and how it looks at batches.

    ``look`` warps, colours and normalises pixels. ``precision``: what convolutions and products are computed in (None:
    as the weights are); losses always in float32 or float64. ``norms``: see there; None when nobody asks.
    """

    model: MultiTaskModel
    tasks: Mapping[str, Task]
    look: Preprocess = plain
    precision: torch.dtype | None = None
    norms: Norms | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """A batch after the shared part: by task what its head reads, and its target."""

    reads: dict[str, Tensor]
    targets: dict[str, Tensor]


def served(bench: TrainingContext, batch: TrainBatch) -> tuple[str, ...]:
    """Names of the tasks that learn from ``batch``; none when all of its items failed."""
    return tuple(name for name in bench.tasks if name in batch.targets) if len(batch) else ()


def passes(bench: TrainingContext, names: Sequence[str]) -> list[tuple[str, ...]]:
    """``names`` by the passes that they need: one for all, and one more for each task that looks at a picture of its
    own, parts of it hidden."""
    own = [name for name in names if isinstance(bench.tasks[name], Reconstruct)]
    rest = tuple(name for name in names if name not in own)
    return [*([rest] if rest else []), *((name,) for name in own)]


def shared(bench: TrainingContext, batch: TrainBatch, names: Sequence[str]) -> Shared:
    """One pass of encoder, decoder, neck and aggregator, as far as ``names`` (one of `passes`) need them.

    Tasks whose heads read the same share one tensor. What is random in the model (dropout) is drawn from the batch's
    own seed, so it does not matter which rank does the batch, or when.
    """
    torch.manual_seed(batch.seed & 0x7FFFFFFFFFFFFFFF)
    model = bench.model
    kinds = {name: model.kinds[name] for name in names}
    x = None if batch.pixels is None else _cast_to_weights(model, bench.look(model, batch))
    targets = {name: batch.targets[name] for name in names}
    first = bench.tasks[names[0]]
    if x is not None and isinstance(first, Reconstruct):
        x, targets[names[0]] = hidden(model, first, x, batch.seed)
    with _autocast_context(bench):
        found: dict[str, Tensor] = {}
        if x is not None:
            found = model.trunk(x, kinds.values())
        elif batch.vectors is not None:
            found = {"vector": _cast_to_weights(model, batch.vectors)}
        if "bag" in kinds.values() and model.grouper is not None and batch.bag is not None:
            found["bag"] = model.grouper(found["vector"], batch.bag, len(batch))[0]
    return Shared({name: found[kind] for name, kind in kinds.items()}, targets)


def hidden(model: MultiTaskModel, task: Reconstruct, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised pictures float[n, 3, h, w] -> the same with parts hidden, and the target for them."""
    mean, std = (model.get_buffer(name).to(x.dtype) for name in ("mean", "std"))
    shown, target = task.hide((x * std + mean) / 255.0, seed)
    return normalise(shown * 255.0, mean, std), target


def loss_of(bench: TrainingContext, name: str, read: Tensor, target: Tensor) -> Tensor:
    """The loss of one task, from what its head reads."""
    with _autocast_context(bench):
        logits = bench.model.heads[name](read)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    target = target.to(logits.device, non_blocking=True)
    return bench.tasks[name].loss(logits, target.to(logits.dtype) if target.is_floating_point() else target)


def _cast_to_weights(model: MultiTaskModel, x: Tensor) -> Tensor:
    """In the weights' own type and place: tests train in float64."""
    like = next(model.parameters())
    return x.to(like.device, like.dtype, non_blocking=True)


def _autocast_context(bench: TrainingContext) -> contextlib.AbstractContextManager[object]:
    if bench.precision is None:
        return contextlib.nullcontext()
    return torch.autocast(bench.model.device.type, bench.precision)
