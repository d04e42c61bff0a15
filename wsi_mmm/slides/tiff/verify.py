"""Compare levels of a TIFF with the next finer one: a page of the slide's aspect may be any other picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from wsi_mmm.slides.tiff.codecs import UndecodableError, decoder, most_bytes
from wsi_mmm.slides.tiff.directories import table
from wsi_mmm.slides.tiff.planes import Plane
from wsi_mmm.storage.store import ByteStore
from wsi_mmm.types import U8

_TILES, _WINDOWS = 12, 6  # coarse tiles decoded, and windows compared: those with most detail
_SIDE = 32  # px of a window at the coarse level
_MOST_FINE = 1024  # px per side read at the finer level for one window
_CELLS = 8  # both are averaged to so many cells per side
_ALIKE, _CLOSE, _CORRELATED = 4.0, 20.0, 0.9  # mean grey levels apart: alike as such; close, if the patterns agree
_SHARE = 0.75  # of the windows must agree

ReadTile = Callable[[int], U8 | None]


def confirmed_planes(store: ByteStore, planes: Sequence[Plane], doubtful: frozenset[int]) -> tuple[Plane, ...]:
    """Return the planes that show the slide, each smaller than the one before; planes[0] is the slide itself."""
    kept = [planes[0]]
    for position, plane in enumerate(planes[1:], start=1):
        finer = next((p for p in reversed(kept) if p.width > plane.width and p.height > plane.height), None)
        if finer is None or finer is not kept[-1]:
            continue  # of two levels of one size the first is kept
        if position not in doubtful or _same_picture(store, finer, plane):
            kept.append(plane)
    return tuple(kept)


def _same_picture(store: ByteStore, fine: Plane, coarse: Plane) -> bool:
    """Tell whether averaged windows of both agree; what cannot be compared does not."""
    ratio = max(fine.width / coarse.width, fine.height / coarse.height)
    side = min(_SIDE, int(_MOST_FINE / ratio), coarse.tile_width, coarse.tile_height)
    if side < 4:
        return False
    read_fine, read_coarse = _tile_reader(store, fine), _tile_reader(store, coarse)
    if read_fine is None or read_coarse is None:
        return False
    answers = []
    for x, y, window in _detailed_windows(coarse, read_coarse, side):
        region = _fine_cells(fine, read_fine, (x, y, side), (fine.width / coarse.width, fine.height / coarse.height))
        if region is not None:
            answers.append(_agree(region, _cells(window, (0.0, 0.0, side, side))))
    return bool(answers) and sum(answers) >= _SHARE * len(answers)


def _tile_reader(store: ByteStore, plane: Plane) -> ReadTile | None:
    tags = (324, 325) if plane.tiled else (273, 279)
    if any(tag not in plane.directory.entries for tag in tags):
        return None
    offsets, counts = table(store, [plane.directory] * 2, tags)
    decode, most = decoder(plane), most_bytes(plane)

    def read(number: int) -> U8 | None:
        if not number < min(len(offsets), len(counts)) or not 0 < counts[number] <= most:
            return None
        (data,) = store.get_ranges([(int(offsets[number]), int(counts[number]))])
        rows = plane.tile_height
        if not plane.tiled:
            rows = min(rows, plane.height - number * plane.tile_height)
        try:
            return decode(data, 1, rows)
        except UndecodableError:
            return None

    return read


def _detailed_windows(plane: Plane, read: ReadTile, side: int) -> list[tuple[int, int, U8]]:
    """(x, y, pixels) of the windows with most detail in tiles spread over the plane."""
    total = plane.columns * plane.rows
    found = []
    for number in sorted({int(n) for n in np.linspace(0, total - 1, min(total, _TILES))}):
        tile = read(number)
        if tile is None:
            continue
        row, column = divmod(number, plane.columns)
        left, top = column * plane.tile_width, row * plane.tile_height
        width, height = min(plane.tile_width, plane.width - left), min(plane.tile_height, plane.height - top)
        for y in range(0, height - side + 1, side):
            for x in range(0, width - side + 1, side):
                window = tile[y : y + side, x : x + side]
                found.append((float(window.std()), left + x, top + y, window))
    found.sort(key=lambda one: -one[0])
    return [(x, y, window) for _, x, y, window in found[:_WINDOWS]]


def _fine_cells(
    plane: Plane, read: ReadTile, window: tuple[int, int, int], ratio: tuple[float, float]
) -> np.ndarray | None:
    """The finer level under a window of the coarse one, averaged to cells; None where a tile is missing."""
    x, y, side = window
    left, top, right, bottom = x * ratio[0], y * ratio[1], (x + side) * ratio[0], (y + side) * ratio[1]
    first_column, first_row = int(left) // plane.tile_width, int(top) // plane.tile_height
    last_column = min(int(np.ceil(right)) - 1, plane.width - 1) // plane.tile_width
    last_row = min(int(np.ceil(bottom)) - 1, plane.height - 1) // plane.tile_height
    rows = []
    for row in range(first_row, last_row + 1):
        tiles = [read(row * plane.columns + column) for column in range(first_column, last_column + 1)]
        if any(tile is None for tile in tiles):
            return None
        rows.append(np.concatenate([tile for tile in tiles if tile is not None], axis=1))
    canvas = np.concatenate(rows, axis=0)
    x0, y0 = first_column * plane.tile_width, first_row * plane.tile_height
    box = (left - x0, top - y0, min(right - x0, canvas.shape[1]), min(bottom - y0, canvas.shape[0]))
    return _cells(canvas, box)


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
