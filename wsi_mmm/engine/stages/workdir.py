"""Part files: what an interpret work leaves for publish. Plain npz (never pickled), named by task and block."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from wsi_mmm.engine.plan import SlidePlan
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import StorageError
from wsi_mmm.storage import store
from wsi_mmm.types import F32, I64, Objects

_FIELDS = ("coords", "ring_offsets", "object_offsets", "class_index", "anchor")


PLAN = "plan.npz"


def plan_uri(slide: SlideTask) -> str:
    """Where the plan of a slide in work lies."""
    return store.join(slide.scratch, PLAN)


def part_uri(slide: SlideTask, task: str, block: tuple[int, int]) -> str:
    """Where the part of a block lies."""
    return store.join(slide.scratch, "parts", f"{task}-{block[0]}-{block[1]}.npz")


def save_part(slide: SlideTask, task: str, block: tuple[int, int], objects: Objects) -> None:
    """Write a part whole, or not at all."""
    arrays = {name: getattr(objects, name) for name in _FIELDS}
    arrays |= {f"m/{name}": values for name, values in objects.measurements.items()}
    _save(part_uri(slide, task, block), arrays)


def load_part(slide: SlideTask, task: str, block: tuple[int, int]) -> Objects:
    """Read a part back; a missing one is a StorageError that names it."""
    arrays = _load(part_uri(slide, task, block))
    measured = {name[2:]: values for name, values in arrays.items() if name.startswith("m/")}
    coords, ring_offsets, object_offsets, class_index, anchor = (arrays[name] for name in _FIELDS)
    return Objects(task, coords, ring_offsets, object_offsets, class_index, anchor, measured)


def save_plan(plan: SlidePlan) -> None:
    """Write down which tiles a slide's results are made of."""
    _save(plan_uri(plan.slide), {"index": plan.index, "tissue": plan.tissue})


def load_plan(slide: SlideTask) -> tuple[I64, F32]:
    """Tiles int64[n, 2] (row, column) and their tissue share float32[n]."""
    arrays = _load(plan_uri(slide))
    return arrays["index"], arrays["tissue"]


def read_json(uri: str) -> dict[str, Any] | None:
    """A JSON object, or None when it is missing or torn."""
    if not store.exists(uri):
        return None
    try:
        found = json.loads(store.read_bytes(uri))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _save(uri: str, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    store.write_bytes(uri, buffer.getvalue())


def _load(uri: str) -> dict[str, Any]:
    try:
        with np.load(io.BytesIO(store.read_bytes(uri)), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (ValueError, KeyError, OSError) as error:
        raise StorageError(f"{store.redact(uri)} is not a part file: {error}; run again with --force") from error
