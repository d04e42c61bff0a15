"""Plans over made-up grids, for tests of the engine."""

from __future__ import annotations

import numpy as np

from wsi_mmm.engine.plan import SlidePlan
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.types import Grid, SlideInfo


def plan_of(width: int, height: int, block: int, overlap: int, keep: float, seed: int) -> SlidePlan:
    """A plan over a random choice of 64 px tiles."""
    tile = 64
    stride = tile - overlap
    columns, rows = max(1, -(-(width - overlap) // stride)), max(1, -(-(height - overlap) // stride))
    grid = Grid(tile, overlap, columns, rows, width, height, 1.0, 1.0, 0.5)
    chosen = np.argwhere(np.random.default_rng(seed).random((rows, columns)) < keep).astype(np.int64)
    recipe = Recipe("m", "h", ("t",), 0.5, tile, overlap, block_tiles=block)
    info = SlideInfo("s", width, height, 0.5, 0.5, (), "v", "r", "f")
    task = SlideTask("s", "s", "/out/s", recipe, reader=info.reader)
    return SlidePlan(task, info, grid, chosen, np.ones(len(chosen), np.float32), "/e", 20, 2, 0.5)
