"""What a run says, and who is shown what."""

from __future__ import annotations

from dataclasses import dataclass, field

from wsi_mmm.engine.events import Event, WatchedExecutor, greet
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import Kind, SlideTask, UnitResult, WorkUnit

WORK = WorkUnit("plan", SlideTask("s", "s.svs", "out/s", Recipe("default", "hash", (), 0.5, 256, 0)))


@dataclass
class Echo:
    """An executor that has done everything as soon as it is asked to."""

    warnings: tuple[str, ...] = ("worker a cannot be used: no torch",)
    dashboard: str = "http://scheduler:8787/status"
    flying: list[WorkUnit] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)

    def room(self, kind: Kind) -> int:
        return 3 - len(self.flying)

    def start(self, unit: WorkUnit) -> None:
        self.flying.append(unit)

    def wait(self, timeout: float) -> UnitResult | None:
        if not self.flying:
            return None
        unit = self.flying.pop()
        return UnitResult(unit.kind, unit.slide.id, unit.block, "ok")

    def close(self, *, cancel: bool = False) -> None:
        self.closed.append(cancel)


def test_a_watched_executor_is_the_executor() -> None:
    """It starts, waits and closes as the one within; each watch sees every work and every receipt, and no silence."""
    inner, one, two = Echo(), list[WorkUnit | UnitResult](), list[WorkUnit | UnitResult]()
    watched = WatchedExecutor(inner, one.append, two.append)
    assert watched.room("plan") == 3
    watched.start(WORK)
    assert watched.room("plan") == 2
    result = watched.wait(0)
    assert result is not None and result.name == WORK.name == "s/plan/0-0"
    assert watched.wait(0) is None
    assert one == two == [WORK, result]
    watched.close(cancel=True)
    assert inner.closed == [True]


def test_an_executor_says_what_it_has_to_say() -> None:
    """Workers that cannot be used, and the dashboard's address; one that has neither says nothing."""
    heard: list[Event] = []
    greet(Echo(), heard.append)
    assert [(event.kind, event.message) for event in heard] == [
        ("warning", "worker a cannot be used: no torch"),
        ("stage", "dashboard: http://scheduler:8787/status"),
    ]
    heard.clear()
    greet(Echo(warnings=(), dashboard=""), heard.append)
    greet(object(), heard.append)
    assert heard == []
