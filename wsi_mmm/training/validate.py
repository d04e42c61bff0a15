"""Held-out figures by the road that answers take: logits -> the task's `quantise` -> the task's `metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import Task
from wsi_mmm.tasks.reconstruct import Reconstruct
from wsi_mmm.training.data.base import Sample
from wsi_mmm.training.forward import hidden
from wsi_mmm.types import U8

Figures = dict[str, dict[str, float]]
_TOGETHER = 8  # pictures of one size in a pass
_TILES = 64  # tiles of a bag in a pass


def figures(
    model: MultiTaskModel,
    tasks: Mapping[str, Task],
    samples: Iterable[Sample],
    *,
    beat: Callable[[], object] = lambda: None,
) -> Figures:
    """Task -> its metrics over all ``samples`` that know something of it; samples that failed are left out. Pictures
    are rebuilt from what training hides of them, too (the same parts each time).

    ``model`` is in evaluation mode. The quantised answers of all samples are in memory at the end. ``beat`` is called
    after every pass, for those who wait.
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
    """Neighbours that can be looked at together: pictures of one size with targets of the same tasks. Bags go alone."""
    group: list[Sample] = []
    for sample in samples:
        if group and (len(group) == _TOGETHER or _group_key(sample) != _group_key(group[0]) or _is_bag(sample)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _is_bag(sample: Sample) -> bool:
    return sample.vectors is not None or (sample.pixels is not None and sample.pixels.ndim == 4)


def _group_key(sample: Sample) -> tuple[Any, ...]:
    return (_is_bag(sample), None if sample.pixels is None else sample.pixels.shape, frozenset(sample.targets))


def _predict_group(model: MultiTaskModel, tasks: Mapping[str, Task], group: list[Sample]) -> list[dict[str, Any]]:
    """Per sample: task -> its quantised answer."""
    bags = _is_bag(group[0])
    own = {} if bags else {name: task for name, task in tasks.items() if isinstance(task, Reconstruct)}
    names = [name for name in tasks if name in group[0].targets and name not in own]
    if bags and names:
        vectors = _bag_vectors(model, group[0])
        bag = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        logits = model.bag_logits(vectors, bag, names, bags=1)[0]
    elif names or own:
        pixels = np.stack([_pad_pixels(s.pixels, max(model.encoder.strides)) for s in group if s.pixels is not None])
        x = _cast_to_model(model, model.prepare(torch.from_numpy(pixels)))
        logits = model.forward_all(x, names)[1] if names else {}
        logits |= {name: model(hidden(model, task, x, 0)[0], [name])[name] for name, task in own.items()}
    else:
        logits = {}
    found = {name: tasks[name].quantise(value).cpu().numpy() for name, value in logits.items()}
    return [
        {name: _crop_answer(found[name][i], tasks[name], sample) for name in found} for i, sample in enumerate(group)
    ]


def _bag_vectors(model: MultiTaskModel, sample: Sample) -> Tensor:
    """float[m, D] of a bag, from its tiles if need be."""
    if sample.vectors is not None:
        return _cast_to_model(model, torch.from_numpy(sample.vectors).to(model.device))
    tiles = torch.from_numpy(np.ascontiguousarray(sample.pixels))
    return torch.cat(
        [model.features(_cast_to_model(model, model.prepare(part))) for part in torch.split(tiles, _TILES)]
    )


def _cast_to_model(model: MultiTaskModel, x: Tensor) -> Tensor:
    return x.to(next(model.parameters()).dtype)


def _pad_pixels(pixels: U8, multiple: int) -> U8:
    """White at the right and below, up to the next multiple."""
    height, width = (-(-side // multiple) * multiple for side in pixels.shape[:2])
    out = np.full((height, width, 3), 255, np.uint8)
    out[: pixels.shape[0], : pixels.shape[1]] = pixels
    return out


def _crop_answer(answer: Any, task: Task, sample: Sample) -> Any:
    """Without the padding."""
    if task.scope != "pixel" or sample.pixels is None:
        return answer
    height, width = (-(-side // task.stride) for side in sample.pixels.shape[:2])
    return answer[:, :height, :width]
