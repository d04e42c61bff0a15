"""The model in training: from a micro-batch to its losses, and from held-out samples to their metrics.

Losses: the shared part of the model runs once per micro-batch, then each head on its output. Metrics are computed from
what a run would give: logits, quantised by the task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wsi_mmm.model.multitask import MultiTaskModel, normalise
from wsi_mmm.tasks import Task
from wsi_mmm.tasks.reconstruct import Reconstruct
from wsi_mmm.training.data.base import Sample
from wsi_mmm.types import U8

if TYPE_CHECKING:
    from wsi_mmm.training.loader import TrainBatch
    from wsi_mmm.training.ranks import Norms

Preprocess = Callable[[MultiTaskModel, "TrainBatch"], Tensor]
Figures = dict[str, dict[str, float]]
"""Task -> metric -> value."""

_TOGETHER = 8  # validation pictures of one size in a pass
_TILES = 64  # tiles of a validation bag in a pass


def plain(model: MultiTaskModel, batch: TrainBatch) -> Tensor:
    """The pixels as they are, normalised: float[n, 3, h, w]."""
    if batch.pixels is None:
        raise ValueError(f"a batch of '{batch.feed}' has no pixels")
    return model.prepare(batch.pixels)


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """A model with its tasks, and how batches are prepared for it.

    ``look`` warps, colours and normalises pixels. ``precision``: the dtype of convolutions and matrix products (None:
    that of the weights); losses are always computed in float32 or float64. ``norms``: keeps the running statistics of
    batch norms; None when they need not be kept.
    """

    model: MultiTaskModel
    tasks: Mapping[str, Task]
    look: Preprocess = plain
    precision: torch.dtype | None = None
    norms: Norms | None = None


# ---------------------------------------------------------------- losses of a micro-batch


def served(context: TrainingContext, batch: TrainBatch) -> tuple[str, ...]:
    """Names of the tasks that ``batch`` has targets of; none when all of its items failed."""
    return tuple(name for name in context.tasks if name in batch.targets) if len(batch) else ()


def passes(context: TrainingContext, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Group ``names`` by forward pass: one pass for all tasks that read the same pictures, and one for each
    `reconstruct` task, whose pictures have parts hidden."""
    own = [name for name in names if isinstance(context.tasks[name], Reconstruct)]
    rest = tuple(name for name in names if name not in own)
    return [*([rest] if rest else []), *((name,) for name in own)]


def shared(context: TrainingContext, batch: TrainBatch, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run encoder, decoder, neck and aggregator once, as far as the heads of ``names`` (one group of `passes`) read
    them; return by task the tensor that its head reads, and its target.

    Tasks whose heads read the same tensor share it. Random layers (dropout) are seeded by the batch, so the result does
    not depend on which rank computes the batch, or when.
    """
    torch.manual_seed(batch.seed & 0x7FFFFFFFFFFFFFFF)
    model = context.model
    kinds = {name: model.kinds[name] for name in names}
    x = None if batch.pixels is None else _cast_to_weights(model, context.look(model, batch))
    targets = {name: batch.targets[name] for name in names}
    first = context.tasks[names[0]]
    if x is not None and isinstance(first, Reconstruct):
        x, targets[names[0]] = hidden(model, first, x, batch.seed)
    with _autocast_context(context):
        found: dict[str, Tensor] = {}
        if x is not None:
            found = model.trunk(x, kinds.values())
        elif batch.vectors is not None:
            found = {"vector": _cast_to_weights(model, batch.vectors)}
        if "bag" in kinds.values() and model.grouper is not None and batch.bag is not None:
            found["bag"] = model.grouper(found["vector"], batch.bag, len(batch))[0]
    return {name: (found[kind], targets[name]) for name, kind in kinds.items()}


def hidden(model: MultiTaskModel, task: Reconstruct, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Hide parts of normalised pictures float[n, 3, h, w]; return them, normalised again, and the target."""
    mean, std = (model.get_buffer(name).to(x.dtype) for name in ("mean", "std"))
    shown, target = task.hide((x * std + mean) / 255.0, seed)
    return normalise(shown * 255.0, mean, std), target


def loss_of(context: TrainingContext, name: str, read: Tensor, target: Tensor) -> Tensor:
    """Run the head of one task on ``read`` and return its loss, a scalar."""
    with _autocast_context(context):
        logits = context.model.heads[name](read)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    target = target.to(logits.device, non_blocking=True)
    return context.tasks[name].loss(logits, target.to(logits.dtype) if target.is_floating_point() else target)


def _cast_to_weights(model: MultiTaskModel, x: Tensor) -> Tensor:
    """``x`` in the dtype and on the device of the weights: tests train in float64."""
    like = next(model.parameters())
    return x.to(like.device, like.dtype, non_blocking=True)


def _autocast_context(context: TrainingContext) -> contextlib.AbstractContextManager[object]:
    if context.precision is None:
        return contextlib.nullcontext()
    return torch.autocast(context.model.device.type, context.precision)


# ---------------------------------------------------------------- metrics of held-out samples


def figures(
    model: MultiTaskModel,
    tasks: Mapping[str, Task],
    samples: Iterable[Sample],
    *,
    beat: Callable[[], object] = lambda: None,
) -> Figures:
    """Task -> its metrics over all ``samples`` that have a target of it; samples that failed are left out. Pictures are
    also rebuilt from what training hides of them (the same parts each time).

    ``model`` is in evaluation mode. The quantised answers of all samples are in memory at the end. ``beat`` is called
    after every pass, for other ranks that wait.
    """
    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in tasks}
    with torch.inference_mode():
        for group in _iter_groups(sample for sample in samples if not sample.failed):
            for sample, answers in zip(group, _predict_group(model, tasks, group), strict=True):
                for name, answer in answers.items():
                    target = sample.pixels if isinstance(tasks[name], Reconstruct) else sample.targets[name]
                    pairs[name].append((target, answer))
            beat()
    return {name: tasks[name].metrics(found) for name, found in pairs.items() if found}


