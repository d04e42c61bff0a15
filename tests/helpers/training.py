"""Tiny models, tasks of every kind and batches made of noise, for tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wsi_mmm.model.card import BagCard, DecoderCard, EncoderCard, ModelCard, NeckCard, TaskCard
from wsi_mmm.model.checkpoint import build_model
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import Task, make_task
from wsi_mmm.tasks.targets import Boxes, Survival
from wsi_mmm.training.loader import TrainBatch

SIZE = 64
Rng = np.random.Generator


@dataclass(frozen=True)
class Kind:
    """How a kind of task is described in a card, and a random truth of it."""

    head: str
    outputs: int
    classes: tuple[str, ...]
    target: Callable[[Rng], Any]
    params: Mapping[str, float] = None  # type: ignore[assignment]
    kind: str = ""

    def card(self, name: str, kind: str) -> TaskCard:
        """The card of a task called ``name``."""
        return TaskCard(
            name=name, kind=self.kind or kind, head=self.head, outputs=self.outputs, classes=self.classes,  # type: ignore[arg-type]
            colors=((1, 2, 3),) * len(self.classes), params=dict(self.params or {}),
        )  # fmt: skip


def discs(rng: Rng) -> np.ndarray:
    """Labels int32[SIZE, SIZE] of a few discs, and one row that is unknown of all of them."""
    y, x = np.mgrid[:SIZE, :SIZE]
    labels = np.zeros((SIZE, SIZE), np.int32)
    for number in range(1, 7):
        labels[(y - rng.uniform(0, SIZE)) ** 2 + (x - rng.uniform(0, SIZE)) ** 2 < 49] = number
    return labels


def boxes(rng: Rng) -> Boxes:
    """Five boxes of two classes."""
    corner = rng.uniform(0, SIZE - 20, (5, 2))
    xyxy = np.concatenate([corner, corner + rng.uniform(6, 18, (5, 2))], axis=1).astype(np.float32)
    return Boxes(xyxy, rng.integers(0, 2, 5).astype(np.int32), SIZE, SIZE)


KINDS: dict[str, Kind] = {
    "classify": Kind("vector", 3, ("a", "b", "c"), lambda r: int(r.integers(-1, 3))),
    "multilabel": Kind("vector", 2, ("a", "b"), lambda r: r.integers(0, 2, 2).astype(np.float32)),
    "regress": Kind("vector", 2, ("a", "b"), lambda r: r.normal(size=2).astype(np.float32)),
    "survive": Kind("vector", 1, ("death",), lambda r: Survival(float(r.uniform(1, 9)), bool(r.integers(0, 2)))),
    "segment": Kind("map", 3, ("x", "y", "z"), lambda r: r.integers(-1, 3, (SIZE, SIZE)).astype(np.int32)),
    "multisegment": Kind("map", 2, ("x", "y"), lambda r: r.integers(-1, 2, (2, SIZE, SIZE)).astype(np.int8)),
    "instances": Kind("map", 4, ("nucleus",), discs),
    "detect": Kind("dense", 6, ("p", "q"), boxes),
    "reconstruct": Kind("image", 3, ("image",), lambda _r: None),
}
BAGS = {
    f"bag-{name}": Kind("bag", kind.outputs, kind.classes, kind.target, kind.params, name)
    for name, kind in KINDS.items()
    if kind.head == "vector"
}


def tiny(kinds: Sequence[str], *, seed: int = 0, encoder: str = "resnet18") -> tuple[MultiTaskModel, dict[str, Task]]:
    """A model with a task "t0", "t1" .. of each of ``kinds``, random weights that depend on ``seed`` alone."""
    cards = tuple({**KINDS, **BAGS}[kind].card(f"t{i}", kind) for i, kind in enumerate(kinds))
    card = ModelCard(
        name="tiny", encoder=EncoderCard(name=encoder, args={"channels": [8, 16, 24, 32]}),
        decoder=DecoderCard(bottleneck=16, widths=(8, 8, 16, 16)), neck=NeckCard(width=8),
        bag=BagCard(kind="gated", width=16, hidden=8), mpp=0.5, tile_size=SIZE, overlap=0,
        mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2), tasks=cards,
    )  # fmt: skip
    torch.manual_seed(seed)
    return build_model(card), {c.name: make_task(c) for c in cards}


def batch(
    tasks: Mapping[str, Task], kinds: Mapping[str, str], *, seed: int, items: int = 3, feed: str = "feed"
) -> TrainBatch:
    """Noise with random truths for ``kinds`` (task name -> kind); bags of one to three tiles when one is a bag's."""
    rng = np.random.default_rng(seed)
    every = {**KINDS, **BAGS}
    targets = {
        name: torch.stack([tasks[name].target(every[kind].target(rng)) for _ in range(items)])
        for name, kind in kinds.items()
    }
    bags = any(kind in BAGS for kind in kinds.values())
    bag = torch.from_numpy(np.repeat(np.arange(items), rng.integers(1, 4, items))) if bags else None
    tiles = items if bag is None else len(bag)
    pixels = torch.from_numpy(rng.integers(0, 256, (tiles, SIZE, SIZE, 3), np.uint8))
    keys = tuple(f"{feed}/{seed}/{i}" for i in range(items))
    return TrainBatch(feed, keys, pixels=pixels, bag=bag, targets=targets, seed=seed, size=SIZE)


def rounds(
    tasks: Mapping[str, Task], kinds: Sequence[Mapping[str, str]], *, first: int = 0, steps: int, seed: int = 0
) -> Iterator[tuple[TrainBatch, ...]]:
    """Per step one batch for each of ``kinds``; a pure function of the step."""
    for step in range(first, steps):
        yield tuple(batch(tasks, k, seed=seed + 1000 * step + i, feed=f"feed{i}") for i, k in enumerate(kinds))
