"""Models on storage: copied once, checked, and never another one than was asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import wsi_mmm
from helpers.moto import moto_bucket
from wsi_mmm.engine.stages import context
from wsi_mmm.errors import ModelError, WsiError
from wsi_mmm.model import fetch
from wsi_mmm.model.card import CARD, WEIGHTS
from wsi_mmm.model.fetch import fetch_model, forget_model
from wsi_mmm.options import RunOptions
from wsi_mmm.requests import encoder_recipe, model_recipe
from wsi_mmm.storage import store

URI = "s3://models/small"


@pytest.fixture
def stored(small_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A model in a bucket, and a user's cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetch, "_known", {})
    with moto_bucket("models", monkeypatch):
        for name in (CARD, WEIGHTS):
            store.write_bytes(f"{URI}/{name}", (small_model / name).read_bytes())
        yield URI
        context.release()


def test_a_model_is_copied_once(stored: str, small_model: Path, tmp_path: Path) -> None:
    """Its files are those of the bucket; another process finds them there and does not read the weights again."""
    folder = Path(fetch_model(stored, str(tmp_path / "kept")))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: (small_model / name).read_bytes() for name in (CARD, WEIGHTS)
    }
    store.delete(f"{stored}/{WEIGHTS}")
    forget_model(stored)
    assert Path(fetch_model(stored, str(tmp_path / "kept"))) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_name_or_folder_stays_what_it_is(small_model: Path) -> None:
    """Only what has a scheme is looked for on storage; file:// is a folder."""
    assert fetch_model("default", None) == "default"
    assert fetch_model("hf-hub:timm/resnet18", None) == "hf-hub:timm/resnet18"
    assert fetch_model(small_model.as_uri(), None) == str(small_model)


def test_it_runs_as_the_folder_does(stored: str, small_model: Path, tiny_slide: Path, tmp_path: Path) -> None:
    """The same identity, so the same cache, and the same bytes."""
    for recipe in (model_recipe, encoder_recipe):
        here, there = (recipe(name, None, RunOptions()) for name in (str(small_model), stored))
        assert here.model_hash == there.model_hash
    results = []
    for name in (stored, str(small_model)):
        report = wsi_mmm.run(tiny_slide, name, output=tmp_path / str(len(results)), gzip=False)
        assert report.exit_code == 0, report.slides[0].error
        results.append((tmp_path / str(len(results)) / report.slides[0].id / "result.geojson").read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (CARD, b"{", "cannot be read as JSON"),
        (CARD, None, "no model at s3://models/small"),
        (WEIGHTS, b"other", "are not those its card was written for"),
        (WEIGHTS, None, "model.safetensors: no such object"),
    ],
)
def test_what_is_broken_is_told_in_a_line(
    stored: str, tmp_path: Path, name: str, data: bytes | None, words: str
) -> None:
    """And leaves nothing behind that a later look would take for a model."""
    if data is None:
        store.delete(f"{stored}/{name}")
    else:
        store.write_bytes(f"{stored}/{name}", data)
    with pytest.raises(WsiError, match=words) as error:
        fetch_model(stored, str(tmp_path / "kept"))
    assert "\n" not in str(error.value)
    assert list((tmp_path / "kept" / "models").iterdir()) == []


def test_a_card_without_a_hash_is_refused(stored: str, tmp_path: Path) -> None:
    """Whether its weights arrived whole could not be known."""
    card = json.loads(store.read_bytes(f"{stored}/{CARD}"))
    store.write_bytes(f"{stored}/{CARD}", json.dumps({**card, "weights_sha256": ""}).encode())
    with pytest.raises(ModelError, match="names no weights_sha256"):
        fetch_model(stored, str(tmp_path))


def test_a_worker_refuses_another_model_than_the_run_began_with(stored: str, small_model: Path) -> None:
    """One of the same name: in a folder, or in the bucket, where it may have changed since."""
    recipe = model_recipe(stored, None, RunOptions())
    for name in (stored, str(small_model)):
        with pytest.raises(ModelError, match="is not the one the run was begun with"):
            context.recipe_tasks(dataclasses.replace(recipe, model=name, model_hash="0" * 64))
    assert [task.info.name for task in context.recipe_tasks(recipe)] == list(recipe.tasks)
