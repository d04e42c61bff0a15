"""Which units were done more than once, and whether what happened to the cluster explains it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

HELD = 10.0  # seconds that a receipt may lie at its worker before the client has it
ENDED = ("ok", "partial", "cached", "failed", "raised")
Reason = Literal["kill", "restart", "fault", "none"]


@dataclass
class Doing:
    """A unit, done once. ``end`` is infinite where its worker died first."""

    name: str
    pid: int
    begin: float
    end: float = float("inf")
    how: str = ""

    @property
    def kind(self) -> str:
        """plan, forward, interpret or publish."""
        return self.name.rsplit("/", 2)[1]


@dataclass
class Tally:
    """``done``: different units that were done; ``again``: how often one was done again, by the reason."""

    done: int = 0
    again: Counter[Reason] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)  # units that were done again for no reason

    @property
    def redone(self) -> int:
        """Units done again."""
        return sum(self.again.values())

    @property
    def explained(self) -> int:
        """Those that a kill or the restart explains. A request that failed does not: it is to be made again, alone."""
        return self.again["kill"] + self.again["restart"]

    @property
    def holds(self) -> bool:
        """The bar: at most 5 % more than what is explained."""
        return self.redone <= 1.05 * self.explained


def doings(lines: Iterable[Mapping[str, Any]]) -> list[Doing]:
    """From the log, in the order in which they began. A thread of a worker does one thing at a time, and a unit is in
    the hands of one thread of a worker at most."""
    found: list[Doing] = []
    running: dict[tuple[int, str], Doing] = {}
    for line in sorted(lines, key=lambda line: line["t"]):
        at = line["pid"], line["name"]
        if line["what"] == "begin":
            running[at] = Doing(line["name"], line["pid"], line["t"])
            found.append(running[at])
        elif line["what"] in ENDED and at in running:
            running[at].end, running[at].how = line["t"], line["what"]
            del running[at]
    return found


def tally(found: Iterable[Doing], killed: Mapping[int, float], restarts: Iterable[float]) -> Tally:
    """``killed``: when each worker was, by process id; ``restarts``: when the scheduler was."""
    times, whole = list(restarts), Tally()
    before: dict[str, Doing] = {}
    for doing in found:
        last = before.get(doing.name)
        if last is None:
            whole.done += 1
        elif doing.how != "cached":  # to look something up is not to do it
            reason = why(last, doing, killed, times)
            whole.again[reason] += 1
            if reason == "none":
                whole.odd.append(doing.name)
        before[doing.name] = doing
    return whole


def why(last: Doing, doing: Doing, killed: Mapping[int, float], restarts: list[float]) -> Reason:
    """Why a unit was done again after ``last``.

    A forward that has ended is in the cache, so neither a receipt that was lost nor a scheduler's restart explains it.
    """
    if last.how in ("failed", "raised"):
        return "fault"
    death = killed.get(last.pid, float("inf"))
    held = 0.0 if doing.kind == "forward" else HELD
    if last.begin <= death <= last.end + held:
        return "kill"
    if doing.kind != "forward" and any(last.begin <= restart <= doing.begin for restart in restarts):
        return "restart"
    return "none"
