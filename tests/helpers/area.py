"""An independent area average, for comparison."""

from __future__ import annotations

import numpy as np

from wsi_mmm.types import F64, U8


def area_average(image: U8, count: tuple[int, int], scale: tuple[float, float], origin: tuple[float, float]) -> F64:
    """Average by integrating along each axis in float64: another way to the same numbers."""
    out = image.astype(np.float64)
    for axis in (0, 1):
        out = np.moveaxis(out, axis, 0)
        total = np.concatenate([np.zeros((1, *out.shape[1:])), np.cumsum(out, axis=0)])
        edges = origin[axis] + np.arange(count[axis] + 1) * scale[axis]
        whole = np.floor(edges).astype(int)
        part = (edges - whole)[:, None, None]
        at = total[whole] * (1 - part) + total[np.minimum(whole + 1, len(out))] * part
        out = np.moveaxis((at[1:] - at[:-1]) / scale[axis], 0, axis)
    return out
