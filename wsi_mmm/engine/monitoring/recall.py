"""The report of a run that has ended, read back from what it wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from wsi_mmm.engine.monitoring.run_report import RunReport
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import StorageError
from wsi_mmm.outputs.report import FACTS, SlideRow
from wsi_mmm.storage import store


def recall(output: str, recipe: Recipe, tasks: Sequence[SlideTask]) -> RunReport:
    """What report.json says. StorageError when it is not there, or no report."""
    uri = store.join(output, "report.json")
    try:
        facts = json.loads(store.read_bytes(uri))
        rows = {row["id"]: _row(row) for row in facts["slides"]}
        seconds = float(facts["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{store.redact(uri)} is no report of a run; run again, which resumes") from error
    return RunReport(output, recipe, tuple(task.id for task in tasks), rows, seconds=seconds)


def _row(row: dict[str, Any]) -> SlideRow:
    extra = {name: value for name, value in row.items() if name not in FACTS}
    return SlideRow(**{name: row[name] for name in FACTS}, extra=extra)
