"""Short units are sent together, because the cost of sending does not depend on how long a unit takes.

Dask's scheduler spends about a millisecond on a message. That is nothing for units of a second; of units that take
20 ms, as many are sent together as take TARGET_BATCH_SECONDS. How long units take is measured from their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wsi_mmm.engine.units import Kind, UnitResult, WorkUnit

TARGET_BATCH_SECONDS = 0.5  # that a bundle takes, so that the run does not wait for its last one
MAX_BATCH_UNITS = 16  # units in a bundle
WEIGHT = 0.05  # of a new result in the running mean


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
