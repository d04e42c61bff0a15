"""Forward a block of tiles through the network: read, compute, write. Each step may be repeated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from wsi_mmm.cache import ArraySpec
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.stages.workdir import block_name
from wsi_mmm.engine.units import ForwardResult
from wsi_mmm.tiles.grid import BlockTiles, tile_size_level0, tiles_at
from wsi_mmm.tiles.stream import read_block
from wsi_mmm.types import Batch

if TYPE_CHECKING:
    from wsi_mmm.model.runner import RunOutput


def forward(ctx: UnitContext) -> ForwardResult:
    """Read, compute and write a block in one thread."""
    batch = read_tiles(ctx)
    return cached_result(ctx) if batch is None else write_values(ctx, batch, compute(ctx, batch))


def read_tiles(ctx: UnitContext) -> Batch | None:
    """The tiles of a block; None when the cache already holds their values."""
    with ctx.step("read"):
        unit, index = ctx.unit, ctx.unit.index()
        if is_computed(ctx):
            if ctx.fetches is not None:
                ctx.fetches.drop([unit])
            return None
        fetched = ctx.fetches.take(unit) if ctx.fetches is not None else None
        return read_block(ctx.reader(tiles_at(ctx.grid, index)), ctx.grid, BlockTiles(*unit.block, index), fetched)


def is_computed(ctx: UnitContext) -> bool:
    """Return whether the cache holds the values of all tiles of the block."""
    found = None if ctx.recipe.options.force else ctx.cache.block_record(block_name(ctx.unit.block))
    return bool(found and found.get("tiles") == ctx.unit.tiles.hex() and not found.get("failed"))


def compute(ctx: UnitContext, batch: Batch) -> RunOutput:
    """Run the network over the tiles of a block."""
    with ctx.step("model"):
        return ctx.runner.run(batch.pixels, list(ctx.recipe.tasks))


def write_values(ctx: UnitContext, batch: Batch, output: RunOutput) -> ForwardResult:
    """Write the block's shards to the cache, and last the mark that they are complete."""
    width, height = tile_size_level0(ctx.grid)
    failed = tuple((int(x), int(y), width, height) for x, y in batch.xy[batch.failed])
    with ctx.step("write"):
        cache = ctx.cache
        if ctx.recipe.options.features or any(task.scope == "bag" for task in ctx.tasks):
            cache.write_block(features_spec(output.features.shape[1]), batch.index, output.features)
        for name, values in output.maps.items():
            cache.write_block(ArraySpec(f"maps/{name}", values.shape[1:], "uint8"), batch.index, values)
        for name, values in output.tables.items():
            cache.write_block(ArraySpec(f"tables/{name}", values.shape[1:], str(values.dtype)), batch.index, values)
        cache.write_block_record(block_name(ctx.unit.block), {"tiles": ctx.unit.tiles.hex(), "failed": failed})
    return ForwardResult(
        ctx.facts(), len(batch.index), failed, device=str(ctx.runner.device), encoder=json.dumps(ctx.runner.describe()),
        tile_cache=ctx.tile_cache_text(),
    )  # fmt: skip


def cached_result(ctx: UnitContext) -> ForwardResult:
    """The result of a block whose values are in the cache."""
    return ForwardResult(ctx.facts(), len(ctx.unit.index()), cached=True)


def features_spec(size: int) -> ArraySpec:
    """The array of pooled vectors, ``size`` numbers per tile."""
    return ArraySpec("features", (size,), "float32")
