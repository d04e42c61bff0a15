"""Classes of found objects: outlines match by overlap, points by distance, and what is unknown does not count."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from wsi_mmm.tasks.class_metrics import NEAR, match_classes, no_matches
from wsi_mmm.tasks.instance_targets import FIRST_POINT
from wsi_mmm.types import I32


def squares(*places: tuple[int, int]) -> I32:
    """Objects of 8 x 8 px with these corners (y, x), numbered from 1."""
    labels = np.zeros((64, 96), np.int32)
    for number, (y, x) in enumerate(places, 1):
        labels[y : y + 8, x : x + 8] = number
    return labels


def test_outlines_of_the_right_class_count() -> None:
    """Two right, one of another class, one missed, one extra: F1 of class 0 is 2/3, that of class 1 is 1/2."""
    labels = squares((0, 0), (0, 20), (0, 40), (0, 60))
    classes = np.where(labels > 0, np.array([0, 0, 0, 1, 1])[labels], -1).astype(np.int32)
    found = squares((0, 0), (1, 20), (0, 40), (40, 40))
    figures = match_classes(labels, classes, found, np.array([0, 1, 1, 0], np.int32), 2).quality()
    assert figures == {"class_f1": pytest.approx((2 * 1 / (2 + 2) + 2 * 1 / (2 + 2)) / 2)}


def test_objects_of_unknown_class_do_not_count() -> None:
    """Neither as missed nor, when found, as extra; nor does what is found in an unknown area."""
    labels = squares((0, 0), (0, 20))
    classes = np.where(labels == 1, 0, -1).astype(np.int32)
    labels[40:, 40:] = -1
    found = squares((0, 0), (0, 20), (48, 60))
    for some in (found, np.where(found == 2, 0, found)):
        assert match_classes(labels, classes, some, np.array([0, 1, 1], np.int32), 2).quality() == {"class_f1": 1.0}
    assert not match_classes(labels, np.full_like(classes, -1), found, np.zeros(3, np.int32), 2).table.any()


def points_target(points: list[tuple[int, int, int]]) -> tuple[I32, I32]:
    """Labels and classes of points (y, x, class), each an area of 5 px radius whose middle of 2 px has the class."""
    labels, classes = np.zeros((64, 96), np.int32), np.full((64, 96), -1, np.int32)
    y, x = np.mgrid[:64, :96]
    for number, (row, column, kind) in enumerate(points):
        away = (y - row) ** 2 + (x - column) ** 2
        labels[away <= 25], classes[away <= 4] = FIRST_POINT - number, kind
    return labels, classes


def test_points_have_the_nearest_free_centroid() -> None:
    """The nearest pair first; beyond `NEAR` px nothing matches; of another class is found, but not right."""
    labels, classes = points_target([(10, 10, 0), (10, 24, 1), (40, 40, 1), (40, 70, 0)])
    found = squares((6, 8), (6, 20), (36, 36), (36, 77))  # centroids at (10, 12), (10, 24), (40, 40), (40, 81)
    figures = match_classes(labels, classes, found, np.array([0, 1, 0, 0], np.int32), 2).quality()
    assert figures["points_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert figures["class_f1"] == pytest.approx((2 * 1 / (2 + 3) + 2 * 1 / (2 + 1)) / 2)


def test_points_are_matched_as_well_as_can_be() -> None:
    """Against the optimal assignment: within 2 % of as many pairs, and never one farther than `NEAR`."""
    rng = np.random.default_rng(5)
    matched = best = 0
    for _ in range(20):
        places = rng.permutation([(y, x) for y in range(6, 60, 12) for x in range(6, 90, 12)])[:20]
        labels, classes = points_target([(int(y), int(x), 0) for y, x in places])
        moved = np.clip(places + rng.integers(-5, 6, places.shape), 4, (59, 91)) - 4
        found = np.zeros((64, 96), np.int32)
        for number, (y, x) in enumerate(moved.tolist(), 1):
            found[y + 2 : y + 6, x + 2 : x + 6] = number
        kept = np.unique(found[found > 0])
        centres = np.array([np.argwhere(found == n).mean(axis=0) + 0.5 for n in kept])
        away = np.linalg.norm(places[:, None] + 0.5 - centres[None], axis=2)
        rows, columns = linear_sum_assignment(np.where(away <= NEAR, away, 1e6))
        best += int((away[rows, columns] <= NEAR).sum())
        matched += int(match_classes(labels, classes, found, np.zeros(20, np.int32), 1).points[0, 0])
    assert 0.98 * best <= matched <= best


def test_pictures_add_up() -> None:
    """A picture with points and one without: the points' F1 is shown, of those pictures alone."""
    labels, classes = points_target([(10, 10, 0)])
    one = match_classes(labels, classes, squares((6, 6)), np.array([0], np.int32), 2)
    outlined = squares((0, 0))
    two = match_classes(outlined, np.where(outlined > 0, 1, -1).astype(np.int32), squares(), np.zeros(0, np.int32), 2)
    both = (no_matches(2) + one + two).quality()
    assert both == {"class_f1": 0.5, "points_f1": 1.0}
    assert "points_f1" not in (no_matches(2) + two).quality()
