"""Common parts of model exports: the traced graph, its metadata, and the check that it agrees with the model.

An export takes ``pixels`` uint8[n, h, w, 3] (RGB; normalising is part of the graph) and gives ``features``
float32[n, D] and the logits of each task. n is free; h and w are free for convolutional encoders, else fixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import card_json
from wsi_mmm.model.multitask import MultiTaskModel, normalise
from wsi_mmm.types import U8

TOLERANCE = 1e-3
"""Largest difference between an export and the model, as a share of the largest answer, that is published."""

PIXELS, FEATURES = "pixels", "features"
STEP = 32  # px: the coarsest stride of the encoders

Session = Callable[[U8], list[np.ndarray[Any, Any]]]
"""uint8[n, h, w, 3] -> features and the asked-for answers, float32, in the file's order."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported file. ``side``: the one tile size in px that fits, or None: any multiple of 32 px, also oblong.

    ``difference``: the largest from the model on seeded noise, as a share of the largest answer.
    """

    path: Path
    tasks: tuple[str, ...]
    side: int | None
    difference: float


class Graph(nn.Module):
    """The traced module: pixels in, a tuple of answers out."""

    def __init__(self, model: MultiTaskModel, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.tasks = model, tasks

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """uint8[n, h, w, 3] -> (features, logits, ...)."""
        x = pixels.permute(0, 3, 1, 2).float()
        x = normalise(x, self.model.get_buffer("mean"), self.model.get_buffer("std"))
        vector, logits = self.model.forward_all(x, self.tasks)
        return (vector, *(logits[name] for name in self.tasks))


def select_tasks(model: MultiTaskModel, tasks: Sequence[str] | None) -> tuple[str, ...]:
    bags = {task.name for task in model.card.tasks if task.head == "bag"}
    names = tuple(name for name in model.tasks if name not in bags) if tasks is None else tuple(dict.fromkeys(tasks))
    for name in names:
        if name not in model.heads:
            raise ModelError(f"the model has no task '{name}'; it has: {', '.join(model.tasks) or 'none'}")
        if name in bags:
            raise ModelError(
                f"task '{name}' answers for many tiles at once; a file holds what a tile gives: leave it out"
            )
        if name in (PIXELS, FEATURES):
            raise ModelError(f"a task called '{name}' cannot be exported: the file uses that name itself; rename it")
    return names


def fits_any_size(model: MultiTaskModel) -> bool:
    """Return whether the tile size can stay free: transformers and TensorFlow's padding depend on it."""
    if model.encoder.resampled:
        return False
    kinds = {type(module).__name__ for module in model.modules()}
    return not any("Attention" in kind or kind.endswith(("Same", "MSA2d")) for kind in kinds)


def facts(model: MultiTaskModel, tasks: tuple[str, ...]) -> dict[str, str]:
    """Metadata of the file: text, JSON where it is not a plain value."""
    card = model.card
    described = [
        {"name": task.name, "kind": task.kind, "head": task.head, "classes": task.classes}
        for task in (card.task(name) for name in tasks)
    ]
    return {
        "wsi_mmm.model": card.name,
        "wsi_mmm.card_sha256": hashlib.sha256(card_json(card).encode()).hexdigest(),
        "wsi_mmm.mpp": f"{card.mpp:g}",
        "wsi_mmm.tile_size": str(card.tile_size),
        "wsi_mmm.tasks": json.dumps(described),
    }


def seeded_noise(count: int, height: int, width: int) -> Tensor:
    """Seeded noise uint8[count, height, width, 3]."""
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), generator=numbers, dtype=torch.uint8)


def compare_export(graph: Graph, session: Session, side: int | None, name: str) -> float:
    """The largest difference between ``session``, which ``name`` runs, and the model on seeded noise, as a share of the
    largest answer. ModelError beyond `TOLERANCE`."""
    card = graph.model.card.tile_size
    sizes = [(side, side)] if side else [(card, card), (2 * STEP, 3 * STEP)]
    worst = 0.0
    for height, width in sizes:
        pixels = seeded_noise(3, height, width)
        with torch.inference_mode():
            vector, logits = graph.model.forward_all(graph.model.prepare(pixels), graph.tasks)
        for wanted, found in zip([vector, *logits.values()], session(pixels.numpy()), strict=True):
            apart = np.abs(found - wanted.numpy()).max() / max(float(wanted.abs().max()), 1e-30)
            worst = max(worst, float(apart) if np.isfinite(apart) else float("inf"))
    if worst > TOLERANCE:
        raise ModelError(
            f"{name}'s answers differ from torch's by {worst:.1e} of the largest, beyond {TOLERANCE:g}; "
            "nothing was written: use --runtime eager"
        )
    return worst
