"""Quality of the classes of found objects, against outlines or points of known classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from wsi_mmm.tasks.instance_targets import FIRST_POINT, known_labels
from wsi_mmm.tasks.metrics import overlap_table, ratio_or_one
from wsi_mmm.types import F64, I32, I64, Mask

NEAR = 6.0
"""Target px from a point within which the centroid of a found object may be its own (3 um at 0.5 um/px)."""


@dataclass(frozen=True, slots=True)
class ClassMatches:
    """Counts of one or more pictures, which add up. ``table`` int64[K + 1, K + 1]: objects by true and found class; the
    last row is that of found ones that are none, the last column of true ones that were not found. ``points``: the
    same table of pictures with points alone."""

    table: I64
    points: I64

    def __add__(self, other: ClassMatches) -> ClassMatches:
        return ClassMatches(self.table + other.table, self.points + other.points)

    def quality(self) -> dict[str, float]:
        """``class_f1``: F1 of the classes that occur, mean; an object of another class is missed, and one that is none.
        Where there are pictures with points, ``points_f1`` of all objects, whatever their class."""
        hit = np.diag(self.table)[:-1]
        both = (self.table[:-1].sum(1) + self.table[:, :-1].sum(0)).tolist()
        scores = [ratio_or_one(2 * one, all_) for one, all_ in zip(hit.tolist(), both, strict=True) if all_]
        figures = {"class_f1": float(np.mean(scores)) if scores else 1.0}
        if self.points.any():
            matched, extra, missed = self.points[:-1, :-1].sum(), self.points[-1].sum(), self.points[:, -1].sum()
            figures["points_f1"] = ratio_or_one(2 * int(matched), int(2 * matched + extra + missed))
        return figures


def no_matches(count: int) -> ClassMatches:
    """Of no picture; ``count`` classes."""
    zeros = np.zeros((count + 1, count + 1), np.int64)
    return ClassMatches(zeros, zeros)


def match_classes(labels: I32, classes: I32, found: I32, found_classes: I32, count: int) -> ClassMatches:
    """Compare the found objects 1..n of ``found`` int32[h, w], of ``found_classes`` int32[n], with the target.

    With outlines of known class, pairs match when intersection over union is above 0.5; else, with points, each point
    has the nearest free centroid within `NEAR`. What lies in unknown areas, or is of unknown class, does not count.
    """
    if not (classes >= 0).any():
        return no_matches(count)
    if (labels > 0).any():
        return ClassMatches(_match_outlines(labels, classes, found, found_classes, count), no_matches(count).points)
    table = _match_points(labels, classes, found, found_classes, count)
    return ClassMatches(table, table)


def _match_outlines(labels: I32, classes: I32, found: I32, found_classes: I32, count: int) -> I64:
    labels, found = known_labels(labels, found)
    shared, true_area, found_area = overlap_table(labels, found)
    pairs = shared / np.maximum(true_area[:, None] + found_area[None] - shared, 1) > 0.5
    true_ids, place = np.unique(labels[labels > 0], return_inverse=True)
    true_class = np.full(len(true_ids), -1, np.int64)
    np.maximum.at(true_class, place, classes[labels > 0])
    ids = np.unique(found[found > 0])
    return _class_table(pairs, true_class, found_classes[ids - 1], count)


def _match_points(labels: I32, classes: I32, found: I32, found_classes: I32, count: int) -> I64:
    """The area of a point has a negative number of its own; its class stands in the middle of it."""
    points, true = _centroids(np.where(classes >= 0, FIRST_POINT + 1 - labels, 0) * (labels <= FIRST_POINT))
    true_class = np.full(len(true), -1, np.int64)
    middle = (labels <= FIRST_POINT) & (classes >= 0)
    np.maximum.at(true_class, np.searchsorted(points, FIRST_POINT + 1 - labels[middle]), classes[middle])
    ids, centres = _centroids(found)
    near = cKDTree(true).sparse_distance_matrix(cKDTree(centres), NEAR, output_type="ndarray")
    pairs = np.zeros((len(points), len(ids)), bool)
    for _, i, j in np.sort(near[["v", "i", "j"]]).tolist():
        if not pairs[i].any() and not pairs[:, j].any():
            pairs[i, j] = True
    row, column = centres.astype(np.int64).T
    counts = pairs.any(axis=0) | (labels[row, column] != -1)
    return _class_table(pairs[:, counts], true_class, found_classes[ids - 1][counts], count)


def _centroids(labels: I32) -> tuple[I64, F64]:
    """Labels above 0 that occur, ascending, and the centroids float64[n, 2] (y, x; px edges are integers) of each."""
    row, column = np.nonzero(labels > 0)
    ids, place = np.unique(labels[row, column], return_inverse=True)
    area = np.maximum(np.bincount(place, minlength=len(ids)), 1)
    both = [np.bincount(place, weights=one, minlength=len(ids)) / area + 0.5 for one in (row, column)]
    return ids.astype(np.int64), np.stack(both, axis=1)


def _class_table(pairs: Mask, true_class: I64, found_class: I32, count: int) -> I64:
    """See `ClassMatches`; objects of unknown class, and what is matched with them, are left out."""
    true, got = np.nonzero(pairs)
    rows = [true_class[true], true_class[~pairs.any(axis=1)]]
    extra = found_class[~pairs.any(axis=0)].astype(np.int64)
    columns = [found_class[got].astype(np.int64), np.full(len(rows[1]), count), extra]
    row, column = np.concatenate([*rows, np.full(len(extra), count)]), np.concatenate(columns)
    both = row[row >= 0] * (count + 1) + column[row >= 0]
    return np.bincount(both, minlength=(count + 1) ** 2).astype(np.int64).reshape(count + 1, count + 1)
