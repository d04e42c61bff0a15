"""Area averaging and bilinear enlarging with absolute coordinates.

Output pixel k of an axis covers the source interval [edge(k), edge(k + 1)); edges are rounded to 1/65536 source px and
are computed from the absolute k, so weights do not depend on the block. All sums are exact integers: every pixel has
the same bits on any machine and in any block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.types import I64, U8

_ONE = 1 << 16
_WEIGHT = 256  # sum of the weights of one output pixel along one axis


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
    edges = _fixed(origin + np.arange(start, start + count + 1) * scale)
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


def reach(start: I64, count: int, scale: float) -> tuple[I64, I64]:
    """First source px and one past the last that output pixels start..start+count-1 use at most, for each start."""
    if scale < 1.0 - 1e-9:
        return _fixed((start + 0.5) * scale - 0.5) >> 16, (_fixed((start + count - 0.5) * scale - 0.5) >> 16) + 2
    return _fixed(start * scale) >> 16, -(-_fixed((start + count) * scale) >> 16)


def _fixed(position: npt.NDArray[np.floating[Any]]) -> I64:
    """Source px, rounded to 1/65536."""
    return np.asarray(np.floor(position * _ONE + 0.5), np.int64)


def _bilinear(start: int, count: int, scale: float, origin: float) -> Taps:
    centre = _fixed(origin + (np.arange(start, start + count) + 0.5) * scale - 0.5)
    left = centre >> 16
    right_weight = ((centre & (_ONE - 1)) * _WEIGHT + _ONE // 2) >> 16
    index = np.stack([left, left + 1], axis=1).ravel()
    weight = np.stack([_WEIGHT - right_weight, right_weight], axis=1).ravel()
    return _without_zeros(np.arange(0, 2 * count + 1, 2), index, weight)


def _without_zeros(offsets: I64, index: I64, weight: I64) -> Taps:
    keep = weight > 0
    kept = np.concatenate(([0], np.cumsum(keep)))
    return Taps(kept[offsets], index[keep], weight[keep])


class Weights:
    """Both axes, ready for averaging rows of source pixels as they come."""

    def __init__(self, y: Taps, x: Taps) -> None:
        self._first_y, self._weight_y = _dense(y)
        self._first_x, self._weight_x = _dense(x)
        self._left, self._width = x.first, x.stop - x.first
        self._bottom = y.stop
        self.taps_y = self._weight_y.shape[1]
        self._stop_y = self._first_y + self.taps_y
        self._sums: Any = None

    def complete(self, bottom: int) -> int:
        """Return how many target rows need no source row at or below ``bottom``."""
        if bottom >= self._bottom:
            return len(self._first_y)
        return int(np.searchsorted(self._stop_y, bottom, "right"))

    def first_row(self, row: int, at_most: int) -> int:
        """Return the first source row that target row ``row`` needs, ``at_most`` at most."""
        return min(int(self._first_y[row]), at_most)

    def average(self, rows: U8, first: int, start: int, stop: int, out: U8) -> None:
        """Write target rows start..stop-1 of ``out`` uint8[all rows, columns, 3].

        ``rows`` uint8[n, w, 3]: source rows from ``first`` on, columns from x.first to x.stop. Both may be parts of
        larger pictures.
        """
        if stop > start:
            # Where the picture is smaller than the weights are many, those beyond it are 0, but their pixels are read.
            lack = int(self._first_y[stop - 1]) - first + self.taps_y - len(rows)
            source = rows if lack <= 0 else np.pad(rows, ((0, lack), (0, 0), (0, 0)))
            self.average_tiles(source[None], first, self._left, (start, stop), out)

    def average_tiles(self, tiles: U8, first: int, left: int, span: tuple[int, int], out: U8) -> None:
        """Write target rows span[0]..span[1]-1 of ``out`` uint8[all rows, columns, 3].

        ``tiles`` uint8[k, n, w, 3]: pictures side by side, whose first pixel is source row ``first``, column ``left``.
        """
        start, stop = span
        if stop <= start:
            return
        from wsi_mmm.slides.resample import kernels  # numba: a third of a second, for those who resample

        if self._sums is None:
            samples = 3 * max(tiles.shape[0] * tiles.shape[2], int(self._first_x[-1]) - left + self._weight_x.shape[1])
            self._sums = np.zeros((kernels.ROWS, samples + kernels.PAD), np.uint16)
        kernels.average(_flat(tiles), self._first_y[start:stop] - first, self._weight_y[start:stop],
                        self._first_x - left, self._weight_x, _flat(out[start:stop]), self._sums)  # fmt: skip


def _flat(pixels: U8) -> U8:
    """Pictures uint8[..., h, w, 3] as uint8[..., h, w * 3] on the same memory: their rows are of whole pixels."""
    shape, strides = pixels.shape[:-2], pixels.strides[:-2]
    if pixels.flags.c_contiguous:
        return pixels.reshape(*shape, pixels.shape[-2] * 3)
    return np.lib.stride_tricks.as_strided(pixels, (*shape, pixels.shape[-2] * 3), (*strides, 1))


def _dense(axis: Taps) -> tuple[I64, Any]:
    """Per output pixel the first source px and the uint32 weights of it and those that follow it.

    Every pixel has the same number of weights, two at least; they end with the axis where that is possible.
    """
    start = np.minimum.reduceat(axis.index, axis.offsets[:-1])
    owner = np.repeat(np.arange(len(start)), np.diff(axis.offsets))
    taps = max(2, int((axis.index - start[owner]).max()) + 1)
    first = np.clip(start, axis.first, max(axis.first, axis.stop - taps))
    weight = np.zeros((len(start), taps), np.uint32)
    np.add.at(weight, (owner, axis.index - first[owner]), axis.weight.astype(np.uint32))
    return first, weight
