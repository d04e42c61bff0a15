"""Tables: tiles.parquet, one row per tile of a slide; slides.csv and slides.parquet, one row per slide of a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from wsi_mmm.errors import printable
from wsi_mmm.outputs.report import SlideRow
from wsi_mmm.types import F32, I64, Mask

TILE_COLUMNS = ("row", "column", "x", "y", "width0", "height0", "failed", "tissue")
SLIDE_FACTS = ("id", "uri", "status", "mpp_effective", "tiles", "failed_tiles")


def tiles_table(
    *,
    index: I64,
    xy: I64,
    size: tuple[int, int],
    failed: Mask,
    tissue: F32,
    columns: Mapping[str, npt.NDArray[Any]],
    classes: Mapping[str, Sequence[str]],
) -> bytes:
    """The parquet file of n tiles, rows as given.

    ``index`` int64[n, 2] (row, column); ``xy`` int64[n, 2] level-0 px; ``size`` (width, height) of a tile, level-0 px;
    ``failed`` bool[n]; ``tissue`` float32[n] share; ``columns``: predictions, as of ``Task.table``. Columns:
    `TILE_COLUMNS`, then ``columns``: those of integers are indices into
    ``classes[column]`` and become names (null where negative), those of floats are null where NaN.
    """
    n = len(index)
    table: dict[str, object] = {
        "row": index[:, 0],
        "column": index[:, 1],
        "x": xy[:, 0],
        "y": xy[:, 1],
        "width0": np.full(n, size[0], np.int64),
        "height0": np.full(n, size[1], np.int64),
        "failed": np.asarray(failed, np.bool_),
        "tissue": np.asarray(tissue, np.float32),
    }
    for name, values in columns.items():
        if np.issubdtype(values.dtype, np.integer):
            indices, names = pa.array(values.astype(np.int32), mask=values < 0), pa.array(classes[name], pa.string())
            table[name] = pa.DictionaryArray.from_arrays(indices, names)
        else:
            table[name] = pa.array(values, mask=np.isnan(values))
    return _parquet_bytes(table, "zstd")


def _parquet_bytes(columns: Mapping[str, object], compression: str) -> bytes:
    """The parquet file of a table."""
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, compression=compression)
    return buffer.getvalue()


def slides_csv(rows: Sequence[SlideRow]) -> bytes:
    """UTF-8, a header, empty cells for what is not known: `SLIDE_FACTS`, then ``<task>`` and ``<task>:<class>``."""
    return columns_csv(_slide_columns(rows))


def slides_parquet(rows: Sequence[SlideRow]) -> bytes:
    """The same columns: text, whole numbers, float64; null for what is not known."""
    return columns_parquet(_slide_columns(rows))


def columns_csv(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """UTF-8, a header line, empty cells for None."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def columns_parquet(columns: Mapping[str, list[Any]]) -> bytes:
    """The same table with types: text, whole numbers, float64; null for None."""
    typed = {name: _typed_array(values) for name, values in columns.items()}
    return _parquet_bytes(typed, "snappy")  # as pyarrow does by itself


def _slide_columns(rows: Sequence[SlideRow]) -> dict[str, list[Any]]:
    """Rows in their order, answers in the order of the model's tasks."""
    answers = [row.extra.get("answers") or {} for row in rows]
    names = dict.fromkeys(name for answer in answers for name in answer)
    facts = {name: [getattr(row, name) for row in rows] for name in SLIDE_FACTS}
    columns = facts | {name: [answer.get(name) for answer in answers] for name in names}
    return {
        printable(name): [printable(value) if isinstance(value, str) else value for value in values]
        for name, values in columns.items()
    }


def _typed_array(values: list[Any]) -> Any:
    """A column without any value is text (Parquet readers do not all know the type of nothing), and so is one of texts
    and numbers: slides of several models."""
    texts = [None if value is None else value if isinstance(value, str) else str(value) for value in values]
    mixed = any(isinstance(value, str) for value in values) or all(value is None for value in values)
    return pa.array(texts, pa.string()) if mixed else pa.array(values)
