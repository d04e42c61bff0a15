"""Quality of found objects against labelled ones: label images, int32[h, w] with 0 for background, and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from wsi_mmm.tasks.peaks import FoundBoxes, area, iou
from wsi_mmm.tasks.targets import Boxes
from wsi_mmm.types import F64, I32, I64, Mask

_RECALLS = np.linspace(0.0, 1.0, 101)


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
        return Matches(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

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
    table, true_area, found_area = overlap_table(target, found)
    union = true_area[:, None] + found_area[None, :] - table
    ratio: F64 = table / np.maximum(union, 1)
    hits = ratio > iou
    matched = int(hits.sum())
    inter, joint = _jaccard_sums(table, union, true_area, found_area)
    return Matches(matched, len(found_area) - matched, len(true_area) - matched, float(ratio[hits].sum()), inter, joint)


def overlap_table(target: I32, found: I32) -> tuple[I64, I64, I64]:
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


# ---------------------------------------------------------------- boxes


@dataclass(frozen=True, slots=True)
class BoxMatches:
    """Of one class over all pictures: ``score`` and ``hit`` of each found box that counts, number of ``true`` ones."""

    score: F64
    hit: Mask
    true: int


Scenes = Sequence[tuple[Boxes, FoundBoxes]]


def box_metrics(scenes: Scenes, *, classes: int, threshold: float, least: float = 0.5) -> dict[str, float]:
    """ap50 averaged over the classes that occur; f1, precision, recall over all boxes of at least ``threshold``.

    1 where there was nothing to find and nothing was found. ``least``: IoU of a hit.
    """
    matches = [match_boxes(scenes, kind, least) for kind in range(classes)]
    known = [average_precision(v) for v in matches if v.true]
    found = sum(int((v.score >= threshold).sum()) for v in matches)
    hit = sum(int((v.hit & (v.score >= threshold)).sum()) for v in matches)
    true = sum(v.true for v in matches)
    return {
        "ap50": float(np.mean(known)) if known else float(found == 0),
        "f1": ratio_or_one(2 * hit, found + true),
        "precision": ratio_or_one(hit, found),
        "recall": ratio_or_one(hit, true),
    }


def match_boxes(scenes: Scenes, kind: int, least: float = 0.5) -> BoxMatches:
    """Found boxes of a class against true ones, picture by picture."""
    scores, hits, true = [np.zeros(0)], [np.zeros(0, np.bool_)], 0
    for target, found in scenes:
        wanted = target.xyxy[target.labels == kind].astype(np.float64)
        some = found.where(found.kind == kind)
        by_score = np.argsort(-some.score, kind="stable")
        hit, counts = _match_greedily(
            some.xyxy[by_score], wanted, target.xyxy[target.labels < 0].astype(np.float64), least
        )
        scores.append(some.score[by_score][counts].astype(np.float64))
        hits.append(hit[counts])
        true += len(wanted)
    return BoxMatches(np.concatenate(scores), np.concatenate(hits), true)


def _match_greedily(found: F64, true: F64, unknown: F64, least: float) -> tuple[Mask, Mask]:
    """(which found boxes, best first, hit a true one; which count at all).

    Each takes the true box it overlaps most that no better one took; of those that hit nothing, boxes that lie with
    ``least`` of their area in one unknown area do not count.
    """
    hit, counts = np.zeros(len(found), np.bool_), np.ones(len(found), np.bool_)
    free = np.ones(len(true), np.bool_)
    overlaps = iou(found[:, None], true[None])
    for i in np.flatnonzero((overlaps >= least).any(axis=1)).tolist():
        # Of equals the last, as pycocotools has it.
        best = len(true) - 1 - int(np.argmax(np.where(free, overlaps[i], -1.0)[::-1]))
        if free[best] and overlaps[i, best] >= least:
            hit[i], free[best] = True, False
    if len(unknown):
        counts = hit | ~(_share_inside(found, unknown) >= least).any(axis=1)
    return hit, counts


def _share_inside(found: F64, unknown: F64) -> F64:
    """float64[n, m]: share of each found box that lies in each area."""
    a, b = found[:, None], unknown[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    share: F64 = np.maximum(high - low, 0.0).prod(axis=2) / np.maximum(area(found), 1e-9)[:, None]
    return share


def average_precision(matches: BoxMatches) -> float:
    """Mean over 101 recalls of the best precision at that recall or a higher one (COCO). 0 when nothing is found."""
    by_score: I64 = np.argsort(-matches.score, kind="stable")
    hits = np.cumsum(matches.hit[by_score])
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / max(matches.true, 1), _RECALLS, side="left")
    return float(np.append(best, 0.0)[at].mean())
