"""What a slide's bag is made of: its tiles' features in one order, those that could not be read left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.plans import plan_of
from wsi_mmm.cache import ArraySpec, CacheEntry
from wsi_mmm.engine.plan import forward_units
from wsi_mmm.engine.stages import context, publish
from wsi_mmm.engine.units import SlidePlan, WorkUnit
from wsi_mmm.tasks.tile_kinds import Classify
from wsi_mmm.types import F32, TaskInfo

GRADE = Classify(TaskInfo("t", "classify", ("low", "high"), ((0, 0, 0),) * 2), 2, "bag")


def filled(plan: SlidePlan, folder: Path) -> tuple[CacheEntry, F32]:
    """An entry whose features are written block by block, and the same in the plan's order."""
    wanted = np.random.default_rng(0).normal(size=(len(plan.index), 5)).astype(np.float32)
    entry = CacheEntry(str(folder), plan.grid.rows, plan.grid.columns, plan.slide.recipe.block_tiles)
    place = {tuple(tile): i for i, tile in enumerate(plan.index.tolist())}
    for unit in forward_units(plan):
        rows = [place[tuple(tile)] for tile in unit.index().tolist()]
        entry.write_block(ArraySpec("features", (5,), "float32"), unit.index(), wanted[rows])
    return entry, wanted


@pytest.mark.parametrize("block", [1, 3, 16])
def test_features_are_gathered_in_the_order_of_the_tiles(block: int, tmp_path: Path) -> None:
    """Whatever the blocks they were written in."""
    plan = plan_of(700, 500, block, 0, 0.6, seed=3)
    entry, wanted = filled(plan, tmp_path)
    assert (publish.gather_features(entry, plan.index, block) == wanted).all()
    some = plan.index[::-2]
    assert (publish.gather_features(entry, some, block) == wanted[::-2]).all()


def test_tiles_that_cannot_be_read_have_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are white: they are left out of the bag, and their attention is not known. None left: no answer."""
    plan = plan_of(500, 300, 2, 0, 0.9, seed=1)
    _, wanted = filled(plan, tmp_path)
    seen: list[F32] = []

    def answer(vectors: F32, tasks: list[str]) -> tuple[dict[str, F32], dict[str, F32]]:
        seen.append(vectors)
        return {"t": np.array([0.25, 0.75], np.float32)}, {"t": np.full(len(vectors), 0.5, np.float32)}

    monkeypatch.setattr(context, "recipe_tasks", lambda recipe: [GRADE])
    monkeypatch.setattr(context, "load_runner", lambda recipe: SimpleNamespace(answer_bag=answer))
    ctx = context.UnitContext(WorkUnit("publish", plan.slide, grid=plan.grid, entry=str(tmp_path)))
    failed = np.zeros(len(plan.index), np.bool_)
    failed[[1, 4]] = True
    found = publish.answer_slide(ctx, plan, failed)
    assert (seen[0] == wanted[~failed]).all()
    assert found.columns == {"t": "high", "t:low": 0.25, "t:high": 0.75}
    assert np.isnan(found.attention["t"][failed]).all()
    assert (found.attention["t"][~failed] == 0.5).all()
    nothing = publish.answer_slide(ctx, plan, np.ones(len(plan.index), np.bool_))
    assert nothing.columns == {}
    assert np.isnan(nothing.attention["t"]).all()
    assert len(seen) == 1
    monkeypatch.setattr(context, "recipe_tasks", lambda recipe: [replace(GRADE, scope="tile")])
    assert publish.answer_slide(ctx, plan, failed) == publish.SlideAnswers()


def test_answers_are_words_and_numbers_that_json_has() -> None:
    """Class names, the shortest digits of float32, null for what is none."""
    columns = {"t": np.array([-1], np.int32), "t:a": np.array([0.1], np.float32), "r": np.array([np.nan], np.float32)}
    assert publish.json_row(columns, ("a",)) == {"t": None, "t:a": 0.1, "r": None}