def _iter_groups(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Neighbours that one pass can take: pictures of one size with targets of the same tasks. Bags go alone."""

    def key(sample: Sample) -> tuple[Any, ...]:
        return sample.bag_size, None if sample.pixels is None else sample.pixels.shape, frozenset(sample.targets)

    group: list[Sample] = []
    for sample in samples:
        together = len(group) < _TOGETHER and sample.bag_size is None
        if group and not (together and key(sample) == key(group[0])):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _predict_group(model: MultiTaskModel, tasks: Mapping[str, Task], group: list[Sample]) -> list[dict[str, Any]]:
    """Per sample: task -> its quantised answer."""
    bags = group[0].bag_size is not None
    own = {} if bags else {name: task for name, task in tasks.items() if isinstance(task, Reconstruct)}
    names = [name for name in tasks if name in group[0].targets and name not in own]
    logits: dict[str, Tensor] = {}
    if bags and names:
        vectors = _bag_vectors(model, group[0])
        bag = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        logits = model.bag_logits(vectors, bag, names, bags=1)[0]
    elif names or own:
        pixels = np.stack([_pad_pixels(s.pixels, max(model.encoder.strides)) for s in group if s.pixels is not None])
        x = _cast_to_weights(model, model.prepare(torch.from_numpy(pixels)))
        logits = model(x, names) if names else {}
        logits |= {name: model(hidden(model, task, x, 0)[0], [name])[name] for name, task in own.items()}
    found = {name: tasks[name].quantise(value).cpu().numpy() for name, value in logits.items()}
    return [
        {name: _crop_answer(found[name][i], tasks[name], sample) for name in found} for i, sample in enumerate(group)
    ]


def _bag_vectors(model: MultiTaskModel, sample: Sample) -> Tensor:
    """float[m, D] of a bag, from its tiles if need be."""
    if sample.vectors is not None:
        return _cast_to_weights(model, torch.from_numpy(sample.vectors))
    tiles = torch.from_numpy(np.ascontiguousarray(sample.pixels))
    return torch.cat(
        [model.features(_cast_to_weights(model, model.prepare(part))) for part in torch.split(tiles, _TILES)]
    )


def _pad_pixels(pixels: U8, multiple: int) -> U8:
    """Add white at the right and below, up to the next multiple."""
    down, across = (-side % multiple for side in pixels.shape[:2])
    return np.pad(pixels, ((0, down), (0, across), (0, 0)), constant_values=255)


def _crop_answer(answer: Any, task: Task, sample: Sample) -> Any:
    """Without the padding."""
    if task.scope != "pixel" or sample.pixels is None:
        return answer
    height, width = (-(-side // task.stride) for side in sample.pixels.shape[:2])
    return answer[:, :height, :width]
