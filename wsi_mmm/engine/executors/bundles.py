"""How units go to Dask's workers: to which of them, in which sequence, and how many together.

Dask's scheduler spends about a millisecond on a message. That is nothing for units of a second; of units that take
20 ms, as many are sent together as take TARGET_BATCH_SECONDS. How long units take is measured from their results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from wsi_mmm.engine.units import Kind, UnitResult, WorkUnit

TARGET_BATCH_SECONDS = 0.5  # that a bundle takes, so that the run does not wait for its last one
MAX_BATCH_UNITS = 16  # units in a bundle
WEIGHT = 0.05  # of a new result in the running mean
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


@dataclass(slots=True)
class UnitPace:
    """Seconds that a unit of each kind takes on a worker, as far as that is known."""

    seconds: dict[Kind, float] = field(default_factory=dict)

    def learn(self, result: UnitResult) -> None:
        """Take in how long a unit took."""
        took, kind = sum(one.length for one in result.facts.times), result.facts.kind
        if took > 0:
            before = self.seconds.get(kind, took)
            self.seconds[kind] = before + WEIGHT * (took - before)

    def size(self, kind: Kind) -> int:
        """Units of a kind that go together; one while nothing is known of them."""
        return min(MAX_BATCH_UNITS, max(1, int(TARGET_BATCH_SECONDS / self.seconds.get(kind, TARGET_BATCH_SECONDS))))


def make_bundles(units: Sequence[WorkUnit], size: int) -> list[list[WorkUnit]]:
    """Bundles of ``size`` units, in their order; the last one may be smaller."""
    return [list(units[start : start + size]) for start in range(0, len(units), size)]
