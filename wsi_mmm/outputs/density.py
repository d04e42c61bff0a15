"""Counts of objects on a coarse grid over the slide, added part by part, and its densest fields."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, uniform_filter

from wsi_mmm.types import F64, I32

CELLS = 256  # along the longer side of the slide


@dataclass(slots=True)
class Density:
    """Counts per class on a grid over a slide of ``width`` x ``height`` level-0 px; memory is that of the grid."""

    width: int
    height: int
    classes: int = 1
    counts: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = max(1, round(self.height / self.cell)), max(1, round(self.width / self.cell))
        self.counts = np.zeros((self.classes, rows, columns), np.int64)

    @property
    def cell(self) -> float:
        """Side of a grid cell in level-0 px."""
        return max(self.width, self.height) / CELLS

    def add(self, points: F64, class_index: I32 | None = None) -> None:
        """Count ``points`` float64[n, 2] (x, y) level-0 px."""
        _, rows, columns = self.counts.shape
        x = np.clip((points[:, 0] / self.cell).astype(np.int64), 0, columns - 1)
        y = np.clip((points[:, 1] / self.cell).astype(np.int64), 0, rows - 1)
        which = np.zeros(len(points), np.int64) if class_index is None else class_index.astype(np.int64)
        flat = (which * rows + y) * columns + x
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)

    def smooth(self) -> F64:
        """float64[rows, columns]: objects of any class per cell, a little blurred."""
        blurred: F64 = gaussian_filter(self.counts.sum(axis=0).astype(np.float64), 1.6)
        return blurred

    def densest(self, size: float, count: int) -> list[tuple[float, float]]:
        """Top-left corners (x, y) level-0 px of up to ``count`` fields of side ``size`` px: dense, and apart.

        Not the very densest, which are often folds or smudges: near the 97th percentile of what holds objects.
        """
        reach = max(1, round(size / self.cell))
        mean = uniform_filter(self.counts.sum(axis=0).astype(np.float64), reach, mode="constant")
        found: list[tuple[float, float]] = []
        apart = max(size, 0.2 * max(self.width, self.height)) / self.cell
        rows, columns = np.mgrid[: mean.shape[0], : mean.shape[1]]
        while len(found) < count and (mean > 0).any():
            wanted = np.quantile(mean[mean > 0], 0.97)
            row, column = np.unravel_index(np.abs(np.where(mean > 0, mean, -wanted) - wanted).argmin(), mean.shape)
            x, y = (column + 0.5) * self.cell - size / 2, (row + 0.5) * self.cell - size / 2
            right, low = max(self.width - size, 0.0), max(self.height - size, 0.0)
            found.append((float(np.clip(x, 0, right)), float(np.clip(y, 0, low))))
            mean[np.hypot(rows - row, columns - column) < apart] = 0
        return found
