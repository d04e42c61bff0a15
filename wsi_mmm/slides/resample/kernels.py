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
OFFSET = 1 << 15  # sums are kept less this, as signed numbers of 16 bits
PAD = 32  # samples behind a row of sums that vectors may read


def _compile_loop(function: Callable[..., None]) -> Any:
    """Compile on first use, once per machine; where no folder for compiled code can be written, once per process."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


def _average_pixels(taps: int, rows: int) -> Any:
    """Make the operation that writes one column: 4 bytes in each of ``rows`` rows, ``pitch`` bytes apart at ``target``.

    ``source``: the first of ``taps`` (2, 4 or 6) pixels, ``step`` bytes from row to row; ``weights`` uint32[taps].
    Products are summed in pairs: one instruction on x86.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, short, byte = ir.IntType(32), ir.IntType(16), ir.IntType(8)
        source, step, target, pitch, weights = arguments

        def load(address: Any, offset: int, kind: Any, align: int) -> Any:
            place = builder.add(address, ir.Constant(ir.IntType(64), offset))
            return builder.load(builder.inttoptr(place, kind.as_pointer()), align=align)

        def shuffled(vector: Any, at: list[int]) -> Any:
            return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(number, len(at)), at))

        pairs = []
        for n in range(0, taps, 2):
            pair = builder.trunc(load(weights, 4 * n, ir.VectorType(number, 2), 4), ir.VectorType(short, 2))
            pairs.append(builder.sext(shuffled(pair, [0, 1] * 4), ir.VectorType(number, 8)))
        for _ in range(rows):
            total = ir.Constant(ir.VectorType(number, 4), [(1 << 15) + 256 * OFFSET] * 4)
            for n, pair in enumerate(pairs):
                sums = load(source, 12 * n, ir.VectorType(short, 8), 2)
                sums = builder.xor(sums, ir.Constant(sums.type, [-OFFSET] * 8))
                samples = shuffled(sums, [0, 3, 1, 4, 2, 5, 6, 7])
                products = builder.mul(builder.sext(samples, ir.VectorType(number, 8)), pair)
                both = builder.add(shuffled(products, [0, 2, 4, 6]), shuffled(products, [1, 3, 5, 7]))
                total = builder.add(total, both)
            kind = ir.VectorType(byte, 4)
            rounded = builder.trunc(builder.lshr(total, ir.Constant(total.type, [16] * 4)), kind)
            builder.store(rounded, builder.inttoptr(target, kind.as_pointer()), align=1)
            source, target = builder.add(source, step), builder.add(target, pitch)
        return context.get_dummy_value()

    signature = types.void(*[types.intp] * 5)
    return intrinsic(lambda typing, source, step, target, pitch, weights: (signature, lower))


_two_in_rows, _four_in_rows, _six_in_rows = (_average_pixels(taps, ROWS) for taps in (2, 4, 6))
_two, _four, _six = (_average_pixels(taps, 1) for taps in (2, 4, 6))


@_compile_loop
def _sum_rows(  # noqa: PLR0913 (compiled: plain arrays)
    tile: Any, above: Any, first: Any, weight: Any, r0: int, r1: int, sums: Any, lead: int
) -> None:
    """Sums of source rows, uint16 in 1/256 grey levels: ``sums[r - r0]`` for target rows r0..r1-1."""
    size, taps, height = tile.shape[1], weight.shape[1], above.shape[0]
    for r in range(r0, r1):
        line, i = sums[r - r0, lead : lead + size], first[r]
        a, b = uint16(weight[r, 0]), uint16(weight[r, 1])
        upper = tile[i] if i >= 0 else above[height + i]
        lower = tile[i + 1] if i >= -1 else above[height + i + 1]
        if taps == 2:
            for j in range(size):
                line[j] = uint16(a * upper[j] + b * lower[j])
            continue
        c, third = uint16(weight[r, 2]), tile[i + 2] if i >= -2 else above[height + i + 2]
        for j in range(size):
            line[j] = uint16(a * upper[j] + b * lower[j] + c * third[j])
        for t in range(3, taps):
            w, more = uint16(weight[r, t]), tile[i + t] if i >= -t else above[height + i + t]
            if w:
                for j in range(size):
                    line[j] = uint16(line[j] + w * more[j])


@_compile_loop
def _sum_columns(sums: Any, first: Any, weight: Any, k0: int, r0: int, rows: int, target: Any) -> None:
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


@_compile_loop
def _sum_columns_by_vectors(sums: Any, first: Any, weight: Any, r0: int, rows: int, target: Any) -> None:
    """The same for 2, 4 or 6 taps, in vectors. The last column is left out: its fourth byte lies outside."""
    taps, line, step = weight.shape[1], sums.ctypes.data, sums.strides[0]
    out, pitch = target.ctypes.data + r0 * target.strides[0], target.strides[0]
    for k in range(first.shape[0] - 1):
        source, place, weights = line + 6 * first[k], out + 3 * k, weight.ctypes.data + 4 * taps * k
        if rows == ROWS:
            if taps == 2:
                _two_in_rows(source, step, place, pitch, weights)
            elif taps == 4:
                _four_in_rows(source, step, place, pitch, weights)
            else:
                _six_in_rows(source, step, place, pitch, weights)
            continue
        for r in range(rows):
            if taps == 2:
                _two(source + r * step, step, place + r * pitch, pitch, weights)
            elif taps == 4:
                _four(source + r * step, step, place + r * pitch, pitch, weights)
            else:
                _six(source + r * step, step, place + r * pitch, pitch, weights)


@_compile_loop
def average_tile(  # noqa: PLR0913 (compiled: plain arrays)
    tile: Any, above: Any, edge: Any, first_y: Any, weight_y: Any, first_x: Any, weight_x: Any, target: Any, sums: Any
) -> None:
    """Write ``target`` uint8[rows, columns * 3] from ``tile`` uint8[h, w * 3] and what lies above and left of it.

    Target row r is the sum over t of ``weight_y[r, t]`` / 256 of source rows ``first_y[r] + t``; likewise columns. Two
    taps at least, weights uint32 that sum to 256; where a weight is 0 its pixel must still exist. Rows below 0 are the
    last ones of ``above`` uint8[n, w * 3]. Columns are counted from where ``edge`` begins: uint16[rows, e], the last
    sums of the tile to the left, is used and then replaced by the last sums of this one. The last rows of the tile
    replace those of ``above``. The target's rows may have a pitch of their own.
    ``sums`` uint16[ROWS, e + w * 3 + PAD] is scratch.
    """
    rows, columns, lead, size = first_y.shape[0], first_x.shape[0], edge.shape[1], tile.shape[1]
    for r0 in range(0, rows, ROWS):
        count = min(ROWS, rows - r0)
        for r in range(count):
            for j in range(lead):
                sums[r, j] = edge[r0 + r, j]
        _sum_rows(tile, above, first_y, weight_y, r0, r0 + count, sums, lead)
        for r in range(count):
            for j in range(lead):
                edge[r0 + r, j] = sums[r, size + j]
        if columns and (weight_x.shape[1] == 2 or weight_x.shape[1] == 4 or weight_x.shape[1] == 6):
            _sum_columns_by_vectors(sums, first_x, weight_x, r0, count, target)
            _sum_columns(sums, first_x, weight_x, columns - 1, r0, count, target)
        else:
            _sum_columns(sums, first_x, weight_x, 0, r0, count, target)
    kept = above.shape[0]
    for r in range(kept):
        for j in range(size):
            above[r, j] = tile[tile.shape[0] - kept + r, j]
