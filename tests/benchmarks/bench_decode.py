"""Decoding on the device: what the reader still costs, how fast both ways are, how far the pixels lie apart."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from wsi_mmm.engine.stages.decoding import judged, measure
from wsi_mmm.model.device_decode import DeviceDecoder
from wsi_mmm.slides import Slide, open_slide
from wsi_mmm.slides.tiff.reader import TiffReader
from wsi_mmm.tiles.grid import make_grid, tiles_at
from wsi_mmm.tiles.tissue import select_tiles, tissue_mask
from wsi_mmm.types import Tiles

COUNT = 128  # tiles


def main() -> None:
    """Print a block of lines per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    decoder = DeviceDecoder(torch.device(given.device))
    with open_slide(given.slide) as slide:
        native = slide.info.mpp_x or 0.25
        for mpp, size, overlap in ((native, 256, 0), (2 * native, 256, 0), (0.5, 224, 32)):
            case(slide, tissue(slide, mpp, size, overlap), decoder)


def tissue(slide: Slide, mpp: float, size: int, overlap: int) -> Tiles:
    """Tissue tiles round the one in the middle of their order."""
    grid = make_grid(slide.info, mpp, tile=size, overlap=overlap)
    tiles = tiles_at(grid, select_tiles(grid, tissue_mask(slide, "auto")))
    far = np.abs(tiles.xy - tiles.xy[len(tiles.xy) // 2]).max(axis=1)
    return replace(tiles, xy=tiles.xy[np.sort(np.argsort(far, kind="stable")[:COUNT])])


def case(slide: Slide, tiles: Tiles, decoder: DeviceDecoder) -> None:
    """One resolution and tile size."""
    reader = slide.reader
    assert isinstance(reader, TiffReader)
    out, fetched = np.empty((len(tiles.xy), tiles.size, tiles.size, 3), np.uint8), reader.fetch([tiles])
    looked = micros(reader, lambda: reader.read_encoded(tiles, fetched))
    alone = micros(reader, lambda: reader.read_tiles(tiles, list(out), fetched))
    encoded = reader.read_encoded(tiles, fetched)
    apart = np.abs(decoder.decode(encoded).pixels.cpu().numpy().astype(int) - out)
    share = len(encoded.natives) / len(out)
    print(f"{tiles.size} px, {tiles.scale_x:.3f} native px each, {share:.1f} native tiles a tile")
    print(f"  of a core: reader alone {alone:.0f} us a tile, handing over {looked:.0f}")
    print(f"  pixels apart: mean {apart.mean():.3f}, 99.9 % {np.percentile(apart, 99.9):.0f}, most {apart.max()}")
    print(f"  on {decoder.device}: {judged(measure(reader, tiles, decoder)).words}")


def micros(reader: TiffReader, work: Callable[[], object]) -> float:
    """Microseconds of this thread per tile, the best of four; nothing decoded is remembered."""
    best = np.inf
    for _ in range(4):
        reader._cache.clear()
        begin = time.thread_time()
        work()
        best = min(best, time.thread_time() - begin)
    return float(1e6 * best / COUNT)


if __name__ == "__main__":
    main()
