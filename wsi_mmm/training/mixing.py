"""The pictures of a step as one micro-batch, so that what looks at whole batches (batch norms) sees every kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor
from torch.nn import functional

from wsi_mmm.tasks import Task
from wsi_mmm.training.loader import TrainBatch
from wsi_mmm.training.policy import key_of
from wsi_mmm.training.warp import unknown_target


def mixed(steps: Iterator[tuple[TrainBatch, ...]], tasks: Mapping[str, Task]) -> Iterator[tuple[TrainBatch, ...]]:
    """``steps``, each of them `together`."""
    with closing(steps):  # type: ignore[type-var]  # a generator, whose threads end with it
        for found in steps:
            yield together(found, tasks)


def together(found: Sequence[TrainBatch], tasks: Mapping[str, Task]) -> tuple[TrainBatch, ...]:
    """Micro-batches of pictures as one, and the others (bags; those of which nothing could be read) as they are.

    Of a task that knows nothing of a micro-batch, the targets of its items are unknown. A task's loss is then the mean
    over the items of the step that it knows, not over its micro-batches.
    """
    some = [batch for batch in found if len(batch) and batch.pixels is not None and batch.bag is None]
    if len(some) < 2:
        return tuple(found)
    names = [name for name in tasks if any(name in batch.targets for batch in some)]
    mixed = TrainBatch(
        "+".join(batch.feed for batch in some),
        tuple(key for batch in some for key in batch.keys),
        pixels=_one_size([batch.pixels for batch in some if batch.pixels is not None]),
        theta=_concatenate([batch.theta for batch in some]),
        sizes=_concatenate([batch.sizes for batch in some]),
        targets={name: torch.cat([_targets_or_unknown(batch, tasks[name]) for batch in some]) for name in names},
        seed=key_of("/".join(str(batch.seed) for batch in some)),
        size=some[0].size,
        failed=tuple(line for batch in some for line in batch.failed),
    )
    return (mixed, *(batch for batch in found if all(batch is not one for one in some)))


def _concatenate(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def _one_size(pictures: Sequence[Tensor]) -> Tensor:
    """uint8[n, H, W, 3] each -> one, with white beside the smaller ones."""
    height, width = (max(t.shape[axis] for t in pictures) for axis in (1, 2))
    edges = [(0, 0, 0, width - t.shape[2], 0, height - t.shape[1]) for t in pictures]
    return torch.cat([functional.pad(t, edge, value=255) for t, edge in zip(pictures, edges, strict=True)])


def _targets_or_unknown(batch: TrainBatch, task: Task) -> Tensor:
    """The targets of a task, unknown ones where the micro-batch has none."""
    found = batch.targets.get(task.info.name)
    if found is not None:
        return found
    info = task.info
    nothing = task.target(unknown_target(info.kind, len(info.classes), batch.size))
    like = next(iter(batch.targets.values()), nothing)
    return nothing.to(like.device).expand(len(batch), *nothing.shape)
