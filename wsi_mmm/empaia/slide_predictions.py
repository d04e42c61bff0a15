"""Predictions for a whole slide, or for a part of its tissue: the mean over tiles, or the prediction of a bag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from wsi_mmm.empaia.bodies import Polygon
from wsi_mmm.empaia.geometry import meeting
from wsi_mmm.empaia.results import Results
from wsi_mmm.errors import JobError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.types import F64


def slide_class(results: Results, task: TaskCard) -> int | None:
    """The likeliest class of the slide, by the mean over its tiles; None when there is nothing to go by."""
    return _likeliest_class(_mean_probabilities(_class_table(results, task)))


def tissue_classes(results: Results, task: TaskCard, tissue: Sequence[Polygon]) -> list[int | None]:
    """The likeliest class of each part of the tissue, by the tiles that meet it; that of the slide where none does."""
    table, whole = _class_table(results, task), slide_class(results, task)
    if task.head == "bag":
        return [whole] * len(tissue)
    found = [_likeliest_class(_mean_probabilities(table[met])) for met in meeting(tissue, _tile_boxes(results))]
    return [whole if one is None else one for one in found]


def slide_value(results: Results, task: TaskCard) -> float:
    """The slide's number: the answer of a bag, or the mean over tiles; of several numbers the first. JobError: none."""
    names = [task.name, *(f"{task.name}:{name}" for name in task.classes)]
    return _finite_mean(_read_columns(results, task, names)[0])


def slide_values(results: Results, task: TaskCard) -> list[float]:
    """One number per class of the task."""
    return [_finite_mean(one) for one in _read_columns(results, task, [f"{task.name}:{name}" for name in task.classes])]


def _finite_mean(values: F64) -> float:
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise JobError("No tissue was found that could be judged, so there are no results.")
    return float(finite.mean())


def _class_table(results: Results, task: TaskCard) -> F64:
    """float64[n, classes]: the probabilities of each tile, or of the bag."""
    columns = _read_columns(results, task, [f"{task.name}:{name}" for name in task.classes])
    return np.column_stack(columns) if columns else np.zeros((0, len(task.classes)))


def _read_columns(results: Results, task: TaskCard, names: Sequence[str]) -> list[F64]:
    """Those of ``names`` that there are, float64[n] each: of tiles, or of the bag; empty ones when there are none."""
    source: Mapping[str, npt.ArrayLike] = results.tiles()
    if task.head == "bag":
        source = {name: [value] for name, value in (results.facts.get("answers") or {}).items() if value is not None}
    found = [np.asarray(source[name], np.float64) for name in names if name in source]
    return found or [np.zeros(0) for _ in names]


def _mean_probabilities(table: F64) -> F64:
    known = table[np.isfinite(table).all(axis=1) & (table.sum(axis=1) > 0)]
    return np.asarray(known.mean(axis=0)) if len(known) else np.zeros(table.shape[1])


def _likeliest_class(chances: F64) -> int | None:
    return int(np.argmax(chances)) if chances.any() else None


def _tile_boxes(results: Results) -> F64:
    """Level-0 rectangles float64[n, 4] of the tiles."""
    tiles = results.tiles()
    x, y, width, height = (tiles[name].astype(np.float64) for name in ("x", "y", "width0", "height0"))
    return np.column_stack([x, y, x + width, y + height])
