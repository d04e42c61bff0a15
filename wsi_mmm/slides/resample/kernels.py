"""Compiled inner loops of resampling (numba): exact integers, no lock, no Python object per pixel.

The horizontal pass is bound by how pixels of three bytes meet vectors of a power of two. One pixel at a time costs 6 ns
per target px (one core, 1.9 source px each); as vectors of four (the fourth sample falls into the next pixel, which is
written after), a column for several rows, 1.5 ns. Numba has no vectors, so this one step is written in LLVM's own
terms, which hold on every processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types, uint8, uint16, uint32
from numba.core import cgutils
from numba.extending import intrinsic

from wsi_mmm.types import I64, U8

ROWS = 8  # target rows made together: their sums stay in the first cache
OFFSET = 1 << 15  # sums are kept less this, as signed numbers of 16 bits
PAD = 32  # samples behind a row of sums that vectors may read


def _compile_loop(function: Callable[..., None]) -> Any:
    """Compile on first use, once per machine; where no folder for compiled code can be written, once per process."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


def _average_column(taps: int) -> Any:
    """Make the operation that writes one column: 4 bytes in each of ROWS rows, ``pitch`` bytes apart at ``target``.

    ``source``: the first of ``taps`` (2, 4 or 6) pixels, ``step`` bytes from row to row; ``weights`` uint32[taps].
    Two rows at a time; products are summed in pairs: one instruction on x86.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, short, byte = ir.IntType(32), ir.IntType(16), ir.IntType(8)
        source, step, target, pitch, weights = arguments

        def load(address: Any, offset: int, kind: Any, align: int) -> Any:
            place = builder.add(address, ir.Constant(ir.IntType(64), offset))
            return builder.load(builder.inttoptr(place, kind.as_pointer()), align=align)

        def shuffled(first: Any, second: Any, at: list[int]) -> Any:
            return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(number, len(at)), at))

        pairs = []
        for n in range(0, taps, 2):
            pair = builder.trunc(load(weights, 4 * n, ir.VectorType(number, 2), 4), ir.VectorType(short, 2))
            pairs.append(builder.sext(shuffled(pair, pair, [0, 1] * 8), ir.VectorType(number, 16)))
        for _ in range(0, ROWS, 2):
            below = builder.add(source, step)
            total = ir.Constant(ir.VectorType(number, 8), [(1 << 15) + 256 * OFFSET] * 8)
            for n, pair in enumerate(pairs):
                one, two = (load(row, 12 * n, ir.VectorType(short, 8), 2) for row in (source, below))
                samples = shuffled(one, two, [0, 3, 1, 4, 2, 5, 6, 7, 8, 11, 9, 12, 10, 13, 14, 15])
                products = builder.mul(builder.sext(samples, ir.VectorType(number, 16)), pair)
                both = (shuffled(products, products, list(range(start, 16, 2))) for start in (0, 1))
                total = builder.add(total, builder.add(*both))
            rounded = builder.trunc(builder.lshr(total, ir.Constant(total.type, [16] * 8)), ir.VectorType(byte, 8))
            for at in ([0, 1, 2, 3], [4, 5, 6, 7]):
                pixel = shuffled(rounded, rounded, at)
                builder.store(pixel, builder.inttoptr(target, pixel.type.as_pointer()), align=1)
                source, target = builder.add(source, step), builder.add(target, pitch)
        return context.get_dummy_value()

    signature = types.void(*[types.intp] * 5)
    return intrinsic(lambda typing, source, step, target, pitch, weights: (signature, lower))


_two, _four, _six = (_average_column(taps) for taps in (2, 4, 6))


def _copy_operation() -> Any:
    """Make the operation that copies bytes: to an address, from an address, how many."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places = [builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in arguments[:2]]
        cgutils.raw_memcpy(builder, places[0], places[1], arguments[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return intrinsic(lambda typing, target, source, count: (types.void(*[types.intp] * 3), lower))


_copy_bytes = _copy_operation()


@_compile_loop
def _sum_rows(  # noqa: PLR0913 (compiled: plain arrays)
    tile: Any, above: Any, first: Any, weight: Any, r0: int, r1: int, sums: Any, lead: int, j0: int, j1: int
) -> None:
    """Sums of samples j0 to j1 - 1 of source rows, in 1/256 grey levels less OFFSET, for target rows r0 to r1 - 1."""
    taps, height = weight.shape[1], above.shape[0]
    for r in range(r0, r1):
        line, i = sums[r - r0, lead + j0 : lead + j1], first[r]
        a, b = uint16(weight[r, 0]), uint16(weight[r, 1])
        upper = tile[i, j0:j1] if i >= 0 else above[height + i, j0:j1]
        lower = tile[i + 1, j0:j1] if i >= -1 else above[height + i + 1, j0:j1]
        if taps == 2:
            for j in range(j1 - j0):
                line[j] = uint16(a * upper[j] + b * lower[j] + uint16(OFFSET))
            continue
        c, third = uint16(weight[r, 2]), tile[i + 2, j0:j1] if i >= -2 else above[height + i + 2, j0:j1]
        for j in range(j1 - j0):
            line[j] = uint16(a * upper[j] + b * lower[j] + c * third[j] + uint16(OFFSET))
        for t in range(3, taps):
            w, more = uint16(weight[r, t]), tile[i + t, j0:j1] if i >= -t else above[height + i + t, j0:j1]
            if w:
                for j in range(j1 - j0):
                    line[j] = uint16(line[j] + w * more[j])


@_compile_loop
def _sum_columns(sums: Any, first: Any, weight: Any, band: Any) -> None:
    """Round the sums of columns to ``band`` uint8[ROWS, ...]: in vectors for 2, 4 or 6 taps, else a pixel at a time."""
    taps, source, step = weight.shape[1], sums.ctypes.data, sums.strides[0]
    target, pitch, weights = band.ctypes.data, band.strides[0], weight.ctypes.data
    if taps == 2:
        for k in range(first.shape[0]):
            _two(source + 6 * first[k], step, target + 3 * k, pitch, weights + 8 * k)
    elif taps == 4:
        for k in range(first.shape[0]):
            _four(source + 6 * first[k], step, target + 3 * k, pitch, weights + 16 * k)
    elif taps == 6:
        for k in range(first.shape[0]):
            _six(source + 6 * first[k], step, target + 3 * k, pitch, weights + 24 * k)
    else:
        for r in range(ROWS):
            for k in range(first.shape[0]):
                for channel in range(3):
                    total = uint32(1 << 15)
                    for t in range(taps):
                        if weight[k, t]:
                            sample = uint16(sums[r, 3 * (first[k] + t) + channel] - uint16(OFFSET))
                            total += uint32(weight[k, t]) * uint32(sample)
                    band[r, 3 * k + channel] = uint8(total >> uint32(16))


@_compile_loop
def _copy_band(band: Any, top: int, left: int, rows: int, columns: int, places: Any) -> None:
    """Copy ``rows`` x ``columns`` px of ``band``, which begin at (``top``, ``left``), to the ``places`` they are of."""
    source, pitch = band.ctypes.data, band.strides[0]
    for n in range(places.shape[0]):
        target, step, y, x = places[n, 0], places[n, 1], places[n, 2], places[n, 3]
        k0, k1 = max(left, x), min(left + columns, x + places[n, 5])
        if k0 < k1:
            for r in range(max(top, y), min(top + rows, y + places[n, 4])):
                start = source + (r - top) * pitch + 3 * (k0 - left)
                _copy_bytes(target + (r - y) * step + 3 * (k0 - x), start, 3 * (k1 - k0))


@_compile_loop
def average_tile(  # noqa: PLR0913 (compiled: plain arrays)
    tile: Any, above: Any, edge: Any, first_y: Any, weight_y: Any, first_x: Any, weight_x: Any, places: Any,
    corner: Any, used: Any, sums: Any, band: Any,
) -> None:  # fmt: skip
    """Average ``tile`` uint8[h, w, 3] and what lies above and left of it, and write the pixels to ``places``.

    Target row r is the sum over t of ``weight_y[r, t]`` / 256 of source rows ``first_y[r] + t``; likewise columns. Two
    taps at least, weights uint32 that sum to 256; where a weight is 0 its pixel must still exist. Rows below 0 are the
    last ones of ``above`` uint8[n, w * 3]. Columns are counted from where ``edge`` begins: uint16[rows, e], the last
    sums of the tile to the left, is used and then replaced by the last sums of this one. The last rows of the tile
    replace those of ``above``. ``places`` int64[n, 6]: see `target_places`; ``corner``: (y, x) of the first target px.
    ``used``: the first column of the tile that is needed, and one past the last.
    ``sums`` uint16[ROWS, e + w * 3 + PAD] and ``band`` uint8[ROWS, columns * 3 + PAD] are scratch.
    """
    rows, columns, lead, size = first_y.shape[0], first_x.shape[0], edge.shape[1], 3 * tile.shape[1]
    flat = tile.reshape((tile.shape[0], size))
    for r0 in range(0, rows, ROWS):
        count = min(ROWS, rows - r0)
        for r in range(count):
            for j in range(lead):
                sums[r, j] = edge[r0 + r, j]
        _sum_rows(flat, above, first_y, weight_y, r0, r0 + count, sums, lead, 3 * used[0], 3 * used[1])
        for r in range(count):
            for j in range(lead):
                edge[r0 + r, j] = sums[r, size + j]
        if columns:
            _sum_columns(sums, first_x, weight_x, band)
            _copy_band(band, corner[0] + r0, corner[1], count, columns, places)
    kept = above.shape[0]
    for r in range(kept):
        for j in range(size):
            above[r, j] = flat[flat.shape[0] - kept + r, j]


def target_places(xy: I64, out: Sequence[U8]) -> I64:
    """Return int64[n, 6] of pictures uint8[h, w, 3] whose rows are of whole pixels: address and bytes from row to row;
    where each lies in target px (y, x) and its size (h, w)."""
    places = zip(xy.tolist(), out, strict=True)
    return np.array([(one.ctypes.data, one.strides[0], y, x, *one.shape[:2]) for (x, y), one in places], np.int64)
