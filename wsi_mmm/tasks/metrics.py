"""Quality of found objects against labelled ones. Label images are int32[h, w], 0 = background."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from wsi_mmm.types import F64, I32, I64


@dataclass(frozen=True, slots=True)
class Matches:
    """Counts of one or more images, which add up. ``iou`` is summed over the matched pairs."""

    matched: int = 0
    extra: int = 0
    missed: int = 0
    iou: float = 0.0
    aji_intersection: int = 0
    aji_union: int = 0

    def __add__(self, other: Matches) -> Matches:
        return Matches(
            self.matched + other.matched,
            self.extra + other.extra,
            self.missed + other.missed,
            self.iou + other.iou,
            self.aji_intersection + other.aji_intersection,
            self.aji_union + other.aji_union,
        )

    def quality(self) -> dict[str, float]:
        """f1, precision and recall at the IoU of the match; pq (Kirillov 2019); aji (Kumar 2017)."""
        found, true = self.matched + self.extra, self.matched + self.missed
        return {
            "f1": ratio_or_one(2 * self.matched, found + true),
            "precision": ratio_or_one(self.matched, found),
            "recall": ratio_or_one(self.matched, true),
            "pq": ratio_or_one(2 * self.iou, found + true),
            "aji": ratio_or_one(self.aji_intersection, self.aji_union),
        }


def match(target: I32, found: I32, iou: float = 0.5) -> Matches:
    """Compare two label images; pairs match when intersection over union is above ``iou`` (>= 0.5: one to one)."""
    table, true_area, found_area = _overlap_table(target, found)
    union = true_area[:, None] + found_area[None, :] - table
    ratio: F64 = table / np.maximum(union, 1)
    hits = ratio > iou
    matched = int(hits.sum())
    inter, joint = _jaccard_sums(table, union, true_area, found_area)
    return Matches(matched, len(found_area) - matched, len(true_area) - matched, float(ratio[hits].sum()), inter, joint)


def total(matches: Iterable[Matches]) -> Matches:
    """The sum, starting from nothing."""
    return sum(matches, Matches())


def _overlap_table(target: I32, found: I32) -> tuple[I64, I64, I64]:
    """Intersection int64[n true, n found] and the areas, background left out, labels made contiguous."""
    true_ids, t = np.unique(target, return_inverse=True)
    found_ids, f = np.unique(found, return_inverse=True)
    size = len(true_ids) * len(found_ids)
    table = np.bincount((t.ravel() * len(found_ids) + f.ravel()), minlength=size).reshape(len(true_ids), -1)
    true_area, found_area = table.sum(1), table.sum(0)
    return table[true_ids > 0][:, found_ids > 0], true_area[true_ids > 0], found_area[found_ids > 0]


def _jaccard_sums(table: I64, union: I64, true_area: I64, found_area: I64) -> tuple[int, int]:
    """Aggregated Jaccard index (Kumar 2017): intersections and unions of each true object with its best found one.

    A true object that nothing overlaps adds its own area to the unions, as does every found one that is nobody's best.
    """
    if not table.size:
        return 0, int(true_area.sum()) + int(found_area.sum())
    best = np.argmax(table / np.maximum(union, 1), axis=1)
    row = np.arange(len(best))
    shared = table[row, best]
    unused = np.setdiff1d(np.arange(len(found_area)), best[shared > 0])
    unions = np.where(shared > 0, union[row, best], true_area)
    return int(shared.sum()), int(unions.sum() + found_area[unused].sum())


def ratio_or_one(a: float, b: float) -> float:
    """a / b; 1 when there was nothing to find and nothing was found."""
    return float(a / b) if b else 1.0
