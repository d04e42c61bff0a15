"""A short run, told unit by unit."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from wsi_mmm.engine.events import Event
from wsi_mmm.engine.monitoring.observe import Hooks
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import SlideTask, UnitResult, WorkUnit
from wsi_mmm.timing import Lap

RECIPE = Recipe("default", "hash", (), 0.5, 256, 0)
GOOD = SlideTask("good", "s3://key:hush@bucket/good.svs", "out/good", RECIPE)
BAD = SlideTask("bad", "https://me:hush@host/bad.svs?sig=hush", "out/bad", RECIPE)


@pytest.fixture
def story() -> Callable[[Hooks], None]:
    """Tell hooks of a run over two slides: one is done, one of its blocks from the cache; the other one fails."""
    return tell


def tell(hooks: Hooks) -> None:
    now = time.time()
    plan, forward = WorkUnit("plan", GOOD), [WorkUnit("forward", GOOD, (0, column)) for column in (0, 1)]
    publish, lost = WorkUnit("publish", GOOD), WorkUnit("plan", BAD)
    for unit in (plan, lost):
        hooks.watch(unit)
    hooks.watch(UnitResult("plan", "good", (0, 0), "ok", tiles=7, worker="node:1"))
    hooks.listener(Event("plan", "good", 0, 7, "7 tiles"))
    for unit in forward:
        hooks.watch(unit)
    laps = (Lap(11, now - 2.0, now - 1.5, {"fetch": 0.2, "decode": 0.3}), Lap(12, now - 1.5, now - 1.0, {"model": 0.5}))
    facts = {"worker": "node:1", "bytes_read": 1000, "busy": ((now - 1.5, now - 1.0),)}
    hooks.watch(UnitResult("forward", "good", (0, 0), "partial", tiles=4, failed=((0, 0, 9, 9),), laps=laps, **facts))
    hooks.watch(UnitResult("forward", "good", (0, 1), "cached", tiles=3, worker="node:1", bytes_read=1500))
    hooks.listener(Event("tile", "good", 7, 7))
    hooks.watch(UnitResult("plan", "bad", (0, 0), "failed", "https://me:hush@host/bad.svs?sig=hush: no answer"))
    hooks.listener(Event("slide", "bad", 1, 2, "failed: https://me:hush@host/bad.svs?sig=hush: no answer"))
    hooks.watch(publish)
    hooks.watch(UnitResult("publish", "good", (0, 0), "ok", objects=42, worker="node:1", bytes_read=1500))
    hooks.listener(Event("slide", "good", 2, 2, "partial (1 tiles cannot be read), 42 objects in 7 tiles, 2.0 s"))
