"""Short units travel together: what it costs to send one does not depend on how long it takes.

A scheduler spends about a millisecond on a message, wherever it goes. Units of a second do not feel it; of those that
take 20 ms a bundle of a dozen is sent, which takes no longer than WHILE. How long they take is learnt from receipts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wsi_mmm.engine.units import Kind, UnitResult, WorkUnit

TARGET_BATCH_SECONDS = 0.5  # seconds that a bundle takes, so that the last one of a run is not waited for
MAX_BATCH_UNITS = 16  # units in a bundle
WEIGHT = 0.05  # of a new receipt, beside those before


@dataclass(slots=True)
class Pace:
    """Seconds that a unit of each kind takes on a worker, as far as that is known."""

    seconds: dict[Kind, float] = field(default_factory=dict)

    def learn(self, result: UnitResult) -> None:
        """Take in how long a unit took."""
        took = sum(lap.end - lap.start for lap in result.laps)
        if took > 0:
            before = self.seconds.get(result.kind, took)
            self.seconds[result.kind] = before + WEIGHT * (took - before)

    def size(self, kind: Kind) -> int:
        """Units of a kind that go together; one while nothing is known of them."""
        return min(MAX_BATCH_UNITS, max(1, int(TARGET_BATCH_SECONDS / self.seconds.get(kind, TARGET_BATCH_SECONDS))))


def bundled(units: Sequence[WorkUnit], size: int) -> list[list[WorkUnit]]:
    """In their order, so many in each; the last bundle may be smaller."""
    return [list(units[start : start + size]) for start in range(0, len(units), size)]
