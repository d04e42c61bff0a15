"""Made-up slides and units for `bench_scale`: no pixels, results of the right size, durations of measured runs.

`perform` stands in for ``stages.perform`` on workers; whatever is round it is the real thing.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from wsi_mmm.engine.events import SlideStatus
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import (
    ForwardResult,
    InterpretResult,
    Kind,
    PlanResult,
    PublishResult,
    SlidePlan,
    SlideSummary,
    SlideTask,
    UnitFacts,
    UnitResult,
    WorkUnit,
)
from wsi_mmm.timing import Step, StepTime, worker_name
from wsi_mmm.types import Grid, Level, SlideInfo

FILE = Path(__file__).parent / "scale_units.json"
KINDS: tuple[Kind, ...] = ("plan", "forward", "interpret", "publish")
BLOCK, TILE, OVERLAP = 4, 512, 64
SIDES = (3, 11)  # blocks, both included: 7 x 7 on average, which with interpret, plan and publish makes 100 units
ENCODER = json.dumps({"device": "cpu", "runtime": "eager", "norms": "28 of 32 folded into convolutions", "threads": 2})


@dataclass(frozen=True)
class Durations:
    """Seconds that units take, drawn from measured ones of their kind and divided by ``speed``."""

    measured: dict[str, tuple[float, ...]]
    speed: float = 1.0

    def of(self, kind: Kind, name: str) -> float:
        """Always the same for a name."""
        known = self.measured[kind]
        return known[random.Random(name).randrange(len(known))] / self.speed

    def mean(self, kind: Kind) -> float:
        """Seconds on average."""
        known = self.measured[kind]
        return sum(known) / len(known) / self.speed


def durations(speed: float = 1.0, file: Path = FILE) -> Durations:
    """Those of `scale_record`, small blocks of the border as they were measured, too."""
    units = json.loads(file.read_text())["units"]
    return Durations({kind: tuple(seconds for _, seconds in units[kind]) for kind in KINDS}, speed)


# ---------------------------------------------------------------- slides


def recipe() -> Recipe:
    """That of the default model."""
    return Recipe("default", "0" * 64, ("nuclei", "stain"), 0.5, TILE, OVERLAP, block_tiles=BLOCK)


@dataclass(frozen=True)
class Slides:
    """``count`` slides that differ in size. A slide's rows and columns of blocks stand in its URI."""

    tasks: tuple[SlideTask, ...]
    units: int


def slides(count: int, output: str, seed: int = 0) -> Slides:
    """Their tasks, and how many units they come to."""
    chosen, made, units, shared = random.Random(seed), [], 0, recipe()
    for number in range(count):
        rows, columns = chosen.randint(*SIDES), chosen.randint(*SIDES)
        name = f"slide-{number:06d}"
        made.append(SlideTask(name, f"/no/such/folder/{name}_{rows}x{columns}.svs", f"{output}/{name}", shared))
        units += 2 + 2 * rows * columns
    return Slides(tuple(made), units)


def plan(task: SlideTask) -> SlidePlan:
    """A slide that is all tissue."""
    rows, columns = (int(side) * BLOCK for side in task.uri.rpartition("_")[2].removesuffix(".svs").split("x"))
    stride = TILE - OVERLAP
    width, height = columns * stride + OVERLAP, rows * stride + OVERLAP
    index = np.argwhere(np.ones((rows, columns), bool)).astype(np.int64)
    info = SlideInfo(
        task.uri, width, height, 0.5, 0.5, (Level(width, height, 1.0, 1.0, 256, 256),), "aperio", "tiff", "f" * 32, 20.0
    )
    grid = Grid(TILE, OVERLAP, columns, rows, width, height, 1.0, 1.0, 0.5)
    entry = f"{task.output}/.work/{'0' * 32}/cache/{'f' * 32}/{'0' * 32}"
    # Halo and overlap as the default model has them: a block is interpreted when those round it are in.
    return SlidePlan(task, info, grid, index, np.ones(len(index), np.float32), entry, 140, 2, 0.5)


# ---------------------------------------------------------------- units


@dataclass
class Fake:
    """What stands in for ``stages.perform``; ``done`` counts."""

    durations: Durations
    done: int = 0
    hosts: dict[int, str] = field(default_factory=dict)

    def perform(self, unit: WorkUnit, fetches: object = None) -> UnitResult:
        """Sleep as long as the unit would take; give a result like the one it would give."""
        start = time.time()
        time.sleep(self.durations.of(unit.kind, unit.name))
        self.done += 1
        return result(unit, start, time.time())


def result(unit: WorkUnit, start: float, end: float) -> UnitResult:
    """Of the size that results have; its steps end when the unit ended."""
    facts = UnitFacts(
        unit.kind, unit.slide.id, unit.block, os.getpid(), worker_name(), 10_000_000, 1400.0,
        tuple(_times(unit.kind, start, end)),
    )  # fmt: skip
    if unit.kind == "plan":
        return PlanResult(facts, plan(unit.slide))
    if unit.kind == "forward":
        return ForwardResult(facts, len(unit.index()), device="cpu", encoder=ENCODER)
    if unit.kind == "interpret":
        return InterpretResult(facts, 100)
    return PublishResult(facts, _published())


def _times(kind: Kind, start: float, end: float) -> list[StepTime]:
    """A forward passes three threads, the others one."""
    if kind != "forward":
        stage = "write" if kind == "publish" else "prepare" if kind == "plan" else "interpret"
        return [StepTime(cast("Step", kind), 3, start, end, {stage: end - start})]
    third = (end - start) / 3
    parts: tuple[tuple[Step, str, str], ...] = (
        ("read", "decode", "fetch"), ("model", "model", "prepare"), ("write", "write", "write")
    )  # fmt: skip
    return [
        StepTime(step, thread, start + thread * third, start + (thread + 1) * third, {other: 0.0, stage: third})
        for thread, (step, stage, other) in enumerate(parts)
    ]


def _published() -> SlideSummary:
    """The summary of a slide.json."""
    classes = {"nuclei": {"nucleus": 5000}, "stain": {"H&E": 784, "IHC": 0, "Giemsa": 0, "other": 0}}
    files = {name: f"{name}.out" for name in ("geojson", "overlay", "tiles", "features")}
    return SlideSummary(SlideStatus.DONE, 784, {"nuclei": 5000}, classes, files, 0.5, "tiff")
