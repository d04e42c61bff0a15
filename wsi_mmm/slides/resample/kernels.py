"""Compiled inner loops of resampling (numba): exact integers, no lock, no Python object per pixel.

The horizontal pass is bound by how pixels of three bytes meet vectors of a power of two. Measured on one core, 1.9
source px per target px: one pixel at a time 6 ns per target px; as vectors of four (the fourth lane falls into the next
pixel, which is written after), a column for several rows, 1.5 ns. Numba has no vectors, so this one step is written in
LLVM's own terms, which hold on every processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types, uint8, uint16, uint32
from numba.extending import intrinsic

ROWS = 8  # target rows made together: their sums stay in the first cache
PAD = 32  # samples behind a row of sums that vectors may read


def _compiled(function: Callable[..., None]) -> Any:
    """Compile on first use, once per machine; where no folder for compiled code can be written, once per process."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


def _average_pixel(taps: int) -> Any:
    """Make the operation that writes 4 bytes at ``target``: sums of ``taps`` pixels at ``source``, weights uint32."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        short, wide, byte = (ir.VectorType(ir.IntType(bits), 4) for bits in (16, 32, 8))
        source, target, weights = (builder.inttoptr(a, ir.IntType(8).as_pointer()) for a in arguments)

        def load(place: Any, offset: int, kind: Any, align: int) -> Any:
            at = builder.gep(place, [ir.Constant(ir.IntType(64), offset)])
            return builder.load(builder.bitcast(at, kind.as_pointer()), align=align)

        total = ir.Constant(wide, [1 << 15] * 4)
        for n in range(taps):
            weight = load(weights, 4 * n, ir.IntType(32), 4)
            lane = builder.insert_element(ir.Constant(wide, ir.Undefined), weight, ir.Constant(ir.IntType(32), 0))
            every = builder.shuffle_vector(lane, lane, ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4))
            samples = builder.zext(load(source, 6 * n, short, 2), wide)
            total = builder.add(total, builder.mul(samples, every))
        rounded = builder.trunc(builder.lshr(total, ir.Constant(wide, [16] * 4)), byte)
        builder.store(rounded, builder.bitcast(target, byte.as_pointer()), align=1)
        return context.get_dummy_value()

    signature = types.void(types.uintp, types.uintp, types.uintp)
    return intrinsic(lambda typing, source, target, weights: (signature, lower))


_two, _three, _four, _five, _six = (_average_pixel(taps) for taps in (2, 3, 4, 5, 6))


@_compiled
def _down(source: Any, first: Any, weight: Any, r0: int, r1: int, sums: Any) -> None:
    """Sums of source rows, uint16 in 1/256 grey levels: ``sums[r - r0]`` for target rows r0..r1-1, tile after tile."""
    tiles, size, taps = source.shape[0], source.shape[2], weight.shape[1]
    for tile in range(tiles):
        for r in range(r0, r1):
            line, i = sums[r - r0, tile * size : (tile + 1) * size], first[r]
            a, b = uint16(weight[r, 0]), uint16(weight[r, 1])
            upper, lower = source[tile, i], source[tile, i + 1]
            if taps == 2:
                for j in range(size):
                    line[j] = uint16(a * upper[j] + b * lower[j])
                continue
            c, third = uint16(weight[r, 2]), source[tile, i + 2]
            for j in range(size):
                line[j] = uint16(a * upper[j] + b * lower[j] + c * third[j])
            for t in range(3, taps):
                w, more = uint16(weight[r, t]), source[tile, i + t]
                if w:
                    for j in range(size):
                        line[j] = uint16(line[j] + w * more[j])


@_compiled
def _across(sums: Any, first: Any, weight: Any, k0: int, r0: int, rows: int, target: Any) -> None:
    """Round the sums of columns k0 and on; any number of taps, one pixel at a time."""
    taps = weight.shape[1]
    for r in range(rows):
        line, out = sums[r], target[r0 + r]
        for k in range(k0, first.shape[0]):
            for channel in range(3):
                at, total = 3 * first[k] + channel, uint32(1 << 15)
                for t in range(taps):
                    if weight[k, t]:
                        total += uint32(weight[k, t]) * uint32(line[at + 3 * t])
                out[3 * k + channel] = uint8(total >> uint32(16))


@_compiled
def _across_vectors(sums: Any, first: Any, weight: Any, r0: int, rows: int, target: Any) -> None:
    """The same for 2 to 6 taps, in vectors. The last column is left out: its fourth byte lies outside."""
    taps, line, step = weight.shape[1], sums.ctypes.data, sums.strides[0]
    out, pitch = target.ctypes.data + r0 * target.strides[0], target.strides[0]
    for k in range(first.shape[0] - 1):
        source, place, weights = line + 6 * first[k], out + 3 * k, weight.ctypes.data + 4 * taps * k
        for r in range(rows):
            if taps == 2:
                _two(source + r * step, place + r * pitch, weights)
            elif taps == 3:
                _three(source + r * step, place + r * pitch, weights)
            elif taps == 4:
                _four(source + r * step, place + r * pitch, weights)
            elif taps == 5:
                _five(source + r * step, place + r * pitch, weights)
            else:
                _six(source + r * step, place + r * pitch, weights)


@_compiled
def average(source: Any, first_y: Any, weight_y: Any, first_x: Any, weight_x: Any, target: Any, sums: Any) -> None:
    """Write ``target`` uint8[rows, columns * 3] from ``source`` uint8[tiles, h, w * 3]: pictures side by side.

    The target's rows may have a pitch of their own. Target row r is the sum over t of ``weight_y[r, t]`` / 256 of
    source rows ``first_y[r] + t``, likewise columns; two taps at least, weights uint32 that sum to 256. Where a weight
    is 0 its row must still exist. ``sums`` uint16[ROWS, tiles * w * 3 + PAD] is scratch.
    """
    rows, columns = first_y.shape[0], first_x.shape[0]
    for r0 in range(0, rows, ROWS):
        count = min(ROWS, rows - r0)
        _down(source, first_y, weight_y, r0, r0 + count, sums)
        if 2 <= weight_x.shape[1] <= 6:
            _across_vectors(sums, first_x, weight_x, r0, count, target)
            _across(sums, first_x, weight_x, columns - 1, r0, count, target)
        else:
            _across(sums, first_x, weight_x, 0, r0, count, target)
