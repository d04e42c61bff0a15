"""The description of an app is sound, made from the model's card, and the linter knows the rules between its parts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers.empaia_eads import BROKEN
from helpers.empaia_schemas import SCHEMAS, ead_problems
from wsi_mmm.cli.main import app
from wsi_mmm.empaia import lint
from wsi_mmm.empaia.ead import class_values, ead, ead_json
from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import ModelCard, TaskCard, read_card

DEPLOYED = Path(__file__).parents[2] / "deploy" / "empaia" / "ead.json"
KINDS = (
    "instances",
    "detect",
    "segment",
    "multisegment",
    "classify",
    "regress",
    "survive",
    "multilabel",
    "reconstruct",
)
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
TASKS = st.builds(
    lambda name, kind, classes: TaskCard(
        name=name, kind=kind, head="map", outputs=1, classes=tuple(classes), colors=((1, 2, 3),) * len(classes)
    ),
    NAMES,
    st.sampled_from(KINDS),
    st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4),
)


def _default() -> dict[str, Any]:
    return copy.deepcopy(ead(read_card("default")))


def test_the_deployed_one_is_what_the_command_makes(tmp_path: Path) -> None:
    """deploy/empaia/ead.json is the output of `wsi-mmm empaia init`, and valid by schema and linter."""
    done = CliRunner().invoke(app, ["empaia", "init", "default", "-o", str(tmp_path / "app")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "app" / "ead.json").read_text(encoding="utf-8")
    assert text == DEPLOYED.read_text(encoding="utf-8")
    assert ead_problems(json.loads(text)) == [] == lint.problems(json.loads(text))


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    """A file where the folder should be is an error that names it."""
    (tmp_path / "app").write_text("x")
    done = CliRunner().invoke(app, ["empaia", "init", "-o", str(tmp_path / "app")])
    assert done.exit_code == 1 and "ead.json: file exists; choose another folder" in done.output


def test_the_default_model_offers_what_it_finds() -> None:
    """Nuclei with classes, confidences, counts, densities and a map; the stain as class; by mode."""
    modes = _default()["modes"]
    shared = {"tissue", "nuclei_objects", "nuclei_classes", "nuclei_confidences", "nuclei_map"}
    shared |= {"stain_classes", "stain_slide_class"}
    assert set(modes["standalone"]["outputs"]) == shared | {"nuclei_counts", "nuclei_densities"}
    assert set(modes["preprocessing"]["outputs"]) == shared | {"nuclei_slide_count", "nuclei_slide_density"}


def test_classes_are_those_that_will_be_posted() -> None:
    """The names that objects get are in the tree, in the card's order."""
    card = read_card("default")
    values = class_values(card, card.task("stain"))
    assert [value.rsplit(".", 1)[1] for value in values] == ["H_and_E", "IHC", "Giemsa", "other"]
    made = ead(card)
    made["rendering"]["annotations"] = [{"class_value": value, "color": "#000000"} for value in values]
    assert lint.problems(made) == []


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=40), st.lists(TASKS, max_size=4, unique_by=lambda task: task.name))
def test_any_card_is_a_valid_description_or_a_model_error(name: str, tasks: list[TaskCard]) -> None:
    """Whatever names a card has: the schema and the linter accept what is made, or a ModelError says why not."""
    card = ModelCard.model_validate({**read_card("default").model_dump(), "name": name, "tasks": tasks})
    try:
        made = ead(card, regions="polygon")
    except ModelError:
        return
    assert ead_problems(made) == [] == lint.problems(made)
    json.loads(ead_json(made))


def test_two_tasks_of_one_name_are_refused() -> None:
    """Names that differ only in what the platform drops would share an output."""
    task = read_card("default").task("nuclei").model_dump()
    tasks = [{**task, "name": "a-b"}, {**task, "name": "a_b"}]
    card = ModelCard.model_validate({**read_card("default").model_dump(), "tasks": tasks})
    with pytest.raises(ModelError, match="a_b_objects"):
        ead(card)


def test_the_global_classes_are_those_published() -> None:
    """The one global class that the linter knows is the one there is."""
    published = json.loads((SCHEMAS / "org.empaia.global.v1.json").read_text(encoding="utf-8"))
    assert (published["namespace"], list(published["classes"])) == (lint.GLOBAL, ["roi"])


@pytest.mark.parametrize("what", BROKEN)
def test_the_linter_names_what_is_broken(what: str) -> None:
    """Each rule between the parts, those that the official validator leaves out too, is named when it is broken."""
    change, words = BROKEN[what]
    made = _default()
    change(made)
    assert any(words in line for line in lint.problems(made))
