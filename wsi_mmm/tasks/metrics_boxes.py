"""Quality of found boxes: average precision as COCO defines it, at one IoU, and F1 at a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.tasks.peaks import Found, area, iou
from wsi_mmm.tasks.truth import Boxes
from wsi_mmm.types import F64, I64, Mask

_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Of one class over all pictures: ``score`` and ``hit`` of each found box that counts, number of ``true`` ones."""

    score: F64
    hit: Mask
    true: int


Scenes = Sequence[tuple[Boxes, Found]]


def figures(scenes: Scenes, *, classes: int, threshold: float, least: float = 0.5) -> dict[str, float]:
    """ap50 averaged over the classes that occur; f1, precision, recall over all boxes of at least ``threshold``.

    1 where there was nothing to find and nothing was found. ``least``: IoU of a hit.
    """
    verdicts = [judge(scenes, kind, least) for kind in range(classes)]
    known = [average_precision(v) for v in verdicts if v.true]
    found = sum(int((v.score >= threshold).sum()) for v in verdicts)
    hit = sum(int((v.hit & (v.score >= threshold)).sum()) for v in verdicts)
    true = sum(v.true for v in verdicts)
    return {
        "ap50": float(np.mean(known)) if known else float(found == 0),
        "f1": _ratio(2 * hit, found + true),
        "precision": _ratio(hit, found),
        "recall": _ratio(hit, true),
    }


def judge(scenes: Scenes, kind: int, least: float = 0.5) -> Verdicts:
    """Found boxes of a class against true ones, picture by picture."""
    scores, hits, true = [np.zeros(0)], [np.zeros(0, np.bool_)], 0
    for truth, found in scenes:
        wanted = truth.xyxy[truth.labels == kind].astype(np.float64)
        some = found.where(found.kind == kind)
        order = np.argsort(-some.score, kind="stable")
        hit, counts = _match(some.xyxy[order], wanted, truth.xyxy[truth.labels < 0].astype(np.float64), least)
        scores.append(some.score[order][counts].astype(np.float64))
        hits.append(hit[counts])
        true += len(wanted)
    return Verdicts(np.concatenate(scores), np.concatenate(hits), true)


def _match(found: F64, true: F64, unknown: F64, least: float) -> tuple[Mask, Mask]:
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
        counts = hit | ~(_inside(found, unknown) >= least).any(axis=1)
    return hit, counts


def _inside(found: F64, unknown: F64) -> F64:
    """float64[n, m]: share of each found box that lies in each area."""
    a, b = found[:, None], unknown[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    share: F64 = np.maximum(high - low, 0.0).prod(axis=2) / np.maximum(area(found), 1e-9)[:, None]
    return share


def average_precision(verdicts: Verdicts) -> float:
    """Mean over 101 recalls of the best precision at that recall or a higher one (COCO). 0 when nothing is found."""
    order: I64 = np.argsort(-verdicts.score, kind="stable")
    hits = np.cumsum(verdicts.hit[order])
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / max(verdicts.true, 1), _RECALLS, side="left")
    return float(np.append(best, 0.0)[at].mean())


def _ratio(a: float, b: float) -> float:
    """a / b; 1 when there was nothing to find and nothing was found."""
    return float(a / b) if b else 1.0
