"""Works and plans as they travel: what a worker cannot know, in JSON, and the tiles as bits.

The recipe is sent by its key, and kept once per process (`keep`): a work of sixteen tiles is some 350 bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import zlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from wsi_mmm.engine.plan import SlidePlan
from wsi_mmm.engine.recipe import Recipe, recipe_from_json
from wsi_mmm.engine.units import SlideTask, UnitResult, WorkUnit, pack
from wsi_mmm.types import F32, I64, Grid

_lock = threading.Lock()
_recipes: dict[str, Recipe] = {}

Find = Callable[[str], str | None]
"""Gives the JSON of the recipe of a key, or None when nobody knows it any more."""


def recipe_json(recipe: Recipe) -> str:
    """All of a recipe; ``recipe_key`` is made from this."""
    return json.dumps(recipe.to_json(), sort_keys=True)


def recipe_key(text: str) -> str:
    """What a recipe is called on its way: 16 hex digits of a hash of its JSON."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_of(key: str, find: Find) -> Recipe:
    """The recipe of a key, asked for once per process. LookupError when it is gone."""
    with _lock:
        if key not in _recipes:
            text = find(key)
            if text is None:
                raise LookupError(f"the recipe {key} is not known to the scheduler any more")
            _recipes[key] = recipe_from_json(json.loads(text))
        return _recipes[key]


def packed(unit: WorkUnit, key: str) -> bytes:
    """A work as it is sent; ``key``: that of its recipe."""
    slide, grid = unit.slide, unit.grid
    place = [slide.id, slide.uri, slide.output, slide.mpp, slide.mask, slide.error, slide.reader]
    rest = [unit.block, _shrunk(unit.tiles), grid and astuple(grid), unit.entry]
    return json.dumps([key, unit.kind, place, *rest], separators=(",", ":")).encode()


def unpacked(data: bytes, find: Find) -> WorkUnit:
    """The work that was `packed`, equal to it."""
    key, kind, place, block, tiles, grid, entry = json.loads(data)
    name, uri, output, mpp, mask, error, reader = place
    slide = SlideTask(name, uri, output, recipe_of(key, find), mpp, mask, error, reader)
    return WorkUnit(kind, slide, tuple(block), _grown(tiles), Grid(*grid) if grid else None, entry)


# ---------------------------------------------------------------- tiles


def _shrunk(tiles: bytes) -> str:
    """Tiles as the rectangle they lie in and a bit for each of its places: 70 bytes for those of a block."""
    if not tiles:
        return ""
    index = np.frombuffer(tiles, np.int32).reshape(-1, 2).astype(np.int64)
    low, size = index.min(axis=0), np.ptp(index, axis=0) + 1
    bits = np.zeros(size, bool)
    bits[tuple((index - low).T)] = True
    if not np.array_equal(np.argwhere(bits), index - low):  # not row-major, or a tile twice
        return "!" + base64.b64encode(tiles).decode()
    data = zlib.compress(np.packbits(bits).tobytes(), 1)
    return f"{low[0]},{low[1]},{size[0]},{size[1]}," + base64.b64encode(data).decode()


def _grown(text: str) -> bytes:
    if not text:
        return b""
    if text.startswith("!"):
        return base64.b64decode(text[1:])
    *numbers, data = text.split(",")
    row, column, height, width = map(int, numbers)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(data)), np.uint8), count=height * width)
    return pack(np.argwhere(bits.reshape(height, width)) + np.array([row, column]))


# ---------------------------------------------------------------- plans


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """A plan without what the books do not need: the tissue of each tile, the slide's own properties, its recipe."""

    plan: SlidePlan
    tiles: str


_NO_TILES: I64 = np.zeros((0, 2), np.int64)
_NO_TISSUE: F32 = np.zeros(0, np.float32)


def light(result: UnitResult) -> UnitResult:
    """A receipt as it travels; only that of a plan is heavy."""
    plan = result.payload
    if not isinstance(plan, SlidePlan):
        return result
    bare: Any = None  # the task is known where the receipt goes
    kept = replace(plan, index=_NO_TILES, tissue=_NO_TISSUE, slide=bare, info=replace(plan.info, properties={}))
    return replace(result, payload=PackedPlan(kept, _shrunk(pack(plan.index))))


def whole(result: UnitResult, slide: SlideTask) -> UnitResult:
    """The receipt with a plan that works can be made of; its ``tissue`` stays behind, in the file of the plan."""
    if not isinstance(result.payload, PackedPlan):
        return result
    index = np.frombuffer(_grown(result.payload.tiles), np.int32).reshape(-1, 2).astype(np.int64)
    plan = result.payload.plan
    return replace(result, payload=replace(plan, slide=replace(slide, reader=plan.info.reader), index=index))
