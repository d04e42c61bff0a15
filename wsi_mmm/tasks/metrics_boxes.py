"""Quality of found boxes: average precision as COCO defines it, at one IoU, and F1 at a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.tasks.metrics import ratio_or_one
from wsi_mmm.tasks.peaks import FoundBoxes, area, iou
from wsi_mmm.tasks.targets import Boxes
from wsi_mmm.types import F64, I64, Mask

_RECALLS = np.linspace(0.0, 1.0, 101)


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
