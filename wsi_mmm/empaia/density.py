"""How dense objects lie on a slide, per square of 100 micrometres, as a pixelmap of one of its levels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from wsi_mmm.empaia.pixelmaps import MapLevel, Pixelmap
from wsi_mmm.types import F64, I64, Level, SlideInfo

CELL = 100.0  # micrometres: side of a square
_SIDES = (256, 512, 1024)  # px of a tile: few tiles, each far below the 10 MB of a request

PixelBox = tuple[float, float, float, float]


@dataclass(slots=True)
class DensityGrid:
    """Counts of points on a grid of squares over a slide whose mpp is known."""

    info: SlideInfo
    counts: I64 = field(init=False)

    def __post_init__(self) -> None:
        across, down = self.cell
        size = math.ceil(self.info.height / down), math.ceil(self.info.width / across)
        self.counts = np.zeros(size, np.int64)

    @property
    def cell(self) -> tuple[float, float]:
        """Sides (x, y) of a square in level-0 px."""
        return CELL / (self.info.mpp_x or 1.0), CELL / (self.info.mpp_y or 1.0)

    def add(self, points: F64) -> None:
        """Count ``points`` float64[n, 2] (x, y) level-0 px."""
        at = (points / self.cell).astype(np.int64)
        rows, columns = self.counts.shape
        np.add.at(self.counts, (np.clip(at[:, 1], 0, rows - 1), np.clip(at[:, 0], 0, columns - 1)), 1)

    @property
    def highest(self) -> float:
        """Objects per square millimetre where they lie densest."""
        return float(self.counts.max()) * 1e6 / CELL**2

    def pixelmap(self, name: str, wsi_id: str, worked: Sequence[PixelBox]) -> Pixelmap:
        """The map, on the coarsest level with px finer than the squares; its tiles lie over ``worked`` and all objects.

        ``worked``: level-0 rectangles (x0, y0, x1, y1).
        """
        number = self._finest_level()
        level = self.info.levels[number]
        side = next((side for side in _SIDES if max(level.width, level.height) <= side), _SIDES[-1])
        x0, y0, x1, y1 = self._covered_box(worked)
        across, down = side * level.downsample_x, side * level.downsample_y
        last_x, last_y = (level.width - 1) // side, (level.height - 1) // side
        tiles = (
            min(last_x, int(x0 / across)), min(last_y, int(y0 / down)),
            min(last_x, math.ceil(x1 / across) - 1), min(last_y, math.ceil(y1 / down) - 1),
        )  # fmt: skip
        upper = max(1.0, math.ceil(self.highest))
        return Pixelmap(
            name, "continuous", "float32", wsi_id, (MapLevel(number, tiles),), side=side, limits=(0.0, upper),
            neutral=0.0, description=f"objects per square millimetre, in squares of {CELL:g} micrometres",
        )  # fmt: skip

    def tiles(self, of: Pixelmap) -> Iterator[tuple[tuple[int, int, int], F64]]:
        """((level, column, row), values float64[h, w]) of every tile; those at the edge are smaller."""
        found = of.levels[0]
        level = self.info.levels[found.level]
        x0, y0, x1, y1 = found.tiles or (0, 0, 0, 0)
        for row in range(y0, y1 + 1):
            down = self._cell_index(row * of.side, min(level.height, (row + 1) * of.side), level, axis=1)
            for column in range(x0, x1 + 1):
                across = self._cell_index(column * of.side, min(level.width, (column + 1) * of.side), level, axis=0)
                yield (found.level, column, row), np.float64(1e6 / CELL**2) * self.counts[np.ix_(down, across)]

    def _cell_index(self, start: int, stop: int, level: Level, *, axis: int) -> I64:
        """In which squares the px ``start`` to ``stop`` of a level have their middle."""
        downsample = (level.downsample_x, level.downsample_y)[axis]
        middle = (np.arange(start, stop) + 0.5) * downsample
        found: I64 = np.minimum((middle / self.cell[axis]).astype(np.int64), self.counts.shape[1 - axis] - 1)
        return found

    def _finest_level(self) -> int:
        fine = [
            i for i, one in enumerate(self.info.levels) if max(one.downsample_x, one.downsample_y) <= min(self.cell)
        ]
        return fine[-1] if fine else 0

    def _covered_box(self, worked: Sequence[PixelBox]) -> PixelBox:
        """The rectangle round what was worked on and what was found; never empty, inside the slide."""
        across, down = self.cell
        rows, columns = np.nonzero(self.counts)
        boxes = [*worked]
        if len(rows):
            low, high = (
                (columns.min() * across, rows.min() * down),
                ((columns.max() + 1) * across, (rows.max() + 1) * down),
            )
            boxes.append((*low, *high))
        if not boxes:
            return 0.0, 0.0, 1.0, 1.0
        x0, y0, x1, y1 = (pick(side) for pick, side in zip((min, min, max, max), zip(*boxes, strict=True), strict=True))
        return x0, y0, min(max(x1, x0 + 1.0), self.info.width), min(max(y1, y0 + 1.0), self.info.height)
