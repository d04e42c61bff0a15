"""What travels between the books and the workers: small, and the same on both sides."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.plans import plan_of
from wsi_mmm.engine.executors import wire
from wsi_mmm.engine.plan import forward_units, interpret_units
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import PlanResult, SlidePlan, UnitFacts, WorkUnit, pack_tiles
from wsi_mmm.options import RunOptions

plans = st.builds(
    plan_of, st.integers(1, 900), st.integers(1, 900), st.integers(1, 8), st.sampled_from([0, 8, 32]),
    st.sampled_from([0.1, 0.6, 1.0]), st.integers(0, 99),
)  # fmt: skip


def sent(unit: WorkUnit) -> WorkUnit:
    text = wire.recipe_json(unit.slide.recipe)
    key = wire.recipe_key(text)
    return wire.unpack_unit(wire.pack_unit(unit, key), {key: text}.get)


def real_plan(width: int, height: int) -> SlidePlan:
    """With names as long as those of a study in a bucket."""
    plan = plan_of(width, height, 4, 8, 0.9, 0)
    root = "s3://hospital-archive/study-2024/results/TCGA-XX-0001-01Z-00-DX1"
    slide = replace(
        plan.slide, id="TCGA-XX-0001-01Z-00-DX1", output=root, uri="s3://hospital-archive/a/TCGA-XX-0001.svs"
    )
    return replace(plan, slide=slide, entry=f"{root}/.work/{'0' * 32}/cache/{'1' * 64}/{'2' * 32}")


@given(plans)
def test_a_work_arrives_as_it_was_sent(plan: SlidePlan) -> None:
    """Every field, the tiles in their order and the recipe: equal."""
    slide = replace(plan.slide, mpp=0.25, mask="/m.png", error="é")
    for unit in [
        *forward_units(plan),
        *interpret_units(plan),
        WorkUnit("plan", slide),
        WorkUnit("publish", slide, entry="/e"),
    ]:
        assert sent(unit) == unit


def test_tiles_in_any_order_arrive_in_it() -> None:
    """A list that is not row-major, or names a tile twice, is sent as it is."""
    plan = plan_of(300, 300, 2, 8, 1.0, 0)
    for index in ([[3, 1], [0, 2]], [[1, 1], [1, 1]], [[70_000, 2], [70_001, 0]]):
        unit = WorkUnit("forward", plan.slide, (0, 0), pack_tiles(np.array(index)), plan.grid)
        assert sent(unit).index().tolist() == index


def test_a_work_is_a_few_hundred_bytes() -> None:
    """However many tiles a block has, and with long names."""
    plan = real_plan(9000, 9000)
    key = wire.recipe_key(wire.recipe_json(plan.slide.recipe))
    assert max(len(wire.pack_unit(unit, key)) for unit in forward_units(plan)) < 520
    large = replace(plan, slide=replace(plan.slide, recipe=replace(plan.slide.recipe, block_tiles=32)))
    assert max(len(wire.pack_unit(unit, key)) for unit in forward_units(large)) < 700


def test_the_recipe_is_asked_for_once() -> None:
    """A process keeps it under its key; one that nobody knows is a LookupError."""
    recipe = Recipe("m", "h", ("a", "b"), 0.5, 64, 0, options=RunOptions(device="cpu", min_tissue=0.123))
    text, asked = wire.recipe_json(recipe), []

    def find(key: str) -> str | None:
        asked.append(key)
        return text if key == wire.recipe_key(text) else None

    first, again = (wire.load_recipe(wire.recipe_key(text), find) for _ in range(2))
    assert first == recipe and again is first and len(asked) == 1
    with pytest.raises(LookupError):
        wire.load_recipe("0" * 16, find)


def test_what_is_sent_can_be_read_by_a_person() -> None:
    """A dumped task graph shows JSON: whoever looks for a secret in it finds plain text to look through."""
    plan = real_plan(900, 900)
    assert json.loads(wire.pack_unit(forward_units(plan)[0], "k"))[2][1] == plan.slide.uri


@given(plans)
def test_a_plan_arrives_with_what_works_are_made_of(plan: SlidePlan) -> None:
    """The works of a plan that travelled are those of the plan."""
    result = PlanResult(UnitFacts("plan", plan.slide.id), plan)
    there = pickle.loads(pickle.dumps(wire.pack_result(result)))
    back = wire.unpack_result(there, plan.slide)
    assert isinstance(back, PlanResult) and back.plan is not None and back.facts == result.facts
    assert forward_units(back.plan) == forward_units(plan) and interpret_units(back.plan) == interpret_units(plan)


def test_a_plan_is_small_on_its_way() -> None:
    """That of a gigapixel slide takes a fiftieth of what it is in memory."""
    plan = real_plan(28_000, 28_000)
    assert len(plan.index) > 200_000
    light = wire.pack_result(PlanResult(UnitFacts("plan", plan.slide.id), plan))
    assert len(pickle.dumps(light)) < len(pickle.dumps(plan)) / 50


def test_the_places_of_listed_tiles_stay_in_the_file_of_the_plan() -> None:
    """What travels is which units there are, however the list is sorted."""
    plan = real_plan(9000, 9000)
    ranks = np.random.default_rng(0).permutation(len(plan.index))
    listed = replace(
        plan, index=np.stack([ranks // 4, ranks % 4], axis=1), places=np.zeros((len(ranks), 4), np.int64), maps=False,
        grid=replace(plan.grid, listed="0" * 32, columns=4, rows=len(ranks)),
    )  # fmt: skip
    light = wire.pack_result(PlanResult(UnitFacts("plan", plan.slide.id), listed))
    back = wire.unpack_result(pickle.loads(pickle.dumps(light)), replace(plan.slide, tiles="/t.h5"))
    assert isinstance(back, PlanResult) and back.plan is not None and back.plan.places is None
    units = forward_units(back.plan)
    assert [unit.tiles for unit in units] == [unit.tiles for unit in forward_units(listed)]
    assert len(pickle.dumps(light)) < len(pickle.dumps(listed)) / 50
    assert sent(units[0]) == units[0] and sent(units[0]).slide.tiles == "/t.h5"
