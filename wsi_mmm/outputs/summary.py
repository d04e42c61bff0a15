"""summary.csv and summary.parquet: one row per slide, per region of interest and per class of regions, for statistics.

Names of columns are lower case with underscores and end in what they hold: ``nuclei_nucleus_count``,
``nuclei_nucleus_per_mm2``. Cells are empty (NA) where a number is not known or not defined.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wsi_mmm.errors import printable
from wsi_mmm.outputs.report import SlideRow
from wsi_mmm.outputs.tables import columns_csv, columns_parquet
from wsi_mmm.storage.store import redact

SUMMARY_FACTS = (
    "slide_id", "uri", "level", "region", "region_name", "annotation_class", "status", "model", "model_hash", "mpp",
    "slide_mpp_x", "slide_mpp_y", "width_px", "height_px", "area_mm2", "tissue_area_mm2", "tiles", "failed_tiles",
    "seconds",
)  # fmt: skip
"""The columns that every row has, before those of tasks."""

UNCLASSIFIED = "unclassified"
"""Stands in columns for the class of objects that have none."""

Cells = dict[tuple[str, ...], Any]
"""Column, as the words that its name is made of -> value."""


@dataclass(frozen=True, slots=True)
class SlideResults:
    """A slide: its row in a report, and its slide.json (empty where there is none, as of a slide that failed)."""

    row: SlideRow
    facts: Mapping[str, Any] = field(default_factory=dict)


def summary_csv(slides: Sequence[SlideResults]) -> bytes:
    """UTF-8, a header, empty cells for what is not known."""
    return columns_csv(_summary_columns(slides))


def summary_parquet(slides: Sequence[SlideResults]) -> bytes:
    """The same columns: text, whole numbers, float64; null for what is not known."""
    return columns_parquet(_summary_columns(slides))


def _summary_columns(slides: Sequence[SlideResults]) -> dict[str, list[Any]]:
    rows = [row for slide in slides for row in _slide_rows(slide)]
    keys: dict[tuple[str, ...], None] = {(fact,): None for fact in SUMMARY_FACTS}
    keys |= {key: None for row in rows for key in row}
    names = _column_names(list(keys))
    return {names[key]: [_plain_cell(row.get(key)) for row in rows] for key in keys}


def _plain_cell(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _column_names(keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A name of lower-case words per column; those that would be the same are numbered from 2."""
    found: dict[tuple[str, ...], str] = {}
    taken: set[str] = set()
    for key in keys:
        words = (re.sub(r"\W+", "_", printable(word).lower()).strip("_") for word in key)
        plain = name = "_".join(word for word in words if word)
        number = 1
        while name in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name)
        found[key] = name
    return found


def _slide_rows(slide: SlideResults) -> Iterator[Cells]:
    """The rows of a slide: that of all of it, then those of its regions and their classes."""
    row, facts = slide.row, slide.facts
    recipe = _mapping(facts.get("recipe"))
    model = recipe.get("model")
    common = {
        "slide_id": row.id, "uri": row.uri, "status": row.status, "mpp": row.mpp_effective,
        "model": redact(model) if isinstance(model, str) else None, "model_hash": _text(recipe.get("model_hash")),
        "slide_mpp_x": _number(facts.get("mpp_x")), "slide_mpp_y": _number(facts.get("mpp_y")),
        "width_px": _number(facts.get("width")), "height_px": _number(facts.get("height")),
    }  # fmt: skip
    places = [place for place in _sequence(facts.get("summary")) if isinstance(place, Mapping)]
    whole = {"level": "slide", "tiles": row.tiles if facts else None, "failed_tiles": row.failed_tiles}
    for place in places or [whole]:
        said = {
            "level": _text(place.get("level")), "region": _number(place.get("region")),
            "region_name": _text(place.get("name")), "annotation_class": _text(place.get("class")),
            "area_mm2": _number(place.get("area_mm2")), "tissue_area_mm2": _number(place.get("tissue_area_mm2")),
            "tiles": _number(place.get("tiles")), "failed_tiles": _number(place.get("failed_tiles")),
        }  # fmt: skip
        is_slide = said["level"] == "slide"
        if is_slide:
            said["seconds"] = row.seconds
        cells: Cells = {(name,): value for name, value in {**common, **said}.items() if value is not None}
        for task, classes in _mapping(place.get("tasks")).items():
            cells |= _task_cells(task, _mapping(classes), said["tissue_area_mm2"], said["tiles"])
        if is_slide:
            # The empty word tells an answer from a fact of the same name.
            cells |= {("", *name.split(":")): value for name, value in _mapping(facts.get("answers")).items()}
        yield cells


def _task_cells(task: str, classes: Mapping[str, Any], tissue_mm2: Any, tiles: Any) -> Cells:
    """The numbers of a task, and densities and percentages of them."""
    cells: Cells = {}
    numbers = {name: {k: _number(v) for k, v in _mapping(values).items()} for name, values in classes.items()}
    total = sum(values.get("count") or 0 for values in numbers.values())
    for name, values in numbers.items():
        words = (task, name or UNCLASSIFIED)
        match values:
            case {"area_mm2": area, "count": count} if area is not None:
                cells |= {(*words, "count"): count, (*words, "area_mm2"): area}
                cells[(*words, "percent_of_tissue")] = _percent(area, tissue_mm2)
            case {"count": count} if count is not None:
                cells[(*words, "count")] = count
                cells[(*words, "per_mm2")] = count / tissue_mm2 if tissue_mm2 else None
                if len(numbers) > 1:
                    cells[(*words, "percent")] = _percent(count, total)
            case {"tiles": count} if count is not None:
                cells |= {(*words, "tiles"): count, (*words, "percent"): _percent(count, tiles)}
            case {"mean": mean}:
                cells[(task, name, "mean")] = mean
    return cells


def _percent(part: float, whole: Any) -> float | None:
    return 100.0 * part / whole if whole else None


# ---------------------------------------------------------------- values of a file that anybody may have written


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
