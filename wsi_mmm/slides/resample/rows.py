"""Averaging native tiles where they were decoded: no canvas between the codec and the target pixels.

A row of native tiles at a time is decoded into one stack; the vertical sums are taken from each tile while it is near
the processor. For rectangles that lie wholly within the source; others go by way of `scaled.read_scaled`, and the
pixels are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.slides.resample.scaled import WHITE
from wsi_mmm.slides.resample.tile_cache import TileCache
from wsi_mmm.slides.resample.tiled import Key, Tile, Tiling, Want, size_of
from wsi_mmm.slides.resample.weights import Taps, Weights
from wsi_mmm.types import U8

Decode = Callable[[Sequence[int], Sequence[U8 | None]], Iterator[tuple[int, Tile]]]  # numbers, where to -> tiles


@dataclass(frozen=True, slots=True)
class Stack:
    """What a rectangle is made from: the native tiles of ``tiling`` that ``want`` names, by ``decode`` or ``cache``."""

    tiling: Tiling
    want: Want
    cache: TileCache[Key, Tile]
    decode: Decode


class _Side:
    """Native tiles along an axis: those that are used, and those that no neighbouring rectangle needs (``own``)."""

    def __init__(self, axis: Taps, side: int, limit: float) -> None:
        begin, self.end = axis.first, axis.stop
        self.first, self.stop = begin // side, -(-self.end // side)
        self.own = range(-(-begin // side), int(min(self.end, limit)) // side)


def fits(ty: Taps, tiling: Tiling) -> bool:
    """Tell whether `average_rows` can make this rectangle, which lies wholly within the source."""
    return ty.stop - ty.first >= tiling.height  # and so every weight has its row


def average_rows(out: U8, ty: Taps, tx: Taps, stack: Stack) -> list[int]:
    """Write ``out`` uint8[rows, columns, 3]; return the numbers of native tiles that could not be decoded (white)."""
    tiling, weights = stack.tiling, Weights(ty, tx)
    columns = _Side(tx, tiling.width, stack.want.limit[0])
    rows = _Side(ty, tiling.height, stack.want.limit[1])
    left = columns.first
    spare = weights.taps_y  # rows above a tile that the row of tiles before it left over
    pixels = np.empty((columns.stop - left, spare + tiling.height, tiling.width, 3), np.uint8)
    failed: list[int] = []
    held, done = 0, 0
    for row in range(rows.first, rows.stop):
        failed += _decode_row(stack, row, left, pixels[:, spare:], columns.own if row in rows.own else range(0))
        top, bottom = row * tiling.height, min((row + 1) * tiling.height, rows.end)
        stop = weights.complete(bottom)
        weights.average_tiles(pixels, top - spare, left * tiling.width, (done, stop), out)
        done = stop
        if bottom < rows.end:
            held = bottom - weights.first_row(done, bottom)
            end = spare + tiling.height
            pixels[:, spare - held : spare] = pixels[:, end - held : end]
    return failed


def _decode_row(stack: Stack, row: int, left: int, pixels: U8, own_columns: range) -> list[int]:
    """Fill ``pixels`` uint8[tiles, height, width, 3] with a row of native tiles; return those that failed."""
    tiling, want = stack.tiling, stack.want
    own: list[int] = []
    shared: list[int] = []
    for column in range(left, left + len(pixels)):
        number = row * tiling.columns + column
        if want.only is None or number in want.only:
            (own if column in own_columns else shared).append(number)
    first = row * tiling.columns + left
    failed: list[int] = []

    def put(number: int, tile: Tile) -> None:
        target = pixels[number - first]
        if isinstance(tile, np.ndarray):
            target[: len(tile), : tile.shape[1]] = tile
        else:
            target[...] = WHITE
        if isinstance(tile, str):
            failed.append(number)

    targets = [pixels[number - first] for number in own]
    for target, (number, tile) in zip(targets, stack.decode(own, targets), strict=True):
        if tile is not target:
            put(number, tile)
    if shared:
        _visit(stack, shared, put)
    return failed


def _visit(stack: Stack, numbers: Sequence[int], put: Callable[[int, Tile], None]) -> None:
    """Put tiles that neighbouring rectangles need too, decoding those that none of them has."""
    source = stack.tiling.source

    def load(keys: Sequence[Key]) -> Iterator[tuple[Key, Tile, int]]:
        for number, tile in stack.decode([key[2] for key in keys], [None] * len(keys)):
            yield (source.level, source.shrink, number), tile, size_of(tile)

    keys = [(source.level, source.shrink, number) for number in numbers]
    stack.cache.visit(keys, load, lambda key, tile: put(key[2], tile), lambda _: False)
