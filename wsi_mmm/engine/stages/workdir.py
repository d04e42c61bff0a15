"""The work folder of a slide under way: its plan and the parts of its blocks. Plain npz, never pickled."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.engine.stages import context
from wsi_mmm.engine.units import BlockIndex, SlidePlan, SlideTask, WorkUnit
from wsi_mmm.errors import OutputError, StorageError
from wsi_mmm.storage import store
from wsi_mmm.types import I64, Grid, Objects

Arrays = dict[str, npt.NDArray[Any]]

PLAN = "plan.npz"
_FIELDS = ("coords", "ring_offsets", "object_offsets", "class_index", "anchor")
_HALF_WRITTEN = re.compile(
    r"\.(result\.geojson(\.gz)?|overlay\.png|attention-[\w-]+\.png|tiles\.parquet|slide_features\.h5|slide\.json)\.\w+"
)


def block_name(block: BlockIndex) -> str:
    """A block as files name it: ``row-column``."""
    return f"{block[0]}-{block[1]}"


def plan_uri(slide: SlideTask) -> str:
    """The file of the plan of a slide under way."""
    return store.join(slide.scratch, PLAN)


def save_plan(plan: SlidePlan) -> None:
    """Write what units and a later step need of a plan; of listed tiles also their grid and where they lie."""
    arrays: Arrays = {"index": plan.index, "tissue": plan.tissue, "tissue_px2": plan.tissue_px2}
    if plan.places is not None:
        arrays |= {"places": plan.places, "grid": np.array(json.dumps(astuple(plan.grid)))}
    save_arrays(plan_uri(plan.slide), arrays)


def listed_grid(arrays: Arrays) -> Grid | None:
    """The grid of a plan of listed tiles; None of others."""
    return Grid(*json.loads(str(arrays["grid"]))) if "grid" in arrays else None


def listed_places(unit: WorkUnit) -> I64:
    """The places int64[k, 4] of the listed tiles of a unit. Raises StorageError, OutputError."""
    grid, index = unit.planned_grid, unit.index()
    places = _load_places(plan_uri(unit.slide), grid)
    return np.asarray(places[index[:, 0] * grid.columns + index[:, 1]], np.int64)


@lru_cache(maxsize=8)
def _load_places(uri: str, grid: Grid) -> I64:
    """The places int64[n, 4] of a plan, row-major in its grid."""
    arrays = load_arrays(uri)
    index = arrays["index"]
    if listed_grid(arrays) != grid:
        raise OutputError(f"{store.redact(uri)} is of another list of tiles: does another run use the same output?")
    places = np.empty_like(arrays["places"])
    places[index[:, 0] * grid.columns + index[:, 1]] = arrays["places"]
    return places


def part_uri(slide: SlideTask, task: str, block: BlockIndex) -> str:
    """The file of the part of a block."""
    return store.join(slide.scratch, "parts", f"{task}-{block_name(block)}.npz")


def save_part(slide: SlideTask, task: str, block: BlockIndex, objects: Objects) -> None:
    """Write a part whole, or not at all."""
    arrays = {name: getattr(objects, name) for name in _FIELDS}
    arrays |= {f"m/{name}": values for name, values in objects.measurements.items()}
    save_arrays(part_uri(slide, task, block), arrays)


def load_part(slide: SlideTask, task: str, block: BlockIndex) -> Objects:
    """Read a part; a missing one is a StorageError that names it."""
    arrays = load_arrays(part_uri(slide, task, block))
    measured = {name[2:]: values for name, values in arrays.items() if name.startswith("m/")}
    coords, ring_offsets, object_offsets, class_index, anchor = (arrays[name] for name in _FIELDS)
    return Objects(task, coords, ring_offsets, object_offsets, class_index, anchor, measured)


def read_json(uri: str) -> dict[str, object] | None:
    """A JSON object, or None when it is missing or torn."""
    if not store.exists(uri):
        return None
    try:
        found = json.loads(store.read_bytes(uri))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def remove_scratch(task: SlideTask) -> None:
    """Remove parts and maps of this slide that are not in a shared cache; the plan goes first (see `check_kept`)."""
    scratch = store.join(task.output, ".work")
    context.forget_entries(scratch)
    for uri in sorted(store.list_uris(scratch), key=lambda uri: not uri.endswith(PLAN)):
        store.delete(uri)
    if store.is_local(scratch):
        shutil.rmtree(store.local_path(scratch), ignore_errors=True)  # the empty folders


def remove_half_written(task: SlideTask) -> None:
    """Remove the files that a run was writing beside their final names when it was killed."""
    if store.is_local(task.output):
        for path in Path(store.local_path(task.output)).glob(".*"):
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink(missing_ok=True)


def check_kept(task: SlideTask) -> None:
    """Raise OutputError when another run has removed this slide's scratch: what was read from it may be blank."""
    if not store.exists(plan_uri(task)):
        where = f"the files in work at {store.redact(task.output)} are gone"
        raise OutputError(f"{where}: does another run use the same output? run this again")


def save_arrays(uri: str, arrays: Arrays) -> None:
    """Write a file of arrays whole, or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    store.write_bytes(uri, buffer.getvalue())


def load_arrays(uri: str) -> Arrays:
    """Read a file of arrays; StorageError when it is missing or damaged."""
    try:
        with np.load(io.BytesIO(store.read_bytes(uri)), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (ValueError, KeyError, OSError) as error:
        raise StorageError(
            f"{store.redact(uri)} is not a part file: {error}; run again with the option force"
        ) from error
