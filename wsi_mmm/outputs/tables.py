"""tiles.parquet: one row per tile of a slide."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from wsi_mmm.types import F32, I64, Mask


def tiles_table(
    *,
    index: I64,
    xy: I64,
    size: tuple[int, int],
    failed: Mask,
    tissue: F32,
    tasks: Mapping[str, F32],
    classes: Mapping[str, Sequence[str]] | None = None,
) -> bytes:
    """The parquet file of n tiles, rows as given.

    ``index`` int64[n, 2] (row, column); ``xy`` int64[n, 2] level-0 px; ``size`` (width, height) of a tile, level-0 px;
    ``failed`` bool[n]; ``tissue`` float32[n] share; ``tasks``: tile task -> float32[n, K] probabilities, whose classes
    are ``classes[task]`` (their numbers when not given). Columns: row, column, x, y, width0, height0, failed, tissue,
    then per task ``<task>`` (the likeliest class, null where every probability is 0) and ``<task>:<class>``.
    """
    n = len(index)
    columns: dict[str, object] = {
        "row": index[:, 0],
        "column": index[:, 1],
        "x": xy[:, 0],
        "y": xy[:, 1],
        "width0": np.full(n, size[0], np.int64),
        "height0": np.full(n, size[1], np.int64),
        "failed": np.asarray(failed, np.bool_),
        "tissue": np.asarray(tissue, np.float32),
    }
    for task, probabilities in tasks.items():
        names = list((classes or {}).get(task, map(str, range(probabilities.shape[1]))))
        columns[task] = _likeliest(probabilities, names)
        columns |= {f"{task}:{name}": probabilities[:, k] for k, name in enumerate(names)}
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def _likeliest(probabilities: npt.NDArray[np.float32], names: list[str]) -> pa.DictionaryArray:
    best = probabilities.argmax(axis=1).astype(np.int32) if len(names) else np.zeros(len(probabilities), np.int32)
    unknown = ~(probabilities > 0).any(axis=1)
    return pa.DictionaryArray.from_arrays(pa.array(best, mask=unknown), pa.array(names, pa.string()))
