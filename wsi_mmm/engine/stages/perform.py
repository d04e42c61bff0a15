"""Run a unit of any kind in this thread: what every executor does in the end."""

from __future__ import annotations

from wsi_mmm.engine.monitoring.workers import count_here
from wsi_mmm.engine.stages.context import UnitContext, UnitFetches, unit_context
from wsi_mmm.engine.stages.extract import extract
from wsi_mmm.engine.stages.forward import forward
from wsi_mmm.engine.stages.interpret import interpret
from wsi_mmm.engine.stages.prepare import prepare
from wsi_mmm.engine.stages.publish import publish
from wsi_mmm.engine.units import (
    ExtractResult,
    InterpretResult,
    PlanResult,
    PublishResult,
    SlidePlan,
    UnitResult,
    WorkUnit,
)


def perform(unit: WorkUnit, fetches: UnitFetches | None = None) -> UnitResult:
    """Run a unit; raises what its stage raises. Units may be repeated."""
    with unit_context(unit, fetches) as ctx:
        result = _run_stage(ctx)
    count_here(result)
    return result


def _run_stage(ctx: UnitContext) -> UnitResult:
    match ctx.unit.kind:
        case "plan":
            with ctx.step("plan"):
                found = prepare(ctx)
            if isinstance(found, SlidePlan):
                return PlanResult(ctx.facts(), plan=found)
            return PlanResult(ctx.facts(), published=found)
        case "extract":
            with ctx.step("extract"):
                extract(ctx)
            return ExtractResult(ctx.facts())
        case "forward":
            return forward(ctx)
        case "interpret":
            with ctx.step("interpret"):
                objects = interpret(ctx)
            return InterpretResult(ctx.facts(), objects)
        case "publish":
            with ctx.step("publish"):
                summary = publish(ctx)
            return PublishResult(ctx.facts(), summary)
