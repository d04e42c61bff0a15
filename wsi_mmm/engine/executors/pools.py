"""Which workers do what: pools of places, by the Dask resources that workers say they have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from wsi_mmm.engine.units import Kind

MODELS = "GPU"
"""The Dask resource of workers that run models. Where some have it, the others do everything else."""
READERS = "CPU"
"""That of workers which only read, for the placement "pool"; where no worker has it, all others do that."""
LABEL_RESOURCE = 1e-6  # of a resource that says what a worker is for, and not how much it can do at once

Pool = Literal["model", "read", "rest"]
POOLS: tuple[Pool, ...] = ("model", "read", "rest")
# What ends a slide goes before.
FIRST: dict[Kind, int] = {"publish": 3, "interpret": 2, "plan": 1, "extract": 0, "forward": 0}


def pool_of(kind: Kind) -> Pool:
    """Where works of a kind wait for a place."""
    return "model" if kind == "forward" else "read" if kind == "extract" else "rest"


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the scheduler says of a worker."""

    threads: int
    resources: dict[str, float]


def labelled(workers: Iterable[WorkerFacts], resource: str) -> list[WorkerFacts]:
    """Those that have a resource."""
    return [worker for worker in workers if worker.resources.get(resource)]
