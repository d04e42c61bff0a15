"""Compare levels of a TIFF with the next finer one: a page of the slide's aspect may be any other picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from PIL import Image

from wsi_mmm.slides.tiff.codecs import decoder
from wsi_mmm.slides.tiff.planes import Plane
from wsi_mmm.slides.tiff.samples import UndecodableError
from wsi_mmm.slides.tiff.tables import tile_fetcher
from wsi_mmm.storage.store import ByteStore
from wsi_mmm.types import U8

_TILES, _WINDOWS = 12, 6  # coarse tiles decoded, and windows compared: those with most detail
_SIDE = 32  # px of a window at the coarse level
_MOST_FINE = 1024  # px per side read at the finer level for one window
_CELLS = 8  # both are averaged to so many cells per side
_ALIKE, _CLOSE, _CORRELATED = 4.0, 20.0, 0.9  # mean grey levels apart: alike as such; close, if the patterns agree
_SHARE = 0.75  # of the windows must agree
_COMPARED = 16  # levels of a file that are compared; of more the rest is not trusted
_MOST_TILES = 4096  # finer tiles under a window
_LARGEST_TILE = 1 << 22  # px of a native tile or strip; what is stored in larger ones is not compared, nor trusted

ReadTiles = Callable[[Sequence[int]], dict[int, U8]]


def confirmed_planes(store: ByteStore, planes: Sequence[Plane], doubtful: frozenset[int]) -> tuple[Plane, ...]:
    """Return the planes that show the slide, each smaller than the one before; planes[0] is the slide itself."""
    kept = [planes[0]]
    compared = 0
    for position, plane in enumerate(planes[1:], start=1):
        finer = next((p for p in reversed(kept) if p.width > plane.width and p.height > plane.height), None)
        if finer is None or finer is not kept[-1]:
            continue  # of two levels of one size the first is kept
        if position in doubtful:
            compared += 1
            if compared > _COMPARED or not _same_picture(store, finer, plane):
                continue
        kept.append(plane)
    return tuple(kept)


def _same_picture(store: ByteStore, fine: Plane, coarse: Plane) -> bool:
    """Tell whether averaged windows agree; where none can be compared, whether it calls itself a reduced image."""
    ratio = fine.width / coarse.width, fine.height / coarse.height
    side = min(_SIDE, int(_MOST_FINE / max(ratio)), coarse.tile_width, coarse.tile_height)
    under = (side * ratio[0] / fine.tile_width + 2) * (side * ratio[1] / fine.tile_height + 2)
    if (
        side < 4
        or under > _MOST_TILES
        or max(plane.tile_width * plane.tile_height for plane in (fine, coarse)) > _LARGEST_TILE
    ):
        return False
    read_fine, read_coarse = _tile_reader(store, fine), _tile_reader(store, coarse)
    if read_fine is None or read_coarse is None:
        return False
    windows = _detailed_windows(coarse, read_coarse, side)
    boxes = [(x * ratio[0], y * ratio[1], (x + side) * ratio[0], (y + side) * ratio[1]) for x, y, _ in windows]
    tiles = read_fine(sorted({number for box in boxes for row in _numbers_under(fine, box) for number in row}))
    answers = []
    for (_, _, window), box in zip(windows, boxes, strict=True):
        numbers = _numbers_under(fine, box)
        if all(number in tiles for row in numbers for number in row):
            canvas = np.concatenate([np.concatenate([tiles[n] for n in row], axis=1) for row in numbers], axis=0)
            row, column = divmod(numbers[0][0], fine.columns)
            left, top = column * fine.tile_width, row * fine.tile_height
            right, bottom = min(box[2] - left, canvas.shape[1]), min(box[3] - top, canvas.shape[0])
            answers.append(
                _agree(_cells(canvas, (box[0] - left, box[1] - top, right, bottom)), _cells(window, (0, 0, side, side)))
            )
    return sum(answers) >= _SHARE * len(answers) if answers else bool(coarse.directory.number(254, 0) & 1)


def _tile_reader(store: ByteStore, plane: Plane) -> ReadTiles | None:
    """A function from numbers of native tiles to their pixels, without those left out or damaged."""
    fetch = tile_fetcher(store, plane)
    if fetch is None:
        return None
    decode = decoder(plane)

    def read(numbers: Sequence[int]) -> dict[int, U8]:
        found = {}
        for number, raw in fetch([n for n in numbers if n < plane.columns * plane.rows]).items():
            with suppress(UndecodableError):
                found[number] = decode(raw, 1, plane.stored_rows(number))
        return found

    return read


def _detailed_windows(plane: Plane, read: ReadTiles, side: int) -> list[tuple[int, int, U8]]:
    """(x, y, pixels) of the windows with most detail in tiles spread over the plane."""
    total = plane.columns * plane.rows
    found = []
    for number, tile in read(sorted({int(n) for n in np.linspace(0, total - 1, min(total, _TILES))})).items():
        row, column = divmod(number, plane.columns)
        left, top = column * plane.tile_width, row * plane.tile_height
        width, height = min(plane.tile_width, plane.width - left), min(plane.tile_height, plane.height - top)
        # A few hundred windows a tile at most, however large it is.
        for y in range(0, height - side + 1, max(side, height // 16)):
            for x in range(0, width - side + 1, max(side, width // 16)):
                window = tile[y : y + side, x : x + side]
                found.append((float(window.std()), left + x, top + y, window))
    found.sort(key=lambda one: -one[0])
    return [(x, y, window) for _, x, y, window in found[:_WINDOWS]]


def _numbers_under(plane: Plane, box: tuple[float, float, float, float]) -> list[list[int]]:
    """Numbers of the native tiles under a box, row by row."""
    right, bottom = min(math.ceil(box[2]), plane.width) - 1, min(math.ceil(box[3]), plane.height) - 1
    columns = range(int(box[0]) // plane.tile_width, right // plane.tile_width + 1)
    rows = range(int(box[1]) // plane.tile_height, bottom // plane.tile_height + 1)
    return [[row * plane.columns + column for column in columns] for row in rows]


def _cells(pixels: U8, box: tuple[float, float, float, float]) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((_CELLS, _CELLS), Image.Resampling.BOX, box=box), np.float64)


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    apart = float(np.abs(a - b).mean())
    if apart <= _ALIKE:
        return True
    x, y = a - a.mean(axis=(0, 1)), b - b.mean(axis=(0, 1))
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return apart <= _CLOSE and spread > 0 and float((x * y).sum()) / spread >= _CORRELATED
