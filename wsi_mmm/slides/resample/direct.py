"""Which native tiles the tiles of a target grid need, and which consist of whole ones. Arithmetic only."""

from __future__ import annotations

import numpy as np

from wsi_mmm.slides.resample.scaled import copied
from wsi_mmm.slides.resample.tiled import Tiling
from wsi_mmm.slides.resample.weights import reach
from wsi_mmm.types import I64, Mask, Tiles


def nested(tiles: Tiles, tiling: Tiling) -> Mask:
    """Which tiles are made of whole native tiles, pixel for pixel, and lie wholly on the slide: bool[n]."""
    source = tiling.source
    width, height = tiling.width, tiling.height
    if not copied(source, tiles.scale_x, tiles.scale_y) or tiles.size % width or tiles.size % height:
        return np.zeros(len(tiles.xy), bool)
    x, y = tiles.xy[:, 0], tiles.xy[:, 1]
    right, bottom = min(source.extent_x, source.width) - tiles.size, min(source.extent_y, source.height) - tiles.size
    return np.asarray((x % width == 0) & (y % height == 0) & (x <= right) & (y <= bottom), bool)


def inner_numbers(tiles: Tiles, tiling: Tiling) -> I64:
    """Numbers int64[n, k * k] of the native tiles of nested tiles, row-major in each."""
    down, across = tiles.size // tiling.height, tiles.size // tiling.width
    row, column = tiles.xy[:, 1] // tiling.height, tiles.xy[:, 0] // tiling.width
    inner = np.arange(down)[:, None] * tiling.columns + np.arange(across)
    return (row * tiling.columns + column)[:, None] + inner.ravel()


def needed_numbers(tiles: Tiles, tiling: Tiling) -> I64:
    """Sorted numbers int64[m] of all native tiles that some tile uses."""
    if nested(tiles, tiling).all():
        return np.sort(inner_numbers(tiles, tiling), axis=None)
    source = tiling.source
    c0, c1 = _span(tiles.xy[:, 0], tiles.size, tiles.scale_x / source.downsample_x, source.width, tiling.width)
    r0, r1 = _span(tiles.xy[:, 1], tiles.size, tiles.scale_y / source.downsample_y, source.height, tiling.height)
    left, top = int(c0.min()), int(r0.min())
    marks = np.zeros((int(r1.max()) - top + 1, int(c1.max()) - left + 1), np.int32)
    for r, c, sign in ((r0, c0, 1), (r0, c1, -1), (r1, c0, -1), (r1, c1, 1)):  # a rectangle is four corners, summed
        np.add.at(marks, (r - top, c - left), sign)
    row, column = np.nonzero(marks.cumsum(axis=0).cumsum(axis=1))
    return np.asarray((row + top) * tiling.columns + column + left, np.int64)


def _span(start: I64, count: int, scale: float, size: int, step: int) -> tuple[I64, I64]:
    """First native tile and one past the last along an axis, for tiles that begin at ``start``."""
    first, stop = reach(start, count, scale)
    first, stop = np.clip(first, 0, size), np.clip(stop, 0, size)
    stop = np.where(stop > first, -(-stop // step), first // step)
    return np.minimum(first // step, stop), stop
