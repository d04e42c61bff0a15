"""What a Python user hands in: every wrong option is one line, before any slide is begun."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wsi_mmm
from wsi_mmm import api, requests
from wsi_mmm.engine.output_lock import claimed
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.stages.prepare import prepare
from wsi_mmm.engine.units import WorkUnit
from wsi_mmm.errors import OptionError, OutputError, WsiError
from wsi_mmm.model.card import model_path
from wsi_mmm.model.recipe import EncoderRecipe
from wsi_mmm.model.registry import describe_licence, find_entry
from wsi_mmm.options import make_options
from wsi_mmm.tiles.grid import tile_xy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mpp": "0.5"}, "option mpp must be a number, not '0.5'"),
        ({"tile_size": 256.0}, "option tile_size must be a whole number"),
        ({"force": 1}, "option force must be true or false"),
        ({"batch_size": True}, "option batch_size must be a whole number"),
        ({"tissue": 3}, "option tissue must be a path or a word"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"min_tissue": 7}, "min_tissue is a share between 0 and 1"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"device": "cuda:99"}, "this machine has no device 'cuda:99'"),
        ({"device": "mps:7"}, "choose --device auto or cpu"),
        ({"tile_size": 0}, "tile size 0 px and overlap 0 px do not fit"),
        ({"tile_size": -256}, "tiles have 16 to 8192 px"),
        ({"tile_size": 10**6}, "tiles have 16 to 8192 px"),
        ({"tile_size": 250}, "tile size must be a multiple of 32 px"),
        ({"tile_size": 256, "overlap": 256}, "overlap by less than themselves"),
        ({"reader": "best"}, "there is no reader 'best'"),
        ({"workers": "2"}, "workers must be a whole number"),
        ({"nonsense": 1}, "unknown option 'nonsense'; known: allow_torchscript"),
        ({"tasks": "nucleus"}, "no task 'nucleus'"),
    ],
)
def test_a_wrong_option_is_said_before_anything_runs(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    """OptionError names the option, what it must be and what was given; nothing is written."""
    with pytest.raises(OptionError) as caught:
        wsi_mmm.run("a.svs", output=tmp_path / "out", **options)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, -1, 10**6])
def test_a_tile_size_that_cannot_be_is_said_once_by_embed(size: int, tmp_path: Path) -> None:
    """Before any slide, as run does."""
    with pytest.raises(OptionError, match="tiles have 16 to 8192 px"):
        wsi_mmm.embed("a.svs", output=tmp_path / "out", tile_size=size)


def test_a_model_whose_tasks_cannot_be_made_is_said_once(tmp_path: Path) -> None:
    """Its card is read before any slide is begun, not by each of them."""
    shutil.copytree(model_path("default"), tmp_path / "model")
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    card["tasks"][0]["kind"] = "guess"
    (tmp_path / "model" / "card.json").write_text(json.dumps(card))
    with pytest.raises(WsiError, match="guess"):
        wsi_mmm.run(["a.svs", "b.svs"], str(tmp_path / "model"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"mpp": 1.0, "tile_size": 96, "overlap": 16}, {"tissue": "none"}])
def test_stream_tiles_gives_the_tiles_of_embed_in_their_sequence(
    options: dict[str, Any], tiny_slide: Path, tmp_path: Path
) -> None:
    """By default and with the same options: one can be put beside the other."""
    request = api.embed_request(tiny_slide, output=tmp_path, **options)
    with closing(UnitContext(WorkUnit("plan", request.tasks[0]))) as ctx:
        plan, _ = prepare(ctx)
    assert plan is not None
    named = {"size" if name == "tile_size" else name: value for name, value in options.items()}
    streamed = [batch.xy for batch in wsi_mmm.stream_tiles(tiny_slide, batch_size=7, **named)]
    assert np.array_equal(np.concatenate(streamed), tile_xy(plan.grid, plan.index))


def test_what_a_model_did_not_learn_at_is_said_before_a_run(tmp_path: Path) -> None:
    """Off by more than a tenth, either way; by --mag as by --mpp; for the encoder of a model, too."""
    learnt = requests.model_recipe("default", None, make_options({}))
    assert learnt.warnings() == () and learnt.model_mpp == learnt.mpp
    for mpp, words in ((2 * learnt.mpp, "2 times smaller"), (learnt.mpp / 2, "2 times larger")):
        [text] = requests.model_recipe("default", None, make_options({"mpp": mpp})).warnings()
        assert words in text and f"use --mpp {learnt.mpp:g}" in text and "default learnt at" in text
    assert requests.model_recipe("default", None, make_options({"mpp": 1.05 * learnt.mpp})).warnings() == ()
    assert len(requests.encoder_recipe("default", None, make_options({"mpp": 1.0})).warnings()) == 1
    assert requests.encoder_recipe("resnet18", "random", make_options({"mpp": 9.0})).warnings() == ()


def test_a_models_encoder_works_at_the_mpp_that_it_learnt_at(tmp_path: Path) -> None:
    """Nothing is warned of unless a user asks for another; bare encoders of no model take 0.5."""
    shutil.copytree(model_path("default"), tmp_path / "model")
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    (tmp_path / "model" / "card.json").write_text(json.dumps({**card, "mpp": 1.25}))
    recipe = requests.encoder_recipe(str(tmp_path / "model"), None, make_options({}))
    assert (recipe.mpp, recipe.tile, recipe.overlap, recipe.warnings()) == (1.25, 256, 0, ())
    asked = requests.encoder_recipe(str(tmp_path / "model"), None, make_options({"mpp": 0.5}))
    assert asked.mpp == 0.5 and len(asked.warnings()) == 1
    assert requests.encoder_recipe("resnet18", "random", make_options({})).mpp == 0.5


@pytest.mark.parametrize(("name", "warned"), [("uni", True), ("h-optimus-0", False), ("resnet18", None)])
def test_only_a_licence_that_forbids_something_is_a_warning(name: str, warned: bool | None) -> None:
    """One that permits commercial use is said, too; of encoders that are not in the list nothing is known."""
    entry = find_entry(name)
    network = entry.recipe if entry else EncoderRecipe(name=name, architecture=name)
    recipe = Recipe(name, "h", (), 0.5, 224, 0, encoder=True, network=network)
    lines = (describe_licence(entry),) if entry else ()
    assert (recipe.warnings(), recipe.remarks()) == ((lines, ()) if warned else ((), lines))


def test_an_unknown_export_is_said_before_anything_runs(tmp_path: Path) -> None:
    """Not after the features of a thousand slides."""
    with pytest.raises(OptionError, match="unknown export 'csv'"):
        wsi_mmm.embed("a.svs", output=tmp_path / "out", export="csv")
    assert not (tmp_path / "out").exists()


def test_an_empty_output_is_refused() -> None:
    """Results would lie about in whatever folder one stands in."""
    with pytest.raises(OptionError, match="the output is empty"):
        wsi_mmm.run("a.svs", output="")


def test_a_cache_that_cannot_be_written_is_said_before_anything_runs(tmp_path: Path) -> None:
    """As it is for the output: not once per slide."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to .*taken"):
        wsi_mmm.run("a.svs", output=tmp_path / "out", cache=tmp_path / "taken")


