"""Which pictures of a service's slide are asked for, and the cells of them that are kept in memory.

On a fixed grid (`GridCuts`) a pixel does not depend on the block it is read in, also where pictures are JPEGs: where a
lossy picture begins changes its pixels. Lossless ones may be cut to what tiles need (`RectangleCuts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from wsi_mmm.slides.resample.tiled import Tiling
from wsi_mmm.types import Level

_SIDE = 1024  # px of a picture on the grid: at the edge of tissue larger ones bring more that nobody asked for
_WHOLE = 4 << 20  # px of a level that is fetched as one picture
_CELL = 256  # px of a cell of a rectangle
_LARGEST = 4 << 20  # px of a rectangle: a block of tiles is a few of them, which are under way side by side
_MIDDLE = 256  # px of the picture by which a large level is known


class Cuts(Protocol):
    """``by_tile``: cells that are native tiles are asked for as such; ``held``: pictures held compressed at a time."""

    @property
    def by_tile(self) -> bool: ...

    @property
    def held(self) -> int: ...

    def sides(self, level: Level) -> tuple[int, int]:
        """Return width and height of the cells of a level, px."""

    def pictures(self, numbers: Sequence[int], tiling: Tiling) -> list[list[int]]:
        """Return the cells ``numbers`` by the picture that brings them: a full rectangle of cells each, row-major."""

    def mark_side(self, level: Level) -> int:
        """Return the px of the picture that goes into the fingerprint, of the coarsest level."""


@dataclass(frozen=True, slots=True)
class GridCuts:
    """Cells about 1024 px square in whole native tiles, of which each is decoded once at the other end; each cell is a
    picture, and so is a level of no more than 4 megapixels."""

    by_tile: bool = True
    held: int = 16

    def sides(self, level: Level) -> tuple[int, int]:
        """Return width and height of the pictures that a level is fetched in, at most 25 megapixels."""
        if level.width * level.height <= _WHOLE:
            return level.width, level.height
        return _side(level.tile_width, _SIDE), _side(level.tile_height, _SIDE)

    def pictures(self, numbers: Sequence[int], tiling: Tiling) -> list[list[int]]:
        """Return every cell alone."""
        return [[number] for number in numbers]

    def mark_side(self, level: Level) -> int:
        """Return a side of the grid."""
        return _SIDE


@dataclass(frozen=True, slots=True)
class RectangleCuts:
    """Cells of about 256 px in whole native tiles; what is missing of a block comes in rectangles of up to 4 megapixels
    that hold nothing else. A level of no more than 4 megapixels is one picture."""

    by_tile: bool = False
    held: int = 8

    def sides(self, level: Level) -> tuple[int, int]:
        """Return width and height of the cells of a level, px."""
        if level.width * level.height <= _WHOLE:
            return level.width, level.height
        return _side(level.tile_width, _CELL), _side(level.tile_height, _CELL)

    def pictures(self, numbers: Sequence[int], tiling: Tiling) -> list[list[int]]:
        """Return the cells by rectangles."""
        return rectangles(numbers, tiling, _LARGEST)

    def mark_side(self, level: Level) -> int:
        """Little of a level that is large: it is asked for once more when it is read."""
        return _SIDE if level.width * level.height <= _WHOLE else _MIDDLE


def _side(native: int, wanted: int) -> int:
    """Whole native tiles where they are of a common size; strips and odd sizes are left to the service."""
    return native * max(1, wanted // native) if 16 <= native <= 4 * wanted else wanted


def rectangles(numbers: Sequence[int], tiling: Tiling, most: int) -> list[list[int]]:
    """Cut cells of ``tiling`` into rectangles of at most ``most`` px (one cell at least), each row-major."""
    found: list[list[int]] = []
    growing: dict[tuple[int, int], list[int]] = {}  # by first and last column
    row_before = -1
    for row, runs in _runs(sorted(numbers), tiling, most).items():
        if row != row_before + 1:
            growing.clear()
        grown: dict[tuple[int, int], list[int]] = {}
        for first, last in runs:
            cells = [row * tiling.columns + column for column in range(first, last + 1)]
            above = growing.get((first, last))
            if above is not None and (len(above) + len(cells)) * tiling.width * tiling.height <= most:
                above += cells
                grown[first, last] = above
            else:
                grown[first, last] = cells
                found.append(cells)
        growing, row_before = grown, row
    return found


def _runs(numbers: Sequence[int], tiling: Tiling, most: int) -> dict[int, list[tuple[int, int]]]:
    """By row, the first and last column of cells side by side, none longer than ``most`` px allow."""
    longest = max(1, most // (tiling.width * tiling.height))
    found: dict[int, list[tuple[int, int]]] = {}
    for number in numbers:
        row, column = divmod(number, tiling.columns)
        runs = found.setdefault(row, [])
        if runs and runs[-1][1] == column - 1 and column - runs[-1][0] < longest:
            runs[-1] = runs[-1][0], column
        else:
            runs.append((column, column))
    return found
