"""Units and plans as they travel: what a worker cannot know, in JSON, and the tiles as bits.

The recipe is sent by its key, and kept once per process: a unit of sixteen tiles is some 350 bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import zlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import numpy as np

from wsi_mmm.engine.recipe import Recipe, recipe_from_json
from wsi_mmm.engine.units import PlanResult, SlidePlan, SlideTask, UnitFacts, UnitResult, WorkUnit, pack_tiles
from wsi_mmm.types import F32, I64, Grid

_lock = threading.Lock()
_recipes: dict[str, Recipe] = {}

FindRecipe = Callable[[str], str | None]
"""Gives the JSON of the recipe of a key, or None when it is not known any more."""


def recipe_json(recipe: Recipe) -> str:
    """A recipe as JSON; ``recipe_key`` is made from it."""
    return json.dumps(recipe.to_json(), sort_keys=True)


def recipe_key(text: str) -> str:
    """The key of a recipe: 16 hex digits of a hash of its JSON."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_recipe(key: str, find: FindRecipe) -> Recipe:
    """The recipe of a key, asked for once per process. LookupError when it is gone."""
    with _lock:
        if key not in _recipes:
            text = find(key)
            if text is None:
                raise LookupError(f"the recipe {key} is not known to the scheduler any more")
            _recipes[key] = recipe_from_json(json.loads(text))
        return _recipes[key]


def pack_unit(unit: WorkUnit, key: str) -> bytes:
    """A unit as it is sent; ``key``: the key of its recipe."""
    slide, grid = unit.slide, unit.grid
    place = [
        slide.id,
        slide.uri,
        slide.output,
        slide.mpp,
        slide.mask,
        slide.error,
        slide.reader,
        slide.scene,
        slide.tiles,
    ]
    rest = [unit.block, _pack_bits(unit.tiles), grid and astuple(grid), unit.entry]
    return json.dumps([key, unit.kind, place, *rest], separators=(",", ":")).encode()


def unpack_unit(data: bytes, find: FindRecipe) -> WorkUnit:
    """The unit that `pack_unit` packed, equal to it."""
    key, kind, place, block, tiles, grid, entry = json.loads(data)
    name, uri, output, mpp, mask, error, reader, scene, listed = place
    slide = SlideTask(name, uri, output, load_recipe(key, find), mpp, mask, error, reader, scene, listed)
    return WorkUnit(kind, slide, tuple(block), _unpack_bits(tiles), Grid(*grid) if grid else None, entry)


# ---------------------------------------------------------------- tiles


def _pack_bits(tiles: bytes) -> str:
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


def _unpack_bits(text: str) -> bytes:
    if not text:
        return b""
    if text.startswith("!"):
        return base64.b64decode(text[1:])
    *numbers, data = text.split(",")
    row, column, height, width = map(int, numbers)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(data)), np.uint8), count=height * width)
    return pack_tiles(np.argwhere(bits.reshape(height, width)) + np.array([row, column]))


# ---------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """A PlanResult as it travels: without the tissue of each tile, the places of listed ones and the properties of the
    slide, which stay in the plan's file; the task is known where it arrives."""

    facts: UnitFacts
    plan: SlidePlan
    tiles: str


SentResult = UnitResult | PackedPlan

_NO_TILES: I64 = np.zeros((0, 2), np.int64)
_NO_TISSUE: F32 = np.zeros(0, np.float32)
_NO_RECIPE = Recipe("", "", (), 1.0, 64, 0)


def pack_result(result: UnitResult) -> SentResult:
    """A result as it travels; only that of a plan is heavy."""
    if not isinstance(result, PlanResult) or result.plan is None:
        return result
    plan = result.plan
    task = SlideTask(plan.slide.id, "", "", _NO_RECIPE, reader=plan.slide.reader)
    info = replace(plan.info, properties={})
    bare = replace(plan, index=_NO_TILES, tissue=_NO_TISSUE, slide=task, info=info, places=None)
    index = np.unique(plan.index, axis=0) if plan.grid.listed else plan.index  # which tiles, in few bits
    return PackedPlan(result.facts, bare, _pack_bits(pack_tiles(index)))


def unpack_result(sent: SentResult, slide: SlideTask) -> UnitResult:
    """The result, with a plan that units can be made of; its ``tissue`` stays in the file of the plan."""
    if not isinstance(sent, PackedPlan):
        return sent
    index = np.frombuffer(_unpack_bits(sent.tiles), np.int32).reshape(-1, 2).astype(np.int64)
    task = replace(slide, reader=sent.plan.slide.reader)
    return PlanResult(sent.facts, replace(sent.plan, slide=task, index=index))
