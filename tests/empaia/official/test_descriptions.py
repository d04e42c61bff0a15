"""The official validator accepts the descriptions that we make; our linter closes the gaps that it has."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from helpers.eats import EAD, Judge
from helpers.empaia_eads import BROKEN, GAPS
from wsi_mmm.empaia import lint
from wsi_mmm.empaia.ead import RegionKind, ead
from wsi_mmm.model.card import ModelCard, TaskCard, read_card

pytestmark = pytest.mark.empaia
KINDS = {
    "cells": "detect",
    "gland": "segment",
    "zones": "multisegment",
    "grade": "classify",
    "score": "regress",
    "risk": "survive",
    "marks": "multilabel",
    "image": "reconstruct",
}


def another() -> ModelCard:
    """A model of somebody else, with a task of every kind but that of the default one."""
    tasks = [
        TaskCard(name=name, kind=kind, head="map", outputs=1, classes=("A", "β+", "x y"), colors=((1, 2, 3),) * 3)
        for name, kind in KINDS.items()
    ]
    made = {**read_card("default").model_dump(), "name": "My model (2026)", "tasks": tasks}
    return ModelCard.model_validate(made)


def test_descriptions_of_ours_are_accepted(judge: Judge) -> None:
    """deploy/empaia/ead.json, and those of another model with each shape of regions."""
    shapes: tuple[RegionKind, ...] = ("rectangle", "polygon", "circle")
    made = [ead(another(), vendor="my_hospital", regions=regions) for regions in shapes]
    deployed = json.loads(EAD.read_text(encoding="utf-8"))
    assert judge([("ead", one) for one in (deployed, *made)]) == [None] * 4


def broken(changes: Mapping[str, Callable[[dict[str, Any]], None]]) -> dict[str, dict[str, Any]]:
    """The description of the default model, changed in each way."""
    made = {}
    for what, change in changes.items():
        made[what] = copy.deepcopy(ead(read_card("default")))
        change(made[what])
    return made


def test_what_the_official_validator_refuses_ours_refuses(judge: Judge) -> None:
    """Whatever is broken between its parts, the linter names it; the validator does for all but two."""
    made = broken({what: change for what, (change, _) in BROKEN.items()})
    verdicts = dict(zip(made, judge([("ead", one) for one in made.values()]), strict=True))
    assert {what for what, said in verdicts.items() if said is None} == {"element classes", "nested constraint"}
    assert all(lint.problems(one) for one in made.values())


def test_ours_closes_the_gaps_of_the_official_validator(judge: Judge) -> None:
    """Four rules that the validator does not check are the linter's: when one is broken, it names that one alone."""
    made = broken(GAPS)
    assert judge([("ead", one) for one in made.values()]) == [None] * 4
    assert [len(lint.problems(one)) for one in made.values()] == [1] * 4
