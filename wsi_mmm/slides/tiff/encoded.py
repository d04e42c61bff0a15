"""Which native tiles make which tiles, written down for a decoder elsewhere. Arithmetic only.

The tiles of a block are cut from canvases of whole native tiles, at most CANVAS_PIXELS each; a canvas is averaged as
`scaled.read_scaled` averages level 0, with the same weights, so equal native pixels give equal tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from wsi_mmm.slides.resample.cut import pieces, rectangle
from wsi_mmm.slides.resample.direct import needed_numbers
from wsi_mmm.slides.resample.scaled import axes_of
from wsi_mmm.slides.resample.tiled import Tiling
from wsi_mmm.slides.resample.weights import averages
from wsi_mmm.types import I64, U8, Encoded, Patch, Tiles

CANVAS_PIXELS = 1 << 25
COARSEST = 4.0
"""Level-0 px per target px. Beyond, the reader's codec saves most of the work by decoding to 1/8."""

_SAME = 1e-6


def scale_obstacle(tiles: Tiles) -> str:
    """Why tiles of this size and scale are not made of whole level-0 tiles; empty when they can be."""
    low, high = min(tiles.scale_x, tiles.scale_y), max(tiles.scale_x, tiles.scale_y)
    if low < 1 - _SAME:
        return "finer than the slide"
    if high > COARSEST * (1 + 1e-3):
        return f"coarser than 1/{COARSEST:g} of the slide"
    return "" if (tiles.size * high) ** 2 <= CANVAS_PIXELS else f"tiles of {tiles.size} px"


def encode(tiles: Tiles, tiling: Tiling, natives: Mapping[int, bytes | U8], boxes: I64, failed: I64) -> Encoded:
    """Tiles as ``natives`` (number -> stream or pixels; what is absent is white) with level-0 rectangles ``boxes``.

    ``tiling``: of level 0 as stored.
    """
    position = {number: i for i, number in enumerate(natives)}
    patches = [_patch(tiles, group, tiling, position) for piece in pieces(tiles) for group in _halved(tiles, piece)]
    return Encoded(
        len(tiles.xy), tiles.size, tiling.height, tiling.width, tuple(natives.values()), boxes, tuple(patches), failed
    )


def _halved(tiles: Tiles, piece: I64) -> list[I64]:
    """Cut until every part's canvas is small enough, across its longer side."""
    block = rectangle(tiles, piece)
    if len(piece) == 1 or block.width * tiles.scale_x * block.height * tiles.scale_y <= CANVAS_PIXELS:
        return [piece]
    along = tiles.xy[piece, 0 if block.width > block.height else 1]
    order = np.argsort(along, kind="stable")
    half = len(order) // 2
    return [part for some in (order[:half], order[half:]) for part in _halved(tiles, np.sort(piece[some]))]


def _patch(tiles: Tiles, group: I64, tiling: Tiling, position: Mapping[int, int]) -> Patch:
    block, source = rectangle(tiles, group), tiling.source
    numbers = needed_numbers(replace(tiles, xy=tiles.xy[group]), tiling)
    numbers = np.array([n for n in numbers.tolist() if n in position], np.int64)
    cell = np.stack(np.divmod(numbers, tiling.columns), axis=1)
    axes = axes_of(block, source)
    if axes is None:
        y0, x0, y1, x1 = block.y, block.x, block.y + block.height, block.x + block.width
    else:
        y0, x0, y1, x1 = axes[0].first, axes[1].first, axes[0].stop, axes[1].stop
    row, column = y0 // tiling.height, x0 // tiling.width
    top, left = row * tiling.height, column * tiling.width
    down, across = -(-(y1 - top) // tiling.height), -(-(x1 - left) // tiling.width)
    cell = cell - [row, column]
    inside = ((cell >= 0) & (cell < [down, across])).all(axis=1)  # others were touched with weight 0
    return Patch(
        down, across,
        native=np.array([position[n] for n in numbers[inside].tolist()], np.int64), cell=cell[inside],
        edge=(max(0, source.height - top), max(0, source.width - left)),
        axes=None if axes is None else (averages(axes[0], top), averages(axes[1], left)),
        tiles=group,
        corner=tiles.xy[group][:, ::-1] - np.array([top, left] if axes is None else [block.y, block.x], np.int64),
    )  # fmt: skip
