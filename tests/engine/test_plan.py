"""The arithmetic that cuts a slide into works."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helpers.plans import plan_of
from wsi_mmm.engine.plan import core_of, forward_units, interpret_units, needed_blocks, window_of
from wsi_mmm.engine.units import SlidePlan

plans = st.builds(
    plan_of,
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(1, 5),
    st.sampled_from([0, 8, 32]),
    st.sampled_from([0.1, 0.6, 1.0]),
    st.integers(0, 99),
)


@given(plans)
def test_every_tile_is_forwarded_exactly_once(plan: SlidePlan) -> None:
    """The forward works partition the chosen tiles."""
    tiles = [tuple(t) for unit in forward_units(plan) for t in unit.index().tolist()]
    assert sorted(tiles) == sorted(map(tuple, plan.index.tolist()))


@given(plans)
def test_cores_tile_what_the_tiles_cover(plan: SlidePlan) -> None:
    """Every slide pixel that some tile covers lies in exactly one interpreted core; cores never overlap."""
    grid = plan.grid
    covered = np.zeros((grid.height, grid.width), bool)
    for row, column in plan.index * grid.stride:
        covered[row : row + grid.tile, column : column + grid.tile] = True
    counts = np.zeros((grid.height, grid.width), int)
    for unit in interpret_units(plan):
        core = core_of(grid, plan.slide.recipe.block_tiles, unit.block, 1)
        counts[core.y0 : core.y1, core.x0 : core.x1] += 1
    assert counts.max(initial=0) <= 1
    assert (counts[covered] == 1).all()


@given(plans)
def test_a_window_carries_every_tile_that_touches_it(plan: SlidePlan) -> None:
    """An interpret work names each tile within the halo of its core, so a core's result needs nothing else."""
    grid = plan.grid
    for unit in interpret_units(plan):
        core = core_of(grid, plan.slide.recipe.block_tiles, unit.block, plan.stride)
        window = window_of(grid, core, plan.halo, plan.stride)
        touching = {
            (r, c)
            for r, c in plan.index.tolist()
            if r * grid.stride < window.y1 and r * grid.stride + grid.tile > window.y0
            and c * grid.stride < window.x1 and c * grid.stride + grid.tile > window.x0
        }  # fmt: skip
        assert touching == set(map(tuple, unit.index().tolist()))
        assert window.y0 <= max(0, core.y0 - plan.halo) and window.y1 >= min(grid.height, core.y1 + plan.halo)


@given(plans)
def test_what_an_interpret_waits_for_is_forwarded(plan: SlidePlan) -> None:
    """No interpret work waits for a block that no forward work makes."""
    made = {unit.block for unit in forward_units(plan)}
    assert all(needed_blocks(unit) <= made for unit in interpret_units(plan))
