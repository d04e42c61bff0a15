"""The configuration of a training: what it is without words, what may be set, and that every error names the fix."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from helpers.annotation_targets import ENCODER
from wsi_mmm.errors import ConfigError, ModelError, OptionError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks import make_task
from wsi_mmm.tasks.segment import Segment
from wsi_mmm.training.config import TrainConfig, json_schema, model_card, parse
from wsi_mmm.training.examples import EXAMPLES


def small(**more: Any) -> dict[str, Any]:
    """The least that is a training, with ``more``."""
    task = {"name": "t", "kind": "classify", "classes": ["a", "b"]}
    data = {"name": "d", "kind": "class-folders", "task": "t", "path": "there"}
    return {"task": [task], "data": [data], **more}


def bags(scope: str, kind: str) -> dict[str, Any]:
    """A task of ``scope`` with data of ``kind``."""
    task = {"name": "t", "kind": "classify", "classes": ["a", "b"], "scope": scope}
    table = {"table": "t.csv", "truth": {"t": {"columns": ["t"]}}}
    data: dict[str, Any] = {"name": "d", "kind": kind, "slides": table}
    return {"task": [task], "data": [data | ({"features": "{slide}.h5"} if kind == "bags" else {})]}


def test_what_is_not_said_is_a_sensible_training() -> None:
    """One task and one data set are enough; nothing leaves the machine unless asked."""
    config = parse(small())
    assert (config.steps, config.split.val, config.split.test) == (1000, 0.2, 0.0)
    assert config.sampling.policy == "balanced" and config.strategy.name == "accumulate"
    assert config.tracking.tensorboard
    assert not (config.tracking.wandb or config.tracking.mlflow or config.tracking.images)
    (card,) = config.task_cards()
    assert (card.head, card.outputs, len(card.colors)) == ("vector", 2, 2)
    model = model_card(config, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert model.mean == (0.5, 0.5, 0.5) and model.tasks == (card,)


def test_settings_are_put_on_top() -> None:
    """Numbers, lists and plain words; items of lists by name or number; a table that is not there yet."""
    config = parse(
        small(),
        ["steps=5", "out=runs/x y", "data.d.batch=3", "task.0.weight=0.5", "optim.rate=1e-4", "optim.betas=[0.8, 0.9]",
         "model.encoder.name=resnet34", 'model.name="7"'],
    )  # fmt: skip
    assert (config.steps, config.out, config.data[0].batch, config.task[0].weight) == (5, "runs/x y", 3, 0.5)
    assert (config.optim.rate, config.optim.betas) == (1e-4, (0.8, 0.9))
    assert (config.model.encoder.name, config.model.name) == ("resnet34", "7")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps", "give key=value"),
        ("=3", "give key=value"),
        ("data.nobody.batch=3", "there is no 'nobody'"),
        ("data=3", "data: "),
        ("data.d=3", "name a field after the item"),
        ("steps.more=3", "nothing below 'steps'"),
    ],
)
def test_a_setting_that_fits_nowhere_is_named(setting: str, words: str) -> None:
    """One line with the setting and what to write instead."""
    with pytest.raises((OptionError, ConfigError), match=words):
        parse(small(steps=5), [setting])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "task: field required"),
        (small(stepps=3), "stepps: there is no such option; wsi-mmm train --schema lists them"),
        (small(optim={"ratte": 1}), r"optim\.ratte: there is no such option"),
        (small(steps=0), "steps: .*greater than or equal to 1"),
        (small(task=[{"name": "t", "kind": "guess", "classes": ["a"]}]), "unknown kind 'guess'; known: classify"),
        (small(task=[{"name": "t t", "kind": "classify", "classes": ["a"]}]), r"task\.0\.name: "),
        (small(task=small()["task"] * 2), r"two \[\[task\]\] are called 't'"),
        (small(data=small()["data"] * 2), r"two \[\[data\]\] are called 'd'"),
        (small(data=[{"name": "d", "kind": "folder"}]), r"data\.0: .*'kind'.*'class-folders'"),
        (small(data=[{**small()["data"][0], "task": "u"}]), "data 'd' is of task 'u'; tasks are: t"),
        (small(task=[*small()["task"], {"name": "u", "kind": "segment", "classes": ["a"]}]), "no data is of task 'u'"),
        (small(validation={"best": "u.f1"}), r"validation\.best is 'u\.f1': give task\.metric; tasks are: t"),
        (small(validation={"best": "t"}), r"give task\.metric"),
        (small(validation={"best": "t.f2"}),
         r"validation\.best is 't\.f2': a task of kind 'classify' gives accuracy, balanced_accuracy, f1, auroc, ap"),
        (small(validation={"best": "t.auroc", "lower": True}),
         r"t\.auroc is better the higher it is: set validation\.lower = false"),
        (small(task=[{"name": "t", "kind": "regress", "classes": ["a"]}], validation={"best": "t.mae"}),
         r"t\.mae is better the lower it is: set validation\.lower = true"),
        (small(validation={"patience": 2}), r"patience wants .* give validation\.best"),
        (small(sampling={"fraction_of": ["e"]}), "fraction_of names 'e'; data sets are: d"),
        (small(sampling={"policy": "random"}), r"sampling\.policy: .*'balanced'"),
        (small(model={"tile_size": 100}), r"model\.tile_size: .*multiple of 32"),
        (small(model={"tile_size": 32, "overlap": 32}), "overlap is 32 px of tiles of 32: give less"),
        (small(augment={"blur": 2}), "'blur' is a share of the pictures: give 0 to 1"),
        (bags("tile", "bags"), "data 'd' holds bags, task 't' is of scope 'tile': set its scope to \"bag\""),
        (bags("bag", "slide-table"), "holds tiles, task 't' is of scope 'bag': give it data of kind bags or tile-bags"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_fix(raw: dict[str, Any], words: str) -> None:
    """One line that says where and what to write instead."""
    with pytest.raises(ConfigError, match=words) as caught:
        parse(raw, source="my.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"kind": "segment", "classes": ["a"], "scope": "bag"}, "'segment' answers for pixels, not for bags"),
        (
            {"kind": "instances", "classes": ["a", "b"], "params": {"other": 2}},
            "'other' is 2: give a number from -1 to 1",
        ),
        ({"kind": "classify", "classes": ["a"], "params": {"smoothing": 2}}, "give a share from 0"),
        (
            {"kind": "classify", "classes": ["a"], "params": {"weight:b": 2}},
            "params has 'weight:b', which 'classify' does not know: it knows smoothing, weight:a",
        ),
    ],
)
def test_a_task_that_cannot_be_is_named(task: dict[str, Any], words: str) -> None:
    """Heads and parameters are checked when the cards are made, before any data is read."""
    scope = "bags" if task.get("scope") == "bag" else "class-folders"
    whole = bags("bag", "bags") if scope == "bags" else small()
    config = parse({**whole, "task": [{"name": "t", **task}]})
    with pytest.raises((ConfigError, ModelError), match=words):
        config.task_cards()


def test_the_schema_accepts_the_example_and_refuses_a_misspelling() -> None:
    """--schema is a JSON schema by which editors find what `parse` finds, and the example is a training."""
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    example = tomllib.loads(EXAMPLES["pictures"])
    jsonschema.validate(example, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**example, "stepps": 3}, schema)
    assert parse(example).task[1].name == "gland"


def test_a_configuration_survives_json() -> None:
    """What is written into a card is read back as the same configuration."""
    config = parse(tomllib.loads(EXAMPLES["pictures"]), ["model.mean=[0.5,0.5,0.5]", f"model.encoder={_toml(ENCODER)}"])
    text = json.dumps(config.model_dump(mode="json"))
    assert TrainConfig.model_validate(json.loads(text)) == config
    assert parse(json.loads(text)) == config


def _toml(encoder: dict[str, Any]) -> str:
    return f'{{name = "{encoder["name"]}", args = {{channels = {encoder["args"]["channels"]}}}}}'


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("pipelines/**/*.toml")), ids=lambda p: p.name)
def test_the_recipes_are_configurations(path: Path) -> None:
    """Every recipe of pipelines/ is a training by the schema and by its tasks."""
    raw = tomllib.loads(path.read_text())
    jsonschema.validate(raw, json.loads(json.dumps(json_schema())))
    assert parse(raw).task_cards()


@pytest.mark.parametrize(
    ("classes", "more", "hidden"),
    [
        (("gland", "stroma"), {}, -1),
        (("gland", "Background"), {}, 1),
        (("background", "gland"), {}, 0),
        (("background", "gland"), {"background": ""}, -1),
        (("other", "gland"), {"background": "other"}, 0),
        (("other", "gland"), {"params": {"background": 1}}, 1),
        (("background", "gland"), {"params": {"background": -1}}, -1),
    ],
)
def test_no_class_is_the_background_unless_it_says_so(
    classes: tuple[str, ...], more: dict[str, Any], hidden: int
) -> None:
    """The card of a `segment` task always names the class that is not drawn; the first one is none by itself."""
    task = {"name": "t", "kind": "segment", "classes": list(classes), **more}
    data = {"name": "d", "kind": "image-masks", "task": "t", "images": "i", "masks": "m"}
    (card,) = parse(small(task=[task], data=[data])).task_cards()
    made = make_task(card)
    assert isinstance(made, Segment) and card.params["background"] == made.background == hidden


def test_cards_without_a_background_keep_their_meaning() -> None:
    """Models of earlier versions do not name it: there the first class is not drawn."""
    colors = ((0, 0, 0), (1, 1, 1))
    card = TaskCard(name="t", kind="segment", head="map", outputs=2, classes=("a", "b"), colors=colors)
    made = make_task(card)
    assert isinstance(made, Segment) and made.background == 0


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"kind": "segment", "classes": ["gland"]}, "chooses among classes and has only one"),
        ({"kind": "segment", "classes": ["a", "b"], "background": "c"}, "background 'c' is none of a, b"),
        ({"kind": "segment", "classes": ["a", "b"], "params": {"background": 2}}, "the number of a class, or -1"),
        ({"kind": "instances", "classes": ["a"], "background": "a"}, "only 'segment' has a background"),
    ],
)
def test_a_background_that_cannot_be_is_said(task: dict[str, Any], words: str) -> None:
    """One line that names the task and the fix."""
    data = {"name": "d", "kind": "image-masks", "task": "t", "images": "i", "masks": "m"}
    with pytest.raises(ConfigError, match=words):
        parse(small(task=[{"name": "t", **task}], data=[data])).task_cards()
