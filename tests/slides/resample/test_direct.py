"""Which native tiles are needed: no more, no fewer; and tiles equal blocks, however they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_mmm.slides.base import TileReader
from wsi_mmm.slides.registry import READERS
from wsi_mmm.slides.resample.scaled import sources_of
from wsi_mmm.slides.resample.tiled import Tiling, inner_numbers, needed_numbers, nested
from wsi_mmm.slides.resample.weights import Taps, taps
from wsi_mmm.types import U8, Block, Level, Tiles


def a_tiling(width: int = 1000, height: int = 700, tile: int = 64) -> Tiling:
    (source,) = sources_of((Level(width, height, 1.0, 1.0, tile, tile),))
    return Tiling(source, tile, tile)


def weighted(axis: Taps) -> set[int]:
    """The source px that have a weight."""
    index = axis.begin[:, None] + np.arange(axis.taps)
    return set(index[axis.weight > 0].tolist())


@settings(max_examples=80)
@given(st.data())
def test_needed_are_exactly_the_native_tiles_with_a_pixel_of_weight(data: st.DataObject) -> None:
    """Brute force over the taps of every tile gives the same, but for tiles touched with weight 0."""
    tiling = a_tiling()
    scale = data.draw(st.one_of(st.sampled_from([1.0, 2.0, 0.5]), st.floats(0.4, 5.0)))
    size = data.draw(st.sampled_from([32, 50, 64, 128]))
    xy = np.array(data.draw(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 700)), min_size=1, max_size=6)))
    want: set[int] = set()
    for x, y in xy.tolist():
        columns = {i // 64 for i in weighted(taps(x, size, scale)) if 0 <= i < 1000}
        rows = {i // 64 for i in weighted(taps(y, size, scale)) if 0 <= i < 700}
        want |= {row * tiling.columns + column for row in rows for column in columns}
    got = set(needed_numbers(Tiles(xy, size, scale, scale), tiling).tolist())
    assert want <= got
    if scale in (1.0, 2.0):
        assert got == want


def test_nested_tiles_are_whole_native_tiles_on_the_slide() -> None:
    """One px aside, beyond the edge or at another scale they are not."""
    tiling = a_tiling()
    xy = np.array([[0, 0], [128, 64], [1, 0], [0, 1], [896, 0], [960, 0], [0, 640]])
    assert nested(Tiles(xy, 64, 1.0, 1.0), tiling).tolist() == [True, True, False, False, True, False, False]
    assert not nested(Tiles(xy, 64, 1.01, 1.0), tiling).any()
    assert not nested(Tiles(xy, 96, 1.0, 1.0), tiling).any()
    assert inner_numbers(Tiles(np.array([[128, 64]]), 128, 1.0, 1.0), tiling).tolist() == [[18, 19, 34, 35]]


CASES = [
    (1.0, 256, 256),
    (1.0, 512, 512),
    (2.0, 256, 256),
    (1.0, 200, 180),
    (1.9011, 224, 192),
    (4.0, 64, 64),
    (0.7, 90, 80),
]


def cut(reader: TileReader, tiles: Tiles) -> list[U8]:
    """Each tile read alone, as a block."""
    read = (Block(x, y, tiles.size, tiles.size, tiles.scale_x, tiles.scale_y) for x, y in tiles.xy.tolist())
    return [reader.read(block).pixels for block in read]


@pytest.mark.parametrize(("scale", "size", "stride"), CASES)
@pytest.mark.parametrize("ahead", [False, True])
def test_tiles_equal_blocks(tiny_slide: Path, scale: float, size: int, stride: int, ahead: bool) -> None:
    """Decoded in place, side by side or cut from a canvas, fetched before or not: the same bytes, edges included."""
    reader = READERS["tiff"](str(tiny_slide))
    assert isinstance(reader, TileReader)
    rows, columns = int(1152 / scale / stride) + 1, int(1536 / scale / stride) + 1
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2) * stride
    chosen = grid[np.random.default_rng(1).random(len(grid)) < 0.7]
    tiles = Tiles(chosen, size, scale, scale, size - stride)
    out = [np.full((size, size, 3), 7, np.uint8) for _ in chosen]
    fetched = reader.fetch([tiles]) if ahead else None
    before = reader.stats().requests
    failed = reader.read_tiles(tiles, out, fetched)
    assert failed.shape == (0, 4)
    if ahead:
        assert reader.stats().requests == before
    for got, want in zip(out, cut(READERS["tiff"](str(tiny_slide)), tiles), strict=True):
        assert np.array_equal(got, want)
    reader.close()
