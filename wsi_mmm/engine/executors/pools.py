"""Pools of workers, by the Dask resources that they were started with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from wsi_mmm.engine.units import Kind

MODELS = "GPU"
"""The Dask resource of workers that run models. Where some have it, the others do everything else."""
READERS = "CPU"
"""That of workers which only read, for the placement "pool"; where no worker has it, all others do that."""
LABEL_RESOURCE = 1e-6  # a tiny amount: the Dask resource is used as a label, not as a quota

Pool = Literal["model", "read", "rest"]
POOLS: tuple[Pool, ...] = ("model", "read", "rest")
# Units that end a slide go first.
PRIORITY_OF_KIND: dict[Kind, int] = {"publish": 3, "interpret": 2, "plan": 1, "extract": 0, "forward": 0}


def pool_of(kind: Kind) -> Pool:
    """The pool of workers that runs units of a kind."""
    return "model" if kind == "forward" else "read" if kind == "extract" else "rest"


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker as the scheduler describes it."""

    threads: int
    resources: dict[str, float]


def workers_with(workers: Iterable[WorkerFacts], resource: str) -> list[WorkerFacts]:
    """The workers that have a resource."""
    return [worker for worker in workers if worker.resources.get(resource)]
