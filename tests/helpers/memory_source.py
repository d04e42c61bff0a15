"""A source whose items are in memory: whole pictures, tiles cut to size, or bags; some may fail."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from wsi_mmm.tasks.targets import Target
from wsi_mmm.training.data.base import ItemIndex, Sample
from wsi_mmm.types import F32, I32, I64, U8

COLOURS = np.array([(230, 225, 232), (200, 40, 90), (60, 60, 190), (30, 160, 90)], np.uint8)


@dataclass(frozen=True)
class MemorySource:
    """``broken``: keys of items that cannot be read. ``wait``: seconds that reading takes, longer for even numbers.
    ``asked``: sizes that were asked for."""

    name: str
    samples: tuple[Sample, ...]
    labels: tuple[int, ...]
    tasks: tuple[str, ...]
    groups: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()
    wait: float = 0.0
    asked: list[int] = field(default_factory=list)

    @property
    def index(self) -> ItemIndex:
        keys = [sample.key for sample in self.samples]
        return ItemIndex(keys, self.groups or keys, np.array(self.labels, np.int32))

    def read(self, numbers: Sequence[int], size: int) -> list[Sample]:
        self.asked.append(size)
        if self.wait:
            time.sleep(self.wait * (2 - numbers[0] % 2))
        found = [self.samples[n] for n in numbers]
        return [Sample(s.key, failed="damaged") if s.key in self.broken else s for s in found]


def discs(seed: int, height: int, width: int) -> tuple[U8, I32]:
    """A picture whose px have the colour of their label: discs of classes 1 to 3 on ground 0; and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int32)
    y, x = np.mgrid[:height, :width]
    for _ in range(max(4, height * width // 1200)):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(6, 14)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = rng.integers(1, 4)
    return COLOURS[labels], labels


def picture_source(
    name: str, count: int, *, size: int = 96, targets: Mapping[str, Target] | None = None, **more: object
) -> MemorySource:
    """Pictures of discs; ``truths`` of all of them (a task called "discs" gets the labels, "class" the item's number
    modulo 3)."""
    samples, known = [], dict(targets or {})
    for i in range(count):
        pixels, labels = discs(i, size, size)
        own: dict[str, Target] = {"discs": labels, "class": i % 3}
        samples.append(Sample(f"{name}-{i}", pixels, targets={**{k: own.get(k, v) for k, v in known.items()}}))
    made = MemorySource(name, tuple(samples), tuple(i % 3 for i in range(count)), tuple(known))
    return replace(made, **more)  # type: ignore[arg-type]


def bag_source(name: str, sizes: Sequence[int], *, width: int = 6, tiles: int = 0) -> MemorySource:
    """Bags of features float32[k, width], or of k tiles of ``tiles`` px; the task "grade": its number modulo 2."""
    rng = np.random.default_rng(len(sizes))
    samples = []
    for i, k in enumerate(sizes):
        vectors: F32 | None = None if tiles else rng.standard_normal((k, width)).astype(np.float32) + i
        pixels: U8 | None = rng.integers(0, 256, (k, tiles, tiles, 3), np.uint8) if tiles else None
        xy: I64 = np.zeros((k, 2), np.int64)
        samples.append(Sample(f"{name}-{i}", pixels, vectors, xy, targets={"grade": i % 2}))
    return MemorySource(name, tuple(samples), tuple(i % 2 for i in range(len(sizes))), ("grade",))
