"""Decoding on the model's device: the reader's pixels, its edges and its failures, here with the CPU's decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_mmm.model.device_decode import DeviceDecoder
from wsi_mmm.slides.encoded import COARSEST
from wsi_mmm.slides.registry import READERS
from wsi_mmm.slides.scaled import sources_of
from wsi_mmm.slides.tiff import TiffReader
from wsi_mmm.types import I64, U8, Tiles

CPU = torch.device("cpu")
CASES = [
    (1.0, 256, 256),  # native tiles themselves
    (1.0, 200, 180),  # cut from them
    (2.0, 256, 256),
    (1.9011, 224, 192),
    (3.0, 128, 96),
    (COARSEST, 64, 64),
]


def a_reader(path: Path, *, exact: bool = False) -> TiffReader:
    """The TIFF reader; ``exact``: one that averages full pixels where its codec would decode to 1/2, 1/4 or 1/8."""
    reader = READERS["tiff"](str(path))
    assert isinstance(reader, TiffReader)
    if exact:
        reader._sources = sources_of(reader.info.levels)
    return reader


def everywhere(reader: TiffReader, scale: float, size: int, stride: int) -> Tiles:
    """Two tiles in three of a grid that reaches beyond the slide, always the same ones."""
    columns, rows = int(reader.info.width / scale / stride) + 1, int(reader.info.height / scale / stride) + 1
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2) * stride
    chosen = grid[np.random.default_rng(1).random(len(grid)) < 0.67]
    return Tiles(chosen.astype(np.int64), size, scale, scale, size - stride)


def by_reader(reader: TiffReader, tiles: Tiles) -> tuple[U8, I64]:
    """The tiles and failures that the reader itself gives."""
    out = np.full((len(tiles.xy), tiles.size, tiles.size, 3), 7, np.uint8)
    return out, reader.read_tiles(tiles, list(out))


@pytest.mark.parametrize(("scale", "size", "stride"), CASES)
def test_decoded_tiles_are_the_readers_to_the_bit(tiny_slide: Path, scale: float, size: int, stride: int) -> None:
    """Whole, cut, overlapping, averaged, at the slide's edge and beyond it."""
    reader = a_reader(tiny_slide)
    tiles = everywhere(reader, scale, size, stride)
    assert not reader.obstacle(tiles)
    got = DeviceDecoder(CPU).decode(reader.read_encoded(tiles))
    want, failed = by_reader(a_reader(tiny_slide, exact=True), tiles)
    assert not len(failed) and not len(got.failed)
    assert np.array_equal(got.pixels.numpy(), want)


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_the_codecs_own_reduction_lies_near(tiny_slide: Path, scale: float) -> None:
    """Where the reader lets its codec decode to 1/2 or 1/4, the mean difference is below one grey level."""
    reader = a_reader(tiny_slide)
    tiles = everywhere(reader, scale, 128, 128)
    got = DeviceDecoder(CPU).decode(reader.read_encoded(tiles)).pixels.numpy()
    want, _ = by_reader(reader, tiles)
    assert 0 < np.abs(got.astype(int) - want).mean() < 1
