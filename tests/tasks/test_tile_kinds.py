"""The kinds that answer per tile or per bag: from a card to a loss, figures and a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.model.heads import HeadSpec
from wsi_mmm.tasks import Task, make_task
from wsi_mmm.tasks.targets import Survival

NAN = float("nan")


def card(kind: str, *classes: str, outputs: int = 0, head: str = "vector", **params: float) -> TaskCard:
    named = {name.replace("__", ":"): value for name, value in params.items()}
    return TaskCard.model_validate({
        "name": "t", "kind": kind, "head": head, "outputs": outputs or len(classes), "classes": classes,
        "colors": [(0, 0, 0)] * len(classes), "params": named,
    })  # fmt: skip


TASKS: dict[str, tuple[TaskCard, list[Any], Any]] = {
    "classify": (card("classify", "a", "b", "c"), [0, 1, 2], -1),
    "multilabel": (card("multilabel", "a", "b"), [np.array([0, 1], np.float32), np.array([1, NAN], np.float32)],
                   np.array([NAN, NAN], np.float32)),
    "regress": (card("regress", "a", "b", centre=50.0, spread=10.0, spread__b=2.5),
                [np.array([40, 52.5], np.float32), np.array([60, 47.5], np.float32)], np.array([NAN, NAN], np.float32)),
    "cox": (card("survive", "death"), [Survival(1.0, True), Survival(2.0, True), Survival(2.5, False)],
            Survival(NAN, False)),
    "discrete": (card("survive", "death", outputs=4, bins=4, horizon=8.0),
                 [Survival(1.0, True), Survival(5.0, False), Survival(30.0, False)], Survival(NAN, True)),
}  # fmt: skip


@pytest.fixture(params=sorted(TASKS))
def case(request: pytest.FixtureRequest) -> tuple[Task, list[Any], Any]:
    made, truths, unknown = TASKS[request.param]
    return make_task(made), truths, unknown


def test_an_untrained_head_loses_one_and_the_unknown_nothing(case: tuple[Task, list[Any], Any]) -> None:
    """Targets stack; zero logits cost 1; a batch of which nothing is known costs 0 with gradients."""
    task, truths, unknown = case
    target = torch.stack([task.target(truth) for truth in [*truths, unknown]])
    logits = torch.zeros(len(target), task.channels, requires_grad=True)
    assert task.loss(logits, target).item() == pytest.approx(1.0, abs=1e-5)
    nothing = task.loss(logits, torch.stack([task.target(unknown)] * len(target)))
    assert nothing.item() == 0.0
    [gradient] = torch.autograd.grad(nothing, logits)
    assert (gradient == 0).all()


def test_the_head_learns_its_truths(case: tuple[Task, list[Any], Any]) -> None:
    """A head on vectors that tell the items apart: the loss falls well below 1, and the figures say so."""
    task, truths, unknown = case
    torch.manual_seed(0)
    head = task.head(HeadSpec(4, 8, 8)).eval()
    vectors = torch.randn(len(truths) + 1, 8)
    target = torch.stack([task.target(truth) for truth in [*truths, unknown]])
    optimiser = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        loss = task.loss(head(vectors), target)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.6
    with torch.no_grad():
        answers = task.quantise(head(vectors)).numpy()
    assert answers.shape == (len(target), task.channels)
    figures = task.metrics(list(zip([*truths, unknown], answers, strict=True)))
    for name in {"accuracy", "auroc", "ap", "f1", "r2", "spearman", "concordance"} & set(figures):
        assert figures[name] > 0.95, figures
    assert figures
    assert figures.get("mae", 0.0) < 1.0
    assert task.metrics([]) == task.metrics([(unknown, answers[0])]) == {}


def test_every_column_is_named_after_the_task(case: tuple[Task, list[Any], Any]) -> None:
    """Integer columns are class indices, the others float32; one row per answer."""
    task, _, _ = case
    columns = task.table(task.quantise(torch.randn(5, task.channels)).numpy())
    assert all(name == "t" or name.startswith("t:") for name in columns)
    assert all(len(values) == 5 for values in columns.values())
    assert {values.dtype for values in columns.values()} <= {np.dtype(np.int32), np.dtype(np.float32)}


def test_several_labels_are_told_apart() -> None:
    """Bytes become probabilities; the column of the task names the likeliest label of at least a half, else -1."""
    table = make_task(card("multilabel", "a", "b")).table(np.array([[255, 128], [127, 0], [128, 204]], np.uint8))
    assert table["t"].tolist() == [0, -1, 1]
    assert table["t:b"].tolist() == pytest.approx([128 / 255, 0.0, 0.8])


def test_multilabel_figures_are_means_over_labels() -> None:
    """Label a ranks right, b wrong; where b is unknown only a counts."""
    task = make_task(card("multilabel", "a", "b"))
    truths = [np.array(t, np.float32) for t in ([1, 1], [0, 0], [0, NAN])]
    answers = [np.array(v, np.uint8) for v in ([200, 10], [100, 200], [90, 255])]
    found = task.metrics(list(zip(truths, answers, strict=True)))
    assert found == pytest.approx({"ap": 0.75, "auroc": 0.5, "f1": 0.5, "accuracy": 0.5})


def test_values_come_back_in_their_own_units() -> None:
    """Target and answer undo each other to float32: no byte stands between."""
    task = make_task(card("regress", "a", "b", centre=50.0, spread=10.0, spread__b=2.5, centre__a=-3.0))
    truth = np.array([-2.7182817, 51.25], np.float32)
    answer = task.quantise(task.target(truth)[None]).numpy()
    assert answer.dtype == np.float32
    assert answer[0] == pytest.approx(truth, rel=1e-6)
    assert task.table(answer)["t:b"].tolist() == [51.25]
    assert list(make_task(card("regress", "age")).table(np.ones((1, 1), np.float32))) == ["t"]


def test_discrete_hazards_become_a_survival_curve() -> None:
    """Hazards of a half: survival 1/2, 1/4 ...; the risk is the share of the horizon that is lost on average."""
    task = make_task(card("survive", "death", outputs=3, bins=3, edge__1=1.0, edge__2=2.0, edge__3=4.0))
    values = task.quantise(torch.zeros(1, 3)).numpy()
    assert values[0] == pytest.approx([0.5, 0.25, 0.125])
    table = task.table(values)
    assert list(table) == ["t", "t:S(1)", "t:S(2)", "t:S(4)"]
    assert table["t"][0] == pytest.approx(1 - (0.5 + 0.25 + 2 * 0.125) / 4)


def test_bags_keep_their_probabilities_whole() -> None:
    """Of a slide there is one answer: float32, not bytes; and its head reads the bag's vector."""
    task = make_task(card("classify", "a", "b", head="bag"))
    assert task.scope == "bag"
    assert task.head(HeadSpec(1, 2, 6))(torch.zeros(1, 6)).shape == (1, 2)
    values = task.quantise(torch.tensor([[0.0, 0.1]])).numpy()
    assert values.dtype == np.float32
    assert task.table(values)["t:b"][0] == pytest.approx(0.5249792)
    assert make_task(card("multilabel", "a", head="bag")).quantise(torch.zeros(1, 1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (card("regress", "a", spread=0.0), "'spread' must be above 0"),
        (card("survive", "a", "b"), "exactly one class"),
        (card("survive", "a", outputs=3, bins=3), "'horizon' above 0"),
        (card("survive", "a", outputs=2, bins=2, edge__1=3.0, edge__2=2.0), "rising 'edge:1' to 'edge:2'"),
        (card("survive", "a", outputs=2), "needs 1 outputs"),
        (card("classify", "a", "b", smoothing=1.0), "'smoothing' is 1"),
        (card("classify", "a", "b", weight__b=-1.0), "a weight is below 0"),
        (card("multilabel", "a", weight__z=1.0), "does not know: 'weight:z'"),
        (card("segment", "a", "b", head="bag"), "needs a 'map' head"),
        (card("classify", "a", "b", head="map"), "needs a 'vector' head"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_is_refused(made: TaskCard, words: str) -> None:
    """One line that names what is wrong."""
    with pytest.raises(ModelError, match=words):
        make_task(made)
