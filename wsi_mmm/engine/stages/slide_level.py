"""Answers of bag tasks for a whole slide: the features of its tiles go through the model's aggregator once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.cache import ArraySpec, CacheEntry
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.units import SlidePlan
from wsi_mmm.types import F32, I64, Mask


@dataclass(frozen=True, slots=True)
class SlideAnswers:
    """``columns``: as for tiles (``<task>``, ``<task>:<class>``), each a class name, a number, or None where none can
    be said; None when no bag task was asked. ``attention``: bag task -> float32[n] share of each tile, adding up to 1,
    NaN for tiles that were left out."""

    columns: dict[str, str | float | None] | None = None
    attention: dict[str, F32] = field(default_factory=dict)


def answer_slide(ctx: UnitContext, plan: SlidePlan, failed: Mask) -> SlideAnswers:
    """The answers of a slide whose blocks are all forwarded. Tiles in ``failed`` bool[n] are left out: they are white.

    Holds the features of the slide's tiles, 4 D bytes each, and one cache shard at a time.
    """
    tasks = [task for task in ctx.tasks if task.scope == "bag"]
    names = [task.info.name for task in tasks]
    if not tasks:
        return SlideAnswers()
    blank = np.full(len(plan.index), np.nan, np.float32)
    if failed.all():
        return SlideAnswers({}, dict.fromkeys(names, blank))
    vectors = gather_features(ctx.cache, plan.index[~failed], plan.slide.recipe.block_tiles)
    values, shares = ctx.runner.answer_bag(vectors, names)
    columns: dict[str, str | float | None] = {}
    for task in tasks:
        columns |= json_row(task.table(values[task.info.name][None]), task.info.classes)
    attention = {name: blank.copy() for name in names}
    for name in names:
        attention[name][~failed] = shares[name]
    return SlideAnswers(columns, attention)


def gather_features(entry: CacheEntry, index: I64, block: int) -> F32:
    """Features float32[n, D] of tiles ``index`` int64[n, 2] (row, column), in their order, each shard read once."""
    spec = ArraySpec("features", entry.existing("features").shape[2:], "float32")
    found = np.empty((len(index), *spec.item), np.float32)
    blocks, which = np.unique(index // block, axis=0, return_inverse=True)
    for number in range(len(blocks)):
        mine = np.flatnonzero(which.ravel() == number)
        low, high = index[mine].min(axis=0), index[mine].max(axis=0) + 1
        dense = entry.read(spec, slice(low[0], high[0]), slice(low[1], high[1]))
        found[mine] = dense[index[mine, 0] - low[0], index[mine, 1] - low[1]]
    return found


def json_row(columns: Mapping[str, npt.NDArray[Any]], classes: Sequence[str]) -> dict[str, str | float | None]:
    """One row of ``Task.table`` as class names and numbers that JSON has; float32 by its shortest digits."""
    row: dict[str, str | float | None] = {}
    for name, values in columns.items():
        if np.issubdtype(values.dtype, np.integer):
            row[name] = classes[int(values[0])] if values[0] >= 0 else None
        else:
            number = float(str(values[0]))
            row[name] = number if math.isfinite(number) else None
    return row
