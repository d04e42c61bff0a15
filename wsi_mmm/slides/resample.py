"""Area averaging and bilinear enlarging with absolute coordinates.

Output pixel k of an axis covers the source interval [edge(k), edge(k + 1)); edges are rounded to 1/65536 source px and
are computed from the absolute k, so weights do not depend on the block. All sums are exact integers (uint16, or float32
below 2**24), which makes every pixel the same bits on any machine, in any strip and any block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from wsi_mmm.types import I64, U8

_ONE = 1 << 16
_WEIGHT = 256  # sum of the weights of one output pixel along one axis
_HALF = np.float32(1 << 15)
_STRIP = 1 << 20  # samples of the source converted at a time: stays near the processor
_ACROSS = 1 << 14  # output px made by one product


@dataclass(frozen=True, slots=True)
class Taps:
    """One axis: output pixel k is the weighted sum of source px ``index[offsets[k]:offsets[k + 1]]`` (absolute)."""

    offsets: I64
    index: I64
    weight: I64

    @property
    def first(self) -> int:
        """First source px used."""
        return int(self.index.min())

    @property
    def stop(self) -> int:
        """One past the last source px used."""
        return int(self.index.max()) + 1


def taps(start: int, count: int, scale: float, origin: float = 0.0) -> Taps:
    """Return the taps of output pixels start..start+count-1, each ``scale`` source px wide, from ``origin``."""
    if scale < 1.0 - 1e-9:
        return _bilinear(start, count, scale, origin)
    edges = np.floor((origin + np.arange(start, start + count + 1) * scale) * _ONE + 0.5).astype(np.int64)
    first, stop = edges[:-1] >> 16, -(-edges[1:] >> 16)
    number = stop - first
    offsets = np.concatenate(([0], np.cumsum(number)))
    rank = np.arange(offsets[-1]) - np.repeat(offsets[:-1], number)
    index = np.repeat(first, number) + rank
    low, high = np.repeat(edges[:-1], number), np.repeat(edges[1:], number)
    # Rounding the running sum, not each weight, keeps every sum at exactly _WEIGHT.
    total = high - low
    after = (np.minimum((index + 1) << 16, high) - low) * _WEIGHT
    before = (np.maximum(index << 16, low) - low) * _WEIGHT
    weight = (after + total // 2) // total - (before + total // 2) // total
    return _without_zeros(offsets, index, weight)


def _bilinear(start: int, count: int, scale: float, origin: float) -> Taps:
    centre = np.floor((origin + (np.arange(start, start + count) + 0.5) * scale - 0.5) * _ONE + 0.5).astype(np.int64)
    left = centre >> 16
    right_weight = ((centre & (_ONE - 1)) * _WEIGHT + _ONE // 2) >> 16
    index = np.stack([left, left + 1], axis=1).ravel()
    weight = np.stack([_WEIGHT - right_weight, right_weight], axis=1).ravel()
    return _without_zeros(np.arange(0, 2 * count + 1, 2), index, weight)


def _without_zeros(offsets: I64, index: I64, weight: I64) -> Taps:
    keep = weight > 0
    kept = np.concatenate(([0], np.cumsum(keep)))
    return Taps(kept[offsets], index[keep], weight[keep])


def resample(source: U8, y: Taps, x: Taps) -> U8:
    """Return uint8[len(y), len(x), 3] of ``source`` uint8[h, w, 3], whose pixel (0, 0) is (y.first, x.first)."""
    rows, columns = len(y.offsets) - 1, len(x.offsets) - 1
    width = source.shape[1]
    out = np.empty((rows, columns, 3), np.uint8)
    step = max(1, min(rows, _ACROSS // columns))
    # As many rows at a time as keep the source strip small, in whole steps.
    down = step * max(1, int(_STRIP / (width * 3 * step * max(1.0, source.shape[0] / rows))))
    matrix = _across(x, width, step)
    for r0 in range(0, rows, down):
        strip = _down(source, y, r0, min(rows, r0 + down))
        for s0 in range(0, len(strip), step):
            part = strip[s0 : s0 + step]
            if len(part) < step:
                matrix = _across(x, width, len(part))
            total = matrix @ part.reshape(-1, 3).astype(np.float32)
            np.add(total, _HALF, out=total)
            np.right_shift(total.astype(np.uint32), 16, out=total.view(np.uint32))
            out[r0 + s0 : r0 + s0 + len(part)] = total.view(np.uint32).reshape(len(part), columns, 3)
    return out


def _down(source: U8, y: Taps, r0: int, r1: int) -> Any:
    """Sum of rows, uint16[r1 - r0, w * 3] in 1/256 grey levels."""
    p0, p1 = int(y.offsets[r0]), int(y.offsets[r1])
    s0, s1 = int(y.index[p0]), int(y.index[p1 - 1]) + 1
    rows = source[s0 - y.first : s1 - y.first].reshape(s1 - s0, -1).astype(np.uint16)
    matrix = _csr(y.weight[p0:p1].astype(np.uint16), y.index[p0:p1] - s0, y.offsets[r0 : r1 + 1] - p0, s1 - s0)
    return matrix @ rows


def _across(x: Taps, width: int, rows: int) -> Any:
    """The same taps for ``rows`` rows laid end to end, as one sparse matrix."""
    index = ((x.index - x.first) + (np.arange(rows) * width)[:, None]).ravel()
    offsets = (x.offsets[1:] + (np.arange(rows) * x.offsets[-1])[:, None]).ravel()
    return _csr(np.tile(x.weight, rows).astype(np.float32), index, np.concatenate(([0], offsets)), rows * width)


def _csr(data: Any, index: I64, offsets: I64, width: int) -> Any:
    from scipy.sparse import csr_array

    return csr_array((data, index.astype(np.int32), offsets.astype(np.int32)), shape=(len(offsets) - 1, width))
