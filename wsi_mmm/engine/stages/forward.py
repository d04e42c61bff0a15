"""Forward a block of tiles through the network: read, compute, write; or only read its pixels into the cache.

Further encoders that see the same tiles (``Recipe.companions``) compute from the same pixels, into their own entries.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from wsi_mmm.cache import ArraySpec, CachedReader
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.stages.prepare import entry_uri, published_before
from wsi_mmm.engine.stages.workdir import block_name, listed_places
from wsi_mmm.engine.units import Box, ForwardResult
from wsi_mmm.errors import Cancelled, ModelNotLoaded, TransientError, WsiError
from wsi_mmm.storage import store
from wsi_mmm.tiles.grid import BlockTiles, tile_size_level0, tiles_at
from wsi_mmm.tiles.listed import read_listed
from wsi_mmm.tiles.stream import read_block
from wsi_mmm.types import F32, U8, Batch, Tiles

if TYPE_CHECKING:
    from wsi_mmm.model.answers import RunOutput

_log = logging.getLogger(__name__)


def forward(ctx: UnitContext) -> ForwardResult:
    """Read, compute and write the values of a block, unless the cache holds them."""
    with ctx.step("read"):
        batch = read_tiles(ctx)
        targets = [] if batch is None else incomplete_contexts(ctx)
    if batch is None:
        return ForwardResult(ctx.facts(), len(ctx.unit.index()), cached=True)
    with ctx.step("model"):
        outputs = _run_models(ctx, targets, batch.pixels)
    width, height = tile_size_level0(ctx.grid)
    failed = tuple((int(x), int(y), width, height) for x, y in batch.xy[batch.failed])
    with ctx.step("write"):
        for one, output in outputs:
            _write_values(one, batch, output, failed)
    if ctx not in targets:
        return ForwardResult(ctx.facts(), len(batch.index), cached=True)
    return ForwardResult(
        ctx.facts(), len(batch.index), failed, device=str(ctx.runner.device),
        encoder=json.dumps(ctx.runner.describe()), tile_cache=ctx.tile_cache_text(),
    )  # fmt: skip


def _run_models(ctx: UnitContext, targets: list[UnitContext], pixels: U8) -> list[tuple[UnitContext, RunOutput]]:
    """The values of a block by each model, all under way at once. A companion whose model raises is left out: its own
    run will say why."""
    pending, outputs = [], []
    for one in targets:
        with _pass_over_companion(ctx, one):
            pending.append((one, one.runner.begin(pixels, one.recipe.tasks)))
    for one, begun in pending:
        with _pass_over_companion(ctx, one):
            outputs.append((one, one.runner.finish(begun, len(pixels))))
    return outputs


@contextmanager
def _pass_over_companion(ctx: UnitContext, one: UnitContext) -> Iterator[None]:
    """A context that logs what ``one`` raises, where that is a companion of ``ctx`` and no retry would mend it."""
    try:
        yield
    except (ModelNotLoaded, TransientError, Cancelled):
        raise
    except Exception as error:
        if one is ctx:
            raise
        _log.warning(
            "%s: block %s is left to a run of its own: %s", store.redact(one.recipe.model), one.unit.name, error
        )


def _write_values(ctx: UnitContext, batch: Batch, output: RunOutput, failed: tuple[Box, ...]) -> None:
    """Write the values of a block to the cache entry of their recipe."""
    values: dict[str, U8 | F32] = {f"maps/{name}": maps for name, maps in output.maps.items()}
    values |= {f"tables/{name}": table for name, table in output.tables.items()}
    if ctx.recipe.options.features or any(task.scope == "bag" for task in ctx.tasks):
        values["features"] = output.features
    cache = ctx.cache
    for name, array in values.items():
        cache.write_block(ArraySpec(name, array.shape[1:], str(array.dtype)), batch.index, array)
    # Last, because it says that the others are complete.
    cache.write_block_record(block_name(ctx.unit.block), {"tiles": ctx.unit.tiles.hex(), "failed": failed})


def read_tiles(ctx: UnitContext) -> Batch | None:
    """The tiles of a block; None when the cache already holds their values."""
    unit, index = ctx.unit, ctx.unit.index()
    if is_complete(ctx):
        if ctx.fetches is not None:
            ctx.fetches.drop([unit])
        return None
    fetched = ctx.fetches.take(unit) if ctx.fetches is not None else None
    if ctx.grid.listed:
        return read_listed(ctx.slide.reader, ctx.grid, listed_places(unit), index, fetched)
    return read_block(ctx.reader(tiles_at(ctx.grid, index)), ctx.grid, BlockTiles(*unit.block, index), fetched)


def is_complete(ctx: UnitContext) -> bool:
    """Return whether nothing is to be computed of the block, for its recipe or for a companion."""
    return is_computed(ctx) and (not ctx.recipe.companions or not incomplete_contexts(ctx))


def is_computed(ctx: UnitContext) -> bool:
    """Return whether the cache holds the values of all tiles of the block."""
    again = ctx.recipe.options.force and not ctx.recipe.after_others
    found = None if again else ctx.cache.block_record(block_name(ctx.unit.block))
    return bool(found and found.get("tiles") == ctx.unit.tiles.hex() and not found.get("failed"))


def incomplete_contexts(ctx: UnitContext) -> list[UnitContext]:
    """The contexts, this one first, of every recipe that lacks values of the block: its own, and those of companions
    whose slide is not published yet."""
    if not ctx.recipe.companions:
        return [ctx]
    _, fingerprint, _ = ctx.unit.entry.rsplit("/", 2)
    found = [] if is_computed(ctx) else [ctx]
    for place, recipe in ctx.recipe.companions:
        task = replace(ctx.task, recipe=recipe, output=store.join(place, ctx.task.id))
        one = UnitContext(replace(ctx.unit, slide=task, entry=entry_uri(task, fingerprint, ctx.grid)))
        with suppress(WsiError):  # what its own run will say
            if not is_computed(one) and (recipe.options.force or published_before(task, fingerprint) is None):
                found.append(one)
    return found


def extract(ctx: UnitContext) -> None:
    """Read the shards of an extract unit that the cache does not hold; the cache knows what cannot be read of them."""
    grid, index = ctx.grid, ctx.unit.index()
    cached = ctx.reader(Tiles(index[:, ::-1] * grid.stride, grid.tile, grid.scale_x, grid.scale_y))
    assert isinstance(cached, CachedReader)  # see `through_pool`
    cached.fill([(row, column) for row, column in index.tolist()])
