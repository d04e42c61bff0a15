"""The tables of docs/training.md that are made from the source. ``python -m helpers.training_tables`` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from wsi_mmm.tasks import TASK_KINDS
from wsi_mmm.tasks.facts import METRICS, PARAMETERS
from wsi_mmm.training.data.entries import DataEntry, PatientTable
from wsi_mmm.training.data.slide_entries import Tabled, TaskColumns, TaskOfShapes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
COMMON = ("kind", "name", "batch", "weight")


def parameter_table() -> str:
    """Every parameter of ``params``, by kind of task."""
    rows = ["| kind | parameter | default | meaning |", "|---|---|---|---|"]
    for kind in sorted(TASK_KINDS):
        for one in PARAMETERS[kind]:
            default = "" if one.default is None else f"{one.default:g}"
            rows.append(f"| `{kind}` | `{one.name}` | {default} | {one.meaning} |")
    return "\n".join(rows)


def metric_table() -> str:
    """Every metric that `validation.best` may name, by kind of task."""
    rows = ["| kind | metric | meaning |", "|---|---|---|"]
    for kind in sorted(TASK_KINDS):
        rows += [
            f"| `{kind}` | `{one.name}` | {one.meaning}{' (lower is better)' if one.lower else ''} |"
            for one in METRICS[kind]
        ]
    return "\n".join(rows)


def data_table() -> str:
    """Every key of every kind of ``[[data]]``, with its default."""
    rows = ["| kind | keys, with their defaults |", "|---|---|"]
    for entry in get_args(get_args(DataEntry)[0]):
        (kind,) = get_args(entry.model_fields["kind"].annotation)
        rows.append(f"| `{kind}` | {', '.join(_keys(entry, COMMON))} |")
    tables: dict[str, type[BaseModel]] = {
        "slides` of tables and bags": Tabled, "slides.truth.<task>`": TaskColumns, "shapes.<task>`": TaskOfShapes,
        "patients` of dicom": PatientTable,
    }  # fmt: skip
    for name, model in tables.items():
        rows.append(f"| `{name} | {', '.join(_keys(model, ()))} |")
    return "\n".join(rows)


def _keys(model: type[BaseModel], left_out: tuple[str, ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name not in left_out:
            yield f"`{name}`{_default(field)}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " (needed)"
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value in ("", (), {}):
        return ""
    return f" {json.dumps(value) if isinstance(value, str | bool) else value}"


TABLES: dict[str, Callable[[], str]] = {"parameters": parameter_table, "metrics": metric_table, "data": data_table}


def _marks(name: str) -> tuple[str, str]:
    return (f"<!-- begin of the table of {name}: made by tests/helpers/training_tables.py -->",
            f"<!-- end of the table of {name} -->")  # fmt: skip


def shown(name: str) -> str:
    """The table as the page shows it."""
    begin, end = _marks(name)
    return PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        begin, end = _marks(name)
        head, found, rest = text.partition(begin)
        assert found, f"docs/training.md lacks {begin}"
        text = f"{head}{begin}\n\n{make()}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")
