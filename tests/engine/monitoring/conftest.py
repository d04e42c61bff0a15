"""A short run, told unit by unit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from helpers.plans import facts_of, plan_of
from wsi_mmm.engine.events import Event, SlideStatus
from wsi_mmm.engine.monitoring.observe import Hooks
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import (
    Failure,
    ForwardResult,
    PlanResult,
    PublishResult,
    SlidePlan,
    SlideSummary,
    SlideTask,
    UnitFacts,
    WorkUnit,
)
from wsi_mmm.timing import StepTime

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
    hooks.watch(PlanResult(facts_of(plan, worker="node:1"), _seven_tiles()))
    hooks.listener(Event("plan", "good", 0, 7, "7 tiles"))
    for unit in forward:
        hooks.watch(unit)
    times = (
        StepTime("read", 11, now - 2.0, now - 1.5, {"fetch": 0.2, "decode": 0.3}),
        StepTime("model", 12, now - 1.5, now - 1.0, {"model": 0.5}),
    )
    hooks.watch(ForwardResult(facts_of(forward[0], *times, worker="node:1", bytes_read=1000), 4, ((0, 0, 9, 9),)))
    hooks.watch(ForwardResult(facts_of(forward[1], worker="node:1", bytes_read=1500), 3, cached=True))
    hooks.listener(Event("tile", "good", 7, 7))
    reason = "https://me:hush@host/bad.svs?sig=hush: no answer"
    hooks.watch(Failure(UnitFacts("plan", "bad"), reason))
    hooks.listener(Event("slide", "bad", 1, 2, f"failed: {reason}", SlideStatus.FAILED))
    hooks.watch(publish)
    summary = SlideSummary(SlideStatus.PARTIAL, 7, {"nuclei": 42})
    hooks.watch(PublishResult(facts_of(publish, worker="node:1", bytes_read=1500), summary))
    text = "partial (1 tiles cannot be read), 42 objects in 7 tiles, 2.0 s"
    hooks.listener(Event("slide", "good", 2, 2, text, SlideStatus.PARTIAL))


def _seven_tiles() -> SlidePlan:
    plan = plan_of(600, 600, 2, 8, 1.0, 0)
    return replace(plan, index=plan.index[:7])
