"""The `classify` task and the registry of kinds."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks import TASK_KINDS, make_task

CARD = TaskCard(
    name="stain", kind="classify", head="vector", outputs=2, classes=("a", "b"), colors=((1, 2, 3), (4, 5, 6))
)


def test_the_table_holds_the_winner_and_probabilities_that_add_up_to_one() -> None:
    """Class index and one column per class."""
    table = make_task(CARD).table(np.array([[255, 0], [60, 180]], np.uint8))
    assert table["stain"].tolist() == [0, 1]
    assert table["stain:b"].tolist() == [0.0, 0.75]
    assert (table["stain:a"] + table["stain:b"] == 1).all()


def test_random_predictions_lose_about_one() -> None:
    """The loss is in units of ln(classes); unknown truth adds nothing."""
    import torch

    task = make_task(CARD)
    assert abs(float(task.loss(torch.zeros(4, 2), torch.tensor([0, 1, 0, -1]))) - 1.0) < 1e-5
    assert float(task.loss(torch.ones(1, 2), torch.tensor([-1]))) == 0.0


def test_figures_are_of_what_is_known() -> None:
    """Three right of four, one class half right: accuracy plain and balanced, F1, and ranking with a tie."""
    rows = [np.array(v, np.uint8) for v in ([200, 55], [200, 55], [55, 200], [200, 55])]
    figures = make_task(CARD).metrics([*zip([0, 0, 1, 1], rows, strict=True), (-1, rows[0])])
    assert figures.pop("f1") == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert figures.pop("ap") == pytest.approx((2 / 3 + (1 + 2 / 4) / 2) / 2)
    assert figures == {"accuracy": 0.75, "balanced_accuracy": 0.75, "auroc": 0.75}
    assert make_task(CARD).metrics([(-1, rows[0])]) == {}


def test_the_registry_names_its_kinds_and_refuses_what_does_not_fit() -> None:
    """Unknown kind, unknown parameter, wrong head or number of outputs: one line each."""
    assert {"classify", "instances", "multilabel", "regress", "segment", "survive"} <= set(TASK_KINDS)
    for change, words in (
        ({"kind": "dream"}, "unknown kind 'dream'"),
        ({"params": {"depth": 1}}, "does not know"),
        ({"head": "map"}, "needs a 'vector' head"),
        ({"outputs": 3}, "needs 2 outputs"),
        ({"kind": "instances", "head": "map"}, "needs 6 outputs"),
    ):
        with pytest.raises(ModelError, match=words):
            make_task(CARD.model_copy(update=change))
