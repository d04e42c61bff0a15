"""Blending overlapping tiles in integers: exact, and independent of the order and the grouping of the tiles."""

from __future__ import annotations

import numpy as np

from wsi_mmm.types import I32, I64, U8


def window_weights(size: int, overlap: int) -> I32:
    """int32[size, size]: a pyramid-edged window, 1 at the rim rising to ``overlap`` and flat inside (map px)."""
    ramp = max(1, overlap)
    i = np.arange(size)
    line = np.minimum(np.minimum(i + 1, size - i), ramp)
    return np.multiply.outer(line, line).astype(np.int32)


def blend(tiles: U8, positions: I64, *, shape: tuple[int, int], weights: I32) -> U8:
    """Weighted mean of tiles uint8[k, C, s, s] laid at ``positions`` int64[k, 2] (row, column of their first px).

    Returns uint8[C, *shape], rounded half up; px that no tile covers are 0. Tiles may hang over the edges.
    ``weights`` int32[s, s] from `window_weights`. Sums are exact for up to 2**31 / (255 * max weight) layers.
    """
    channels, size = tiles.shape[1], tiles.shape[2]
    height, width = shape
    total = np.zeros((channels, height, width), np.int32)
    mass = np.zeros((height, width), np.int32)
    for tile, (row, column) in zip(tiles, positions.tolist(), strict=True):
        top, left = max(row, 0), max(column, 0)
        bottom, right = min(row + size, height), min(column + size, width)
        if top >= bottom or left >= right:
            continue
        inside = np.s_[top - row : bottom - row, left - column : right - column]
        part = weights[inside]
        total[:, top:bottom, left:right] += tile[:, inside[0], inside[1]] * part
        mass[top:bottom, left:right] += part
    half = mass >> 1
    return ((total + half) // np.maximum(mass, 1)).astype(np.uint8)
