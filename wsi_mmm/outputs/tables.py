"""tiles.parquet: one row per tile of a slide."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from wsi_mmm.types import F32, I64, Mask

TILE_COLUMNS = ("row", "column", "x", "y", "width0", "height0", "failed", "tissue")


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
        table[name] = (
            _class_names(values, classes[name]) if np.issubdtype(values.dtype, np.integer) else _nan_as_null(values)
        )
    buffer = io.BytesIO()
    parquet.write_table(pa.table(table), buffer, compression="zstd")
    return buffer.getvalue()


def _nan_as_null(values: npt.NDArray[Any]) -> Any:
    return pa.array(values, mask=np.isnan(values))


def _class_names(index: npt.NDArray[Any], names: Sequence[str]) -> pa.DictionaryArray:
    indices = pa.array(index.astype(np.int32), mask=index < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names), pa.string()))
