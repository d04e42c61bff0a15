"""Windows of blended maps: how tiles are laid into them, and the part that is interpreted.

Overlapping tiles are blended in integers: exact, and independent of the order and the grouping of the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsi_mmm.types import I32, I64, U8


@dataclass(frozen=True, slots=True)
class View:
    """The position of a window of blended maps on its slide, and the part of it that is interpreted.

    ``y0``, ``x0``: target px of the window's first map px (multiples of the task's stride). ``core``: (y0, x0, y1, x1)
    in target px, half open: objects whose anchor lies in it belong to this view. ``scale_x``, ``scale_y``: level-0 px
    per target px. ``width``, ``height``: size of the slide in target px.
    """

    y0: int
    x0: int
    core: tuple[int, int, int, int]
    scale_x: float
    scale_y: float
    width: int
    height: int


def check_view(window: U8, view: View, stride: int) -> None:
    """ValueError if window and view do not lie on the map grid (a mistake of the caller, not of a user)."""
    values = (view.y0, view.x0, *view.core)
    if window.ndim != 3 or window.dtype != np.uint8 or any(v % stride for v in values):
        raise ValueError(f"window must be uint8[C, h, w] and the view on a grid of {stride} target px: {view}")


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
