"""The tables of parameters and metrics, and docs/training.md that shows them, are what the tasks do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers import training_tables
from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks import TASK_KINDS, Task, make_task
from wsi_mmm.tasks.facts import METRICS, PARAMETERS, PER_CLASS, find_metric, parameter_names
from wsi_mmm.tasks.targets import Boxes, Survival
from wsi_mmm.types import TaskInfo

ONE = ("survive",)


def made(kind: str, **params: float) -> Task:
    """A task of a kind with two classes, or one where it takes only one."""
    classes = ("a",) if kind in ONE else ("a", "b")
    info = TaskInfo("t", kind, classes, ((0, 0, 0),) * len(classes))
    scope = next(iter(TASK_KINDS[kind].heads))
    return TASK_KINDS[kind].from_params(info, params, scope)


@pytest.mark.parametrize("kind", sorted(TASK_KINDS))
def test_defaults_are_what_holds_without_a_parameter(kind: str) -> None:
    """Saying the default changes nothing; every name is known, and another one is not."""
    plain = made(kind)
    for one in PARAMETERS[kind]:
        if one.default is not None and not one.name.endswith(PER_CLASS):
            assert made(kind, **{one.name: one.default}) == plain, one.name
    weights = {name: 1.0 for name in parameter_names(kind, plain.info.classes) if name.startswith("weight:")}
    assert type(made(kind, **weights)) is type(plain)
    with pytest.raises(TypeError, match="'unheard'"):
        made(kind, unheard=1.0)


def test_every_kind_is_listed() -> None:
    """Kinds without a row would be undocumented."""
    assert set(PARAMETERS) == set(METRICS) == set(TASK_KINDS)


@pytest.mark.parametrize(
    "params", [{"hops": 1e9}, {"votes": -1}, {"area": float("nan")}, {"core": float("inf")}, {"foreground": 300}]
)
def test_parameters_that_would_not_end_are_refused(params: dict[str, float]) -> None:
    """Steps of a vote, bytes and areas have bounds; a card with NaN is none."""
    card = {"name": "t", "kind": "instances", "head": "map", "outputs": 4, "classes": ["a"], "colors": [[0, 0, 0]]}
    with pytest.raises((ModelError, ValueError), match=r"give a number from 0 to|finite"):
        make_task(TaskCard.model_validate({**card, "params": params}))


def labels() -> np.ndarray:
    """A picture of two objects."""
    found = np.zeros((64, 64), np.int32)
    found[8:24, 8:24], found[36:56, 30:50] = 1, 2
    return found


def pairs(kind: str, task: Any) -> list[tuple[Any, Any]]:
    """Targets of a kind, and answers that are neither empty nor perfect."""
    rng = np.random.default_rng(0)
    if kind == "classify":
        return [(n % 2, rng.random(2).astype(np.float32)) for n in range(12)]
    if kind == "multilabel":
        return [(np.array([n % 2, n % 3 == 0], np.float32), rng.random(2).astype(np.float32)) for n in range(12)]
    if kind == "regress":
        return [(np.array([n, -n], np.float32), rng.random(2).astype(np.float32)) for n in range(12)]
    if kind == "survive":
        return [(Survival(float(n), n % 2 == 0), rng.random(1).astype(np.float32)) for n in range(12)]
    if kind == "reconstruct":
        return [(rng.integers(0, 256, (8, 8, 3), np.uint8), rng.integers(0, 256, (3, 8, 8), np.uint8))]
    maps = rng.integers(0, 256, (task.channels, 64 // task.stride, 64 // task.stride), np.uint8)
    if kind == "detect":
        boxes = Boxes(np.array([[8, 8, 24, 24]], np.float32), np.zeros(1, np.int32), 64, 64)
        return [(boxes, maps)]
    if kind == "instances":
        classes = labels() - 1
        return [(np.stack([labels(), classes]), maps), (np.stack([-1 - labels(), classes]), maps)]
    target = {"segment": (labels() > 0).astype(np.int32),
              "multisegment": np.stack([labels() == 1, labels() == 2]).astype(np.int8)}[kind]  # fmt: skip
    return [(target, maps)]


@pytest.mark.parametrize("kind", sorted(TASK_KINDS))
def test_metrics_are_those_that_the_task_gives(kind: str) -> None:
    """By name; what is better when lower falls as answers get better."""
    task = made(kind)
    found = task.metrics(pairs(kind, task))
    assert list(found) == [one.name for one in METRICS[kind]]
    assert find_metric(kind, next(iter(found))) is not None and find_metric(kind, "luck") is None


def test_lower_is_better_where_it_says_so() -> None:
    """Of a perfect answer and a poor one, the perfect one has the better metrics."""
    task = made("regress")
    target = [np.array([n, 2 * n], np.float32) for n in range(6)]
    good = task.metrics([(one, one) for one in target])
    poor = task.metrics([(one, one[::-1] * (1 + n % 3)) for n, one in enumerate(target)])
    for metric in METRICS["regress"]:
        assert (good[metric.name] < poor[metric.name]) == metric.lower, metric.name


@pytest.mark.parametrize("name", sorted(training_tables.TABLES))
def test_the_documentation_shows_the_source(name: str) -> None:
    """``python -m helpers.training_tables`` writes the tables of docs/training.md."""
    assert training_tables.shown(name) == training_tables.TABLES[name]()
