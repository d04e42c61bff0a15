"""Figures of quality: golden values (scikit-learn 1.9, scipy 1.16; worked by hand where neither has them)."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest

from wsi_mmm.tasks import scores

TRUTH = np.array([0, 0, 1, 1, 2, 2, 2, 1])
FOUND = np.array([0, 1, 1, 1, 2, 0, 2, 2])
POSITIVE = np.array([1, 0, 1, 1, 0, 0, 1, 0], np.bool_)
SCORE = np.array([0.9, 0.8, 0.8, 0.4, 0.4, 0.3, 0.2, 0.1])


def test_figures_of_classes_are_the_usual_ones() -> None:
    """Five right of eight; per class 1/2, 2/3, 2/3 found; F1 1/2, 2/3, 2/3."""
    table = scores.confusion(TRUTH, FOUND, 3)
    assert scores.accuracy(table) == 0.625
    assert scores.balanced_accuracy(table) == pytest.approx(0.6111111111)
    assert scores.f1_macro(table) == pytest.approx(0.6111111111)


def test_ranking_counts_ties_as_half() -> None:
    """Of 16 pairs 10 are in order and 2 are ties; precision steps where the score changes."""
    assert scores.auroc(POSITIVE, SCORE) == pytest.approx(11 / 16)
    # thresholds: 1/1 of 1/4; 2/3 of 1/4; 3/5 of 1/4; 3/6; 4/7 of 1/4
    assert scores.average_precision(POSITIVE, SCORE) == pytest.approx((1 + 2 / 3 + 3 / 5 + 4 / 7) / 4)


def test_ranking_agrees_with_scikit_learn() -> None:
    """On many random scores with ties."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, score = rng.random(200) < 0.3, np.round(rng.random(200), 1)
        assert scores.auroc(truth, score) == pytest.approx(metrics.roc_auc_score(truth, score))
        assert scores.average_precision(truth, score) == pytest.approx(metrics.average_precision_score(truth, score))
        classes, found = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
        table = scores.confusion(classes, found, 4)
        assert scores.balanced_accuracy(table) == pytest.approx(metrics.balanced_accuracy_score(classes, found))
        assert scores.f1_macro(table) == pytest.approx(metrics.f1_score(classes, found, average="macro"))


def test_figures_of_values_are_the_usual_ones() -> None:
    """Errors 0.5, 0.5, 0, 1 (scikit-learn: MAE 0.5, R2 0.9486), equal values share their mean rank."""
    truth, found = np.array([3.0, -0.5, 2.0, 7.0]), np.array([2.5, 0.0, 2.0, 8.0])
    assert scores.mean_absolute_error(truth, found) == 0.5
    assert scores.r2(truth, found) == pytest.approx(0.9486081370)
    assert scores.spearman(np.array([1.0, 2, 2, 4, 5]), np.array([5.0, 6, 7, 8, 7])) == pytest.approx(0.7631578947)


def test_what_cannot_be_settled_is_left_out() -> None:
    """One class alone has no AUROC, a constant no R2 and no rank correlation, and no pair no concordance."""
    one = np.ones(3, np.bool_)
    flat = np.ones(3)
    figures = {
        "auroc": scores.auroc(one, flat), "ap": scores.average_precision(~one, flat), "r2": scores.r2(flat, flat),
        "spearman": scores.spearman(flat, flat), "concordance": scores.concordance(flat, ~one, flat),
        "none": scores.concordance(flat[:0], one[:0], flat[:0]), "mae": 0.0,
    }  # fmt: skip
    assert scores.known_metrics(figures) == {"mae": 0.0}
    assert scores.mean([0.5, float("nan"), 1.0]) == 0.75


def pairwise(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    """Harrell's index by its definition, pair by pair."""
    good = total = 0.0
    for i, j in combinations(range(len(time)), 2):
        for a, b in ((i, j), (j, i)):
            if event[a] and (time[a] < time[b] or (time[a] == time[b] and not event[b])):
                total += 1
                good += 1.0 if risk[a] > risk[b] else 0.5 * (risk[a] == risk[b])
    return good / total if total else float("nan")


def test_concordance_is_harrells_with_ties() -> None:
    """The sorted count equals the pairwise definition, ties in time, in risk and in both included."""
    rng = np.random.default_rng(1)
    for n in (1, 2, 3, 7, 8, 9, 40, 65):
        for _ in range(10):
            when, risk = rng.integers(0, 6, n).astype(float), rng.integers(0, 4, n).astype(float)
            seen = rng.random(n) < 0.6
            assert scores.concordance(when, seen, risk) == pytest.approx(pairwise(when, seen, risk), nan_ok=True)
    when, seen = np.array([1.0, 2, 3, 4]), np.array([True, True, False, True])
    assert scores.concordance(when, seen, -when) == 1.0
    assert scores.concordance(when, seen, when) == 0.0


def test_a_hundred_thousand_items_are_compared_quickly() -> None:
    """No pair is looked at on its own: 5e9 of them would take minutes."""
    rng = np.random.default_rng(2)
    when, risk = rng.exponential(size=100_000), rng.normal(size=100_000)
    began = time.process_time()
    found = scores.concordance(when, rng.random(100_000) < 0.5, risk)
    assert time.process_time() - began < 10
    assert found == pytest.approx(0.5, abs=0.01)