def test_paths_do_not_depend_on_the_folder_a_worker_stands_in(in_tmp: Path) -> None:
    """Slide, mask, tissue, cache and output are absolute once a request is made."""
    recipe = requests.model_recipe("default", "stain", make_options({"tissue": Path("t.geojson"), "cache": "c"}))
    assert (recipe.options.tissue, recipe.options.cache) == (str(in_tmp / "t.geojson"), str(in_tmp / "c"))
    (in_tmp / "m.csv").write_text("slide,mask\na.svs,m.png\n")
    [task] = requests.request_run("m.csv", recipe, "out").tasks
    assert (task.uri, task.mask) == (str(in_tmp / "a.svs"), str(in_tmp / "m.png"))
    assert task.output == str(in_tmp / "out" / "a")


def test_a_home_folder_is_meant_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted or in a settings file, ~ reaches the program: results belong below the home, not in a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for output in ("~/results", Path("~/results/")):
        assert api.run_request("a.svs", output=output, device="cpu").output == str(tmp_path / "results")


def test_a_second_run_over_the_same_slides_is_refused(tmp_path: Path) -> None:
    """While a run works in an output folder, another over the same slides is one line: wait, or go elsewhere."""
    with claimed(str(tmp_path), ["a"]), pytest.raises(OutputError, match="another run is working"):
        wsi_mmm.run("a.svs", output=tmp_path)


def test_a_slide_that_another_run_holds_fails_alone(tmp_path: Path) -> None:
    """The other slides of the second run go on."""
    with claimed(str(tmp_path), ["a"]):
        rows = wsi_mmm.run(["a.svs", "b.svs"], output=tmp_path, tasks="stain").slides
    assert "another run" in (rows[0].error or "") and "no such file" in (rows[1].error or "")


@pytest.mark.parametrize(("options", "threads"), [({"workers": 2}, 4), ({"workers": 2, "threads": 7}, 7), ({}, None)])
def test_local_workers_share_the_processors(
    options: dict[str, Any], threads: int | None, tiny_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on eight cores run the model on four threads each; --threads wins."""
    monkeypatch.setattr(requests, "cpu_count", lambda: 8)
    made = api.run_request(tiny_slide, output=tmp_path, **options)
    assert made.recipe.options.threads == threads and all(task.recipe.options.threads == threads for task in made.tasks)
