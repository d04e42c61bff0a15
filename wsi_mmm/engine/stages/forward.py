"""Forward a block of tiles through the network: read, compute, write; or only read its pixels into the cache."""

from __future__ import annotations

import json

from wsi_mmm.cache import ArraySpec, CachedReader
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.stages.workdir import block_name
from wsi_mmm.engine.units import ForwardResult
from wsi_mmm.tiles.grid import BlockTiles, tile_size_level0, tiles_at
from wsi_mmm.tiles.stream import read_block
from wsi_mmm.types import F32, U8, Batch, Tiles


def forward(ctx: UnitContext) -> ForwardResult:
    """Read, compute and write the values of a block, unless the cache holds them."""
    with ctx.step("read"):
        batch = read_tiles(ctx)
    if batch is None:
        return ForwardResult(ctx.facts(), len(ctx.unit.index()), cached=True)
    with ctx.step("model"):
        runner = ctx.runner
        output = runner.run(batch.pixels, list(ctx.recipe.tasks))
    width, height = tile_size_level0(ctx.grid)
    failed = tuple((int(x), int(y), width, height) for x, y in batch.xy[batch.failed])
    with ctx.step("write"):
        values: dict[str, U8 | F32] = {f"maps/{name}": maps for name, maps in output.maps.items()}
        values |= {f"tables/{name}": table for name, table in output.tables.items()}
        if ctx.recipe.options.features or any(task.scope == "bag" for task in ctx.tasks):
            values["features"] = output.features
        cache = ctx.cache
        for name, array in values.items():
            cache.write_block(ArraySpec(name, array.shape[1:], str(array.dtype)), batch.index, array)
        # Last, because it says that the others are complete.
        cache.write_block_record(block_name(ctx.unit.block), {"tiles": ctx.unit.tiles.hex(), "failed": failed})
    return ForwardResult(
        ctx.facts(), len(batch.index), failed, device=str(runner.device), encoder=json.dumps(runner.describe()),
        tile_cache=ctx.tile_cache_text(),
    )  # fmt: skip


def read_tiles(ctx: UnitContext) -> Batch | None:
    """The tiles of a block; None when the cache already holds their values."""
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


def extract(ctx: UnitContext) -> None:
    """Read the shards of an extract unit that the cache does not hold; the cache knows what cannot be read of them."""
    grid, index = ctx.grid, ctx.unit.index()
    cached = ctx.reader(Tiles(index[:, ::-1] * grid.stride, grid.tile, grid.scale_x, grid.scale_y))
    assert isinstance(cached, CachedReader)  # see `through_pool`
    cached.fill([(row, column) for row, column in index.tolist()])
