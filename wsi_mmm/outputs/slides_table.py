"""slides.csv and slides.parquet: one row per slide of a run, with the predictions of bag tasks."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from wsi_mmm.outputs.report import SlideRow

FACTS = ("id", "uri", "status", "mpp_effective", "tiles", "failed_tiles")


def slides_csv(rows: Sequence[SlideRow]) -> bytes:
    """UTF-8, a header, empty cells for what is not known. Columns: `FACTS`, then ``<task>`` and ``<task>:<class>``."""
    columns = _slide_columns(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def slides_parquet(rows: Sequence[SlideRow]) -> bytes:
    """The same columns: text, whole numbers, float64; null for what is not known."""
    buffer = io.BytesIO()
    parquet.write_table(pa.table({name: _typed_array(values) for name, values in _slide_columns(rows).items()}), buffer)
    return buffer.getvalue()


def _slide_columns(rows: Sequence[SlideRow]) -> dict[str, list[Any]]:
    """Rows in their order, answers in the order of the model's tasks."""
    answers = [row.extra.get("answers") or {} for row in rows]
    names = dict.fromkeys(name for answer in answers for name in answer)
    facts = {name: [getattr(row, name) for row in rows] for name in FACTS}
    return facts | {name: [answer.get(name) for answer in answers] for name in names}


def _typed_array(values: list[Any]) -> Any:
    """A column without any value is text: Parquet readers do not all know the type of nothing."""
    return pa.array(values, pa.string()) if all(value is None for value in values) else pa.array(values)
