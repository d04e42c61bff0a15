"""Rules for cutting levels of a service's slide into pictures to fetch, and pictures into cells to keep in memory.

On a fixed grid (`GRID_CUTS`) a pixel does not depend on the block it is read in, also where pictures are JPEGs: where a
lossy picture begins changes its pixels. Lossless ones may be cut to what tiles need (`RECTANGLE_CUTS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wsi_mmm.slides.resample.tiled import Tiling
from wsi_mmm.types import Level

_SIDE = 1024  # px of a picture on the grid: larger ones fetch more than is needed at the edge of tissue
_WHOLE = 4 << 20  # px of a level that is fetched as one picture
_LARGEST = 4 << 20  # px of a rectangle: a block of tiles is a few of them, fetched concurrently
_MIDDLE = 256  # px of the fingerprint's picture of a large level


@dataclass(frozen=True, slots=True)
class PictureCuts:
    """Cells of about ``cell`` px in whole native tiles; a level of no more than 4 megapixels is one cell.

    ``merged``: missing cells are fetched in rectangles of up to 4 megapixels without others, else each is a picture,
    and native tiles are fetched as such. ``held``: compressed pictures in memory at a time.
    """

    cell: int
    held: int
    merged: bool

    def sides(self, level: Level) -> tuple[int, int]:
        """Return width and height of the cells of a level, px; at most 25 megapixels."""
        if level.width * level.height <= _WHOLE:
            return level.width, level.height
        return _whole_tiles(level.tile_width, self.cell), _whole_tiles(level.tile_height, self.cell)

    def pictures(self, numbers: Sequence[int], tiling: Tiling) -> list[list[int]]:
        """Return the cells ``numbers`` grouped by picture: a full rectangle of cells each, row-major."""
        return rectangles(numbers, tiling, _LARGEST) if self.merged else [[number] for number in numbers]

    def fingerprint_side(self, level: Level) -> int:
        """Return the side in px of the picture of the coarsest level that goes into the fingerprint.

        Small for a large level in rectangles, since its pixels are fetched again when it is read.
        """
        return _MIDDLE if self.merged and level.width * level.height > _WHOLE else _SIDE


GRID_CUTS = PictureCuts(_SIDE, held=16, merged=False)  # the service decodes each native tile once
RECTANGLE_CUTS = PictureCuts(256, held=8, merged=True)


def _whole_tiles(native: int, wanted: int) -> int:
    """Return a side of whole native tiles; ``wanted`` for strips and odd sizes."""
    return native * max(1, wanted // native) if 16 <= native <= 4 * wanted else wanted


def rectangles(numbers: Sequence[int], tiling: Tiling, most: int) -> list[list[int]]:
    """Cut cells of ``tiling`` into rectangles of at most ``most`` px (one cell at least), each row-major."""
    found: list[list[int]] = []
    growing: dict[tuple[int, int], list[int]] = {}  # by first and last column
    row_before = -1
    for row, runs in _column_runs(sorted(numbers), tiling, most).items():
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


def _column_runs(numbers: Sequence[int], tiling: Tiling, most: int) -> dict[int, list[tuple[int, int]]]:
    """Return by row the runs (first, last column) of adjacent cells, each of at most ``most`` px."""
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
