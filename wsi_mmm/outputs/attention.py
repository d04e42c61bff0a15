"""attention-<task>.png: the slide, paled, with the attention weight of each tile in a bag task."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from wsi_mmm.outputs.overlay import heat
from wsi_mmm.types import F32, F64, I64, U8, Grid

_OPAQUE = 190
_PALE = 0.4


def attention_png(thumbnail: U8, grid: Grid, index: I64, attention: F32) -> bytes:
    """``thumbnail`` uint8[h, w, 3] of the whole slide; ``index`` int64[n, 2] (row, column) of its tiles; ``attention``
    float32[n], NaN: nothing is drawn. A tile is drawn as its own stride; colours as of `levels`."""
    height, width = thumbnail.shape[:2]
    cells = np.zeros((grid.rows, grid.columns, 4), np.uint8)
    known = ~np.isnan(attention)
    row, column = index[known].T
    cells[row, column, :3] = heat(levels(attention[known])).astype(np.uint8)
    cells[row, column, 3] = _OPAQUE
    # Picture px ask which cell they lie in: tiles at the far edges reach beyond the slide.
    y = _cell_of(height, grid.height, grid.stride, grid.rows)
    x = _cell_of(width, grid.width, grid.stride, grid.columns)
    layer = Image.fromarray(cells[np.ix_(y, x)], "RGBA")
    image = Image.fromarray(thumbnail).convert("RGB")
    image = Image.blend(image, Image.new("RGB", image.size, (255, 255, 255)), _PALE)
    image.paste(layer.convert("RGB"), mask=layer.getchannel("A"))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def levels(attention: F32) -> F64:
    """0 to 1 by rank, equal shares alike: attention is skewed, a few tiles have most of it."""
    _, place, counts = np.unique(attention, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return np.zeros(len(attention))
    middle = np.cumsum(counts) - (counts + 1) / 2
    found: F64 = ((middle - middle[0]) / (middle[-1] - middle[0]))[place]
    return found


def _cell_of(places: int, length: int, stride: int, count: int) -> I64:
    found: I64 = np.minimum((np.arange(places) + 0.5) * length / places / stride, count - 1).astype(np.int64)
    return found
