"""Metrics of predictions per tile or per bag, from arrays of targets and predictions. numpy and scipy only.

A metric that the pairs do not define (AUROC of a class that never occurs) is NaN here; `known_metrics` leaves it out.
Everything sorts: nothing compares all pairs, so a hundred thousand of them take well under a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_mmm.types import F64, I64, Mask

Scores = npt.NDArray[np.floating[Any]]


def known_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """The entries of ``values`` that are numbers."""
    return {name: float(value) for name, value in values.items() if not np.isnan(value)}


def mean(values: Iterable[float]) -> float:
    """The mean of those that are numbers, NaN when none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def mean_metrics(each: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Per metric the mean over ``each`` of those that are numbers; metrics that none of them defines are left out."""
    table = list(each)
    return known_metrics({name: mean(one[name] for one in table) for name in table[0]})


# ---------------------------------------------------------------- classes


def confusion(target: I64, found: I64, classes: int) -> I64:
    """Counts int64[true class, found class]."""
    return np.bincount(target * classes + found, minlength=classes * classes).reshape(classes, classes)


def accuracy(table: I64) -> float:
    """Share on the diagonal."""
    return _ratio_or_nan(np.trace(table), table.sum())


def balanced_accuracy(table: I64) -> float:
    """Mean share found of the classes that occur."""
    return mean(_ratio_or_nan(hit, total) for hit, total in zip(np.diag(table), table.sum(axis=1), strict=True))


def f1_macro(table: I64) -> float:
    """Mean of 2 tp / (2 tp + fp + fn) over the classes that occur or were said to."""
    both = table.sum(axis=0) + table.sum(axis=1)
    return mean(_ratio_or_nan(2 * hit, total) for hit, total in zip(np.diag(table), both, strict=True))


def f1(target: Mask, found: Mask) -> float:
    """2 tp / (2 tp + fp + fn); NaN when nothing holds and nothing was said."""
    return _ratio_or_nan(2 * int((target & found).sum()), int(target.sum()) + int(found.sum()))


def auroc(target: Mask, score: Scores) -> float:
    """Chance that a positive scores above a negative, ties half (Mann and Whitney); NaN without both."""
    positive = int(target.sum())
    negative = len(target) - positive
    if not positive or not negative:
        return float("nan")
    ranks = _mean_ranks(score)
    return float((ranks[target].sum() - positive * (positive + 1) / 2) / (positive * negative))


def average_precision(target: Mask, score: Scores) -> float:
    """Sum over thresholds of precision times the gain in recall, equal scores together; NaN without a positive."""
    positive = int(target.sum())
    if not positive:
        return float("nan")
    by_score = np.argsort(-score, kind="stable")
    hits = np.cumsum(target[by_score])
    last = np.append(np.flatnonzero(np.diff(score[by_score])), len(by_score) - 1)  # the end of each run of equal scores
    precision, gain = hits[last] / (last + 1), np.diff(hits[last], prepend=0) / positive
    return float((precision * gain).sum())


# ---------------------------------------------------------------- values


def mean_absolute_error(target: F64, found: F64) -> float:
    """Mean of |target - found|."""
    return float(np.abs(target - found).mean()) if len(target) else float("nan")


def r2(target: F64, found: F64) -> float:
    """1 - residual / total sum of squares; NaN when the target does not vary."""
    total = ((target - target.mean()) ** 2).sum() if len(target) else 0.0
    return float(1.0 - ((target - found) ** 2).sum() / total) if total > 0 else float("nan")


def spearman(target: F64, found: F64) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs; NaN when either does not vary."""
    if len(target) < 2:
        return float("nan")
    a, b = (_mean_ranks(values) - (len(values) + 1) / 2 for values in (target, found))
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


# ---------------------------------------------------------------- survival


def concordance(time: F64, event: Mask, risk: F64) -> float:
    """Harrell's index: share of comparable pairs of which the one with the higher risk has the event first.

    Pairs are comparable when the earlier time is an event, or at equal times exactly one of the two is. Equal risks
    count half (as in lifelines and scikit-survival). NaN without a comparable pair. O(n log^2 n).
    """
    by_time = np.lexsort((~event, time))  # by time, events before the others of their time
    time, event = time[by_time], event[by_time]
    rank = np.unique(risk[by_time], return_inverse=True)[1].astype(np.int64)
    late = _after_events(time, event)
    comparable = (len(time) - late).sum()
    if not comparable:
        return float("nan")
    below, equal = _count_behind(rank, late, rank[event])
    return float((below.sum() + 0.5 * equal.sum()) / comparable)


def _after_events(time: F64, event: Mask) -> I64:
    """Per event, in order: the first position behind all events of its time."""
    ends = np.append(np.flatnonzero(np.diff(time)), len(time) - 1) + 1 if len(time) else np.zeros(0, np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    events = np.concatenate([[0], np.cumsum(event)])
    behind = starts + events[ends] - events[starts] if len(ends) else starts
    group = np.searchsorted(ends, np.flatnonzero(event), side="right")
    found: I64 = behind[group].astype(np.int64)
    return found


def _count_behind(rank: I64, start: I64, value: I64) -> tuple[I64, I64]:
    """How many of ``rank[start[q]:]`` are below, and equal to, ``value[q]``, for every query q.

    A suffix is the union of blocks of 1, 2, 4 ... positions, one for each bit set in its start on the way up; blocks of
    a size are searched all at once in a copy that is sorted within each.
    """
    size = 1 << max(0, (len(rank) - 1).bit_length())
    top = int(rank.max(initial=0)) + 2
    padded = np.full(size, top - 1, np.int64)  # above every value
    padded[: len(rank)] = rank
    below, equal = np.zeros(len(start), np.int64), np.zeros(len(start), np.int64)
    at, width = start.copy(), 1
    while width <= size:
        table = np.sort(padded.reshape(-1, width), axis=1) + np.arange(size // width)[:, None] * top
        asked = ((at & width) > 0) if width < size else at == 0
        asked &= at < size
        block = at[asked] // width
        key = value[asked] + block * top
        low = np.searchsorted(table.ravel(), key, side="left")
        below[asked] += low - block * width
        equal[asked] += np.searchsorted(table.ravel(), key, side="right") - low
        at[asked] += width
        width *= 2
    return below, equal


def _mean_ranks(values: Scores) -> F64:
    """float64[n]: place of each in their order, from 1; equals share the mean of theirs."""
    from scipy.stats import rankdata  # a second to import, which a run that judges nothing need not wait for

    ranks: F64 = rankdata(values)
    return ranks


def _ratio_or_nan(a: Any, b: Any) -> float:
    return float(a / b) if b else float("nan")
