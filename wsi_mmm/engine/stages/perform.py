"""Run a unit of any kind in this thread: what every executor does in the end."""

from __future__ import annotations

from contextlib import closing, nullcontext

from wsi_mmm.engine.stages.context import Turn, UnitContext, UnitFetches
from wsi_mmm.engine.stages.forward import extract, forward
from wsi_mmm.engine.stages.interpret import interpret
from wsi_mmm.engine.stages.prepare import prepare
from wsi_mmm.engine.stages.publish import publish
from wsi_mmm.engine.units import ExtractResult, InterpretResult, PlanResult, PublishResult, UnitResult, WorkUnit


def perform(unit: WorkUnit, fetches: UnitFetches | None = None, turn: Turn = nullcontext) -> UnitResult:
    """Run a unit; raises what its stage raises. Units may be repeated. ``fetches``, ``turn``: see `UnitContext`."""
    with closing(UnitContext(unit, fetches, turn)) as ctx:
        match unit.kind:
            case "plan":
                with ctx.step("plan"):
                    plan, published = prepare(ctx)
                return PlanResult(ctx.facts(), plan, published)
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
