"""Area averaging and bilinear enlarging with absolute coordinates.

Output pixel k of an axis covers the source interval [edge(k), edge(k + 1)); edges are rounded to 1/65536 source px and
are computed from the absolute k, so weights do not depend on the block. All sums are exact integers: every pixel has
the same bits on any machine and in any block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.types import I64, U8

U32 = npt.NDArray[np.uint32]
_ONE = 1 << 16
_WEIGHT = 256  # sum of the weights of one output pixel along one axis


@dataclass(frozen=True, slots=True)
class Taps:
    """One axis: output pixel k is the sum over t of ``weight[k, t]`` / 256 of source px ``begin[k] + t`` (absolute).

    ``begin`` int64[n], ascending; ``weight`` uint32[n, taps], two taps at least, each row of which sums to 256. Source
    px ``first`` to ``stop`` - 1 are used; the taps of all pixels lie within them where there are that many.
    """

    begin: I64
    weight: U32
    first: int
    stop: int

    @property
    def taps(self) -> int:
        """The number of weights of each pixel."""
        return int(self.weight.shape[1])

    def even_weight(self) -> U32:
        """``weight`` with an even number of taps, the last of them 0 where one was added."""
        return np.hstack([self.weight, np.zeros((len(self.weight), self.taps % 2), np.uint32)])

    def count_complete(self, bottom: int) -> int:
        """Return how many output pixels need no source px at or beyond ``bottom``."""
        if bottom >= self.stop:
            return len(self.begin)
        return int(np.searchsorted(self.begin, bottom - self.taps, "right"))


@lru_cache(256)  # blocks in a row of the grid share one axis, those in a column the other
def taps(start: int, count: int, scale: float, origin: float = 0.0, size: int | None = None) -> Taps:
    """Return the taps of output pixels start..start+count-1, each ``scale`` source px wide, from ``origin``.

    ``size``: the source px there are, at scales below 1, which look half a pixel beyond; the edge is repeated.
    """
    position = np.arange(start, start + count + 1)
    if scale < 1.0 - 1e-9:
        centre = _fixed_point(origin + (position[:-1] + 0.5) * scale - 0.5)
        right = ((centre & (_ONE - 1)) * _WEIGHT + _ONE // 2) >> 16
        first, weight = centre >> 16, np.stack([_WEIGHT - right, right], axis=1)
        if size is not None:
            weight[(first < 0) | (first >= size - 1)] = _WEIGHT, 0
            first = np.clip(first, 0, size - 1)
        return _dense_taps(first, weight)
    edges = _fixed_point(origin + position * scale)
    low, high = edges[:-1, None], edges[1:, None]
    first = edges[:-1] >> 16
    most = int((-(-edges[1:] >> 16) - first).max())
    # Rounding the running sum, not each weight, keeps every sum at exactly _WEIGHT.
    covered = np.clip(((first[:, None] + np.arange(most + 1)) << 16) - low, 0, high - low) * _WEIGHT
    return _dense_taps(first, np.diff((covered + (high - low) // 2) // (high - low), axis=1))


def reach(start: I64, count: int, scale: float) -> tuple[I64, I64]:
    """First source px and one past the last that output pixels start..start+count-1 use at most, for each start."""
    if scale < 1.0 - 1e-9:
        last = _fixed_point((start + count - 0.5) * scale - 0.5) >> 16
        return _fixed_point((start + 0.5) * scale - 0.5) >> 16, last + 2
    return _fixed_point(start * scale) >> 16, -(-_fixed_point((start + count) * scale) >> 16)


def _fixed_point(position: npt.NDArray[np.floating[Any]]) -> I64:
    """Source px, rounded to 1/65536."""
    return np.asarray(np.floor(position * _ONE + 0.5), np.int64)


def _dense_taps(first: I64, weight: I64) -> Taps:
    """The taps of ``weight`` int64[n, m], which may begin and end with zeros, moved to within the source px used."""
    used, most = weight > 0, weight.shape[1]
    start = first + used.argmax(axis=1)
    stop = first + most - used[:, ::-1].argmax(axis=1)
    low, high, count = int(start.min()), int(stop.max()), max(2, int((stop - start).max()))
    begin = np.clip(start, low, max(low, high - count))
    at = (begin - first)[:, None] + np.arange(count)
    moved = np.take_along_axis(weight, np.clip(at, 0, most - 1), axis=1)
    moved[(at < 0) | (at >= most)] = 0
    return Taps(begin, moved.astype(np.uint32), low, high)


def average_rows(rows: U8, top: int, axes: tuple[Taps, Taps], span: tuple[int, int], out: U8) -> None:
    """Write output rows span[0]..span[1]-1 of ``out`` uint8[all rows, columns, 3].

    ``rows`` uint8[n, w, 3]: source rows from ``top`` on, columns from x.first to x.stop; ``axes``: y and x. ``out`` may
    be part of a larger picture.
    """
    (start, stop), (y, x) = span, axes
    if stop <= start:
        return
    from wsi_mmm.slides.resample import kernels  # numba: a third of a second, for those who resample

    # Where the picture is smaller than the weights are many, those beyond it are 0, but their pixels are read.
    lack = int(y.begin[stop - 1]) - top + y.taps - len(rows)
    source = np.ascontiguousarray(rows) if lack <= 0 else np.pad(rows, ((0, lack), (0, 0), (0, 0)))
    width = source.shape[1]
    above, edge = np.empty((0, 3 * width), np.uint8), np.empty((stop - start, 0), np.uint16)
    sums = np.empty((kernels.ROWS, 3 * max(width, x.taps) + kernels.PAD), np.uint16)
    band = np.empty((kernels.ROWS, 3 * len(x.begin) + kernels.PAD), np.uint8)
    places = kernels.target_places(np.zeros((1, 2), np.int64), [out[start:stop]])
    kernels.average_tile(source, above, edge, y.begin[start:stop] - top, y.weight[start:stop],
                         x.begin - x.first, x.even_weight(), places, (0, 0), (0, width), sums, band)  # fmt: skip


def average_boxes(pixels: U8, factor: int) -> U8:
    """Return the means of whole boxes of ``factor`` x ``factor`` px of uint8[h, w, 3], rounded half up."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    boxes = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    total: U32 = boxes.sum(axis=(1, 3), dtype=np.uint32)
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)
