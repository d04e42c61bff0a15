"""Reading into the shared cache, apart from the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helpers.plans import plan_of, result_of
from wsi_mmm.cache.shard import SHARD
from wsi_mmm.engine.plan import SIDE, extract_units, forward_units, shard_groups_under, through_pool
from wsi_mmm.engine.scheduler import Scheduler
from wsi_mmm.engine.units import Kind, SlidePlan, UnitResult, WorkUnit
from wsi_mmm.options import RunOptions

plans = st.builds(
    plan_of, st.integers(70, 6000), st.integers(70, 6000), st.integers(1, 8), st.sampled_from([0, 8, 32]),
    st.sampled_from([0.05, 0.6]), st.integers(0, 99),
)  # fmt: skip


def touched(plan: SlidePlan, index: np.ndarray) -> set[tuple[int, int]]:
    """The shards under tiles, pixel by pixel of their edges."""
    found = set()
    for row, column in (index * plan.grid.stride).tolist():
        bottom, right = min(row + plan.grid.tile, plan.grid.height), min(column + plan.grid.tile, plan.grid.width)
        found |= {(y // SHARD, x // SHARD) for y in (row, bottom - 1) for x in (column, right - 1)}
    return found


@given(plans)
def test_every_shard_under_a_tile_is_brought_in_once(plan: SlidePlan) -> None:
    """By the one work of its square; no other shard is."""
    shards = [tuple(shard) for unit in extract_units(plan) for shard in unit.index().tolist()]
    assert len(shards) == len(set(shards)) and set(shards) == touched(plan, plan.index)
    for unit in extract_units(plan):
        assert {(row // SIDE, column // SIDE) for row, column in unit.index().tolist()} == {unit.block}


@given(plans)
def test_a_forward_waits_for_the_shard_groups_under_its_tiles(plan: SlidePlan) -> None:
    """And each of them is extracted by some work."""
    made = {unit.block for unit in extract_units(plan)}
    for unit in forward_units(plan):
        groups = {(row // SIDE, column // SIDE) for row, column in touched(plan, unit.index())}
        assert shard_groups_under(unit) == groups <= made


def test_tiles_go_through_a_cache_only_where_there_is_one() -> None:
    """Not without --cache, not on empty glass."""
    plan = plan_of(600, 600, 2, 8, 1.0, 0)
    assert through_pool(plan) is None
    cached = replace(plan, slide=replace(plan.slide, recipe=replace(plan.slide.recipe, options=RunOptions(cache="/c"))))
    pooled = through_pool(cached)
    assert pooled is not None and pooled.slide.recipe.options.cache_tiles == "on"
    assert pooled.slide.recipe.result_hash() == cached.slide.recipe.result_hash()
    assert through_pool(replace(cached, index=cached.index[:0])) is None


class Recorder:
    """An executor that does one work at a time."""

    def __init__(self, plan: SlidePlan) -> None:
        self.plan, self.units, self.flying = plan, [], []

    def room(self, kind: Kind) -> int:
        return 1 - len(self.flying)

    def start(self, unit: WorkUnit) -> None:
        self.flying.append(unit)
        self.units.append(unit)

    def wait(self, timeout: float) -> UnitResult | None:
        unit = self.flying.pop()
        return result_of(unit, plan=replace(self.plan, slide=unit.slide))

    def close(self, *, cancel: bool = False) -> None:
        self.flying.clear()


def kinds(placement: str) -> dict[str, list[str]]:
    """The works of three slides in a row, by slide."""
    plan = plan_of(900, 900, 2, 8, 1.0, 0)
    recipe = replace(plan.slide.recipe, options=RunOptions(cache="/c"))
    executor = Recorder(plan)
    scheduler = Scheduler([replace(plan.slide, id=f"s{n}", recipe=recipe) for n in range(6)], placement=placement)
    assert all(state.status == "done" for state in scheduler.run(executor))
    found: dict[str, list[str]] = {}
    for unit in executor.units:
        found.setdefault(unit.slide.id, []).append(unit.kind)
    return found


def test_in_the_pool_each_slide_is_extracted_before_it_is_forwarded() -> None:
    """Forwards come after the extracts that they need, and everything is done once."""
    for names in kinds("pool").values():
        assert names.count("extract") == 1 and names.index("extract") < names.index("forward")
    assert not any("extract" in names for names in kinds("beside").values())
