"""Tiles at listed places: any level-0 corners, in a given sequence, read and kept block by block like those of a grid.

A place int64 (x, y, origin_x, origin_y) is a corner in target px counted from a level-0 origin: the corner is
``origin + x * scale``. Corners on the grid of target px have origin 0, and so have those of other tools where tiles
are laid out in whole target px; the others share as few origins as the ratio of sizes allows.

For the engine such tiles lie in a made-up `Grid` (``listed`` says so) with as many columns as a block has, sorted by
where they are, so that the tiles of a block are neighbours. Results come in the sequence of the list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from wsi_mmm.errors import InputError
from wsi_mmm.slides.base import Fetched, Reader, require_mpp
from wsi_mmm.slides.resample.cut import cut_tiles
from wsi_mmm.tiles.grid import MIN_SCALE, any_overlap, level0_boxes
from wsi_mmm.tiles.stream import READ_AHEAD, map_ahead, read_into
from wsi_mmm.tiles.tile_file import TileList
from wsi_mmm.types import I64, U8, Batch, Grid, Mask, SlideInfo, Tiles

CELL = 8  # sides of tiles: what is read together lies in a square of so many

SAME_MPP = 0.01  # relative: slides whose px differ by more are not the same
CLOSE_MPP = 1.1  # ratio: by this much a nominal magnification may differ from the resolution that it stands for
_NOMINAL = (0.55, 1.25)  # mpp of a slide by the mpp of its nominal magnification: tools call 0.3 to 0.6 mpp 20x

_COARSEST = 4096  # level-0 px per px of a tile


@dataclass(frozen=True, slots=True)
class PlacedTiles:
    """A list laid out on a slide: ``index`` int64[n, 2] (row, column) in the made-up ``grid``, ``places`` int64[n, 4],
    both in the sequence of the list."""

    grid: Grid
    index: I64
    places: I64


def place_tiles(
    info: SlideInfo, tiles: TileList, block: int, *, size: int | None = None, mpp: float | None = None,
    overlap: int | None = None,
) -> PlacedTiles:  # fmt: skip
    """Lay a list out on the slide that it is of, for blocks of ``block`` x ``block`` tiles.

    ``size``, ``mpp``, ``overlap``: what a user says of the tiles, which must not contradict the file; where it says
    neither size nor resolution they stand in. Raises InputError naming the fix, MppUnknown.
    """
    side, scale = _scale_of(info, tiles, size, mpp)
    _check_slide(info, tiles)
    if None not in (overlap, tiles.overlap) and overlap != tiles.overlap:
        raise InputError(f"the tiles of the file overlap by {tiles.overlap} px, not {overlap}: leave --overlap out")
    width, height = (math.floor(side * one + 0.5) for one in scale)
    _check_corners(info, tiles.corners, width, height)
    places, found = _snap_places(tiles, scale), tiles.mpp
    if places is None or found is None:
        places = _rational_places(tiles.corners, side, width)
        scale = width / side, width / side
        found = scale[0] * require_mpp(info)[0]
    index = _block_index(tiles.corners, (width, height), block)
    shared = tiles.overlap if overlap is None else overlap
    grid = Grid(
        side, shared or 0, block, max(1, -(-len(index) // block)), max(1, math.ceil(info.width / scale[0])),
        max(1, math.ceil(info.height / scale[1])), *scale, found, tiles.digest(),
    )  # fmt: skip
    return PlacedTiles(grid, index, places)


def _scale_of(info: SlideInfo, tiles: TileList, size: int | None, mpp: float | None) -> tuple[int, tuple[float, float]]:
    """The side of a tile in px, and level-0 px per px (x, y)."""
    own = require_mpp(info)
    if size is not None and tiles.size not in (None, size):
        raise InputError(
            f"the file lists tiles of {tiles.size} px, not {size}: use --tile-size {tiles.size}, or leave it out"
        )
    side = tiles.size or size
    exact = tiles.mpp if tiles.mpp is not None and not tiles.off_grid else None
    if side is None or (exact is None and tiles.size_level0 is None and mpp is None):
        raise InputError("the file does not say how wide its tiles are: give --tile-size (px) and --mpp")
    if exact is not None:
        scale = exact / own[0], exact / own[1]
    elif tiles.size_level0 is not None:
        scale = tiles.size_level0 / side, tiles.size_level0 / side
    else:
        assert mpp is not None
        wide = round(side * mpp / own[0])
        scale = wide / side, wide / side
    if not MIN_SCALE <= min(scale) <= max(scale) <= _COARSEST:
        raise InputError(
            f"the file lists tiles of {side} px that are {side * scale[0]:.6g} px of level 0 wide, which is no "
            "resolution of this slide: is it the file of another slide?"
        )
    found = scale[0] * own[0]
    if mpp is not None and not 1 / CLOSE_MPP <= found / mpp <= CLOSE_MPP:
        raise InputError(
            f"the tiles of the file are of {found:.4g} mpp on this slide, not {mpp:g}: leave --mpp out, or correct the "
            "slide's own resolution with --mpp-override"
        )
    return side, scale


def _check_slide(info: SlideInfo, tiles: TileList) -> None:
    """Raise InputError if the file was written for a slide of another size or resolution."""
    if tiles.width is not None and tiles.height is not None:
        off = max(abs(tiles.width - info.width), abs(tiles.height - info.height))
        if off > tiles.slack:
            raise InputError(
                f"the file was written for a slide of {tiles.width:.0f} x {tiles.height:.0f} px, and this has "
                f"{info.width} x {info.height}: give the file of this slide, or choose the image with --scene"
            )
    own = require_mpp(info)
    off, written = False, ""
    if tiles.slide_mpp is not None:
        off = any(abs(a / b - 1) > SAME_MPP for a, b in zip(own, tiles.slide_mpp, strict=True))
        written = f"{tiles.slide_mpp[0]:.4g} mpp"
    elif tiles.magnification is not None and tiles.magnification != info.objective:
        low, high = (share * 10 / tiles.magnification for share in _NOMINAL)
        off, written = not low <= own[0] <= high, f"{tiles.magnification:g}x"
    if off:
        raise InputError(
            f"the file was written for a slide of {written}, and this has {own[0]:.4g} mpp: give the file of this "
            "slide, or correct its resolution with --mpp-override"
        )


def _check_corners(info: SlideInfo, corners: I64, width: int, height: int) -> None:
    size = np.array([info.width, info.height])
    off = ((corners >= size) | (corners + np.array([width, height]) <= 0)).any(axis=1)
    if off.any():
        x, y = corners[int(np.argmax(off))].tolist()
        raise InputError(
            f"{int(off.sum())} of {len(corners)} tiles of the file lie off the slide of {info.width} x {info.height} "
            f"px, the first at ({x}, {y}): give the file of this slide, in px of level 0"
        )


def _snap_places(tiles: TileList, scale: tuple[float, float]) -> I64 | None:
    """Places on the grid of target px whose rounded corners are all those of the list; None for files of others."""
    if tiles.mpp is None or tiles.off_grid:
        return None
    xy = np.round(tiles.corners / np.array(scale)).astype(np.int64)
    if not np.array_equal(_rounded_corners(xy, scale), tiles.corners):
        return None
    return np.concatenate([xy, np.zeros_like(xy)], axis=1)


def _rational_places(corners: I64, side: int, wide: int) -> I64:
    """Exact places of tiles of ``side`` px that are ``wide`` px of level 0: the smallest origins from which corners are
    whole numbers of target px away."""
    common = math.gcd(side, wide)
    origin = corners % (wide // common)
    return np.concatenate([(corners - origin) // (wide // common) * (side // common), origin], axis=1)


def _rounded_corners(xy: I64, scale: tuple[float, float]) -> I64:
    return np.asarray(np.floor(xy * np.array(scale) + 0.5), np.int64)


def corners_of(grid: Grid, places: I64) -> I64:
    """Return level-0 (x, y) int64[n, 2] of ``places`` int64[n, 4]: the corners of the list."""
    return np.asarray(places[:, 2:] + _rounded_corners(places[:, :2], (grid.scale_x, grid.scale_y)), np.int64)


def _block_index(corners: I64, size: tuple[int, int], block: int) -> I64:
    """(row, column) int64[n, 2], unlike for every tile; neighbours lie in one block of ``block`` x ``block``."""
    cell = corners // (np.array(size) * block)
    ranking = np.lexsort((corners[:, 0], corners[:, 1], cell[:, 0], cell[:, 1]))
    rank = np.empty(len(corners), np.int64)
    rank[ranking] = np.arange(len(corners))
    return np.stack([rank // block, rank % block], axis=1)


# ---------------------------------------------------------------- reading


def read_listed(reader: Reader, grid: Grid, places: I64, index: I64, fetched: Fetched | None = None) -> Batch:
    """Return the tiles at ``places`` int64[n, 4], in this sequence. Raises StorageError."""
    pixels = np.empty((len(places), grid.tile, grid.tile, 3), np.uint8)
    failed = np.zeros(len(places), bool)
    for rows, origin, tiles in tile_groups(grid, places):
        out = [pixels[row] for row in rows.tolist()]
        failed[rows] = _read_group(reader, tiles, origin, out, fetched)
    return Batch(pixels, corners_of(grid, places), index, failed)


def tile_groups(grid: Grid, places: I64) -> Iterator[tuple[I64, tuple[int, int], Tiles]]:
    """Yield the tiles of one origin and neighbourhood: their rows in ``places``, the level-0 origin, the tiles."""
    keys = np.concatenate([places[:, 2:], places[:, :2] // (CELL * grid.tile)], axis=1)
    found, which = np.unique(keys, axis=0, return_inverse=True)
    for number, key in enumerate(found.tolist()):
        rows = np.flatnonzero(which.ravel() == number)
        yield rows, (key[0], key[1]), Tiles(places[rows, :2], grid.tile, grid.scale_x, grid.scale_y)


def _read_group(reader: Reader, tiles: Tiles, origin: tuple[int, int], out: list[U8], fetched: Fetched | None) -> Mask:
    if origin == (0, 0):
        return read_into(reader, tiles, out, fetched)
    x, y = origin
    failed = cut_tiles(lambda block: reader.read(replace(block, origin_x=x, origin_y=y)), tiles, out)
    boxes = level0_boxes(tiles) + np.array([x, y, x, y])
    return any_overlap(boxes, failed) if len(failed) else np.zeros(len(out), bool)


def stream_listed(reader: Reader, placed: PlacedTiles, *, batch_size: int, workers: int) -> Iterator[Batch]:
    """Yield batches in the sequence of the list, whose ``index`` is (row of the list, 0); ``workers`` threads read
    ahead (0: read inline)."""
    starts = range(0, len(placed.places), batch_size)

    def read(start: int) -> Batch:
        places = placed.places[start : start + batch_size]
        rows = np.arange(start, start + len(places))
        return read_listed(reader, placed.grid, places, np.stack([rows, np.zeros_like(rows)], axis=1))

    if workers == 0:
        yield from map(read, starts)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="wsi-mmm-read") as pool:
        yield from map_ahead(pool, read, starts, most=workers + READ_AHEAD)
