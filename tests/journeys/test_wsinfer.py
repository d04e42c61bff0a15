"""A model of the WSInfer zoo through `run`: the probabilities of a plain script, as GeoJSON and tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import torch
from torchvision import transforms

from helpers.wsinfer_models import COLOURS, small_resnet, write_model
from wsi_mmm import run
from wsi_mmm.engine.stages import context
from wsi_mmm.errors import OptionError
from wsi_mmm.model import script_runner
from wsi_mmm.model.script_runner import ScriptProcess, ScriptRunner
from wsi_mmm.types import F32, U8

CLASSES = ("grade3", "grade4+5", "benign")
TILE = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resnet18 of torchvision as TorchScript with its configuration."""
    return write_model(tmp_path_factory.mktemp("zoo") / "prostate", small_resnet(len(CLASSES)), CLASSES)


@pytest.fixture(scope="module")
def results(model: Path, tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run in this process, in threads."""
    out = tmp_path_factory.mktemp("results")
    report = run(tiny_slide, model, output=out, tissue="none", allow_torchscript=True)
    assert report.exit_code == 0
    [warning] = report.warnings
    assert "TorchScript, which is code" in warning
    assert sum(isinstance(one, ScriptRunner) for one in context._runners.values()) == 1
    return out / "tiny"


def test_probabilities_are_those_of_a_plain_script(results: Path, model: Path, tiny_slide: Path) -> None:
    """OpenSlide, PIL, torchvision's transforms, torch, on the whole tiles of the slide: to 1e-4."""
    table = pq.read_table(results / "tiles.parquet").to_pydict()
    whole = [
        i for i, (x, y) in enumerate(zip(table["x"], table["y"], strict=True)) if x + TILE <= 1536 and y + TILE <= 1152
    ]
    assert len(whole) >= 50
    steps = [transforms.Resize(64), transforms.ToTensor(), transforms.Normalize(**COLOURS)]
    prepare = transforms.Compose(steps)
    network = small_resnet(len(CLASSES))
    with openslide.OpenSlide(tiny_slide) as slide, torch.no_grad():
        tiles = [slide.read_region((table["x"][i], table["y"][i]), 0, (TILE, TILE)).convert("RGB") for i in whole]
        wanted = network(torch.stack([prepare(tile) for tile in tiles])).softmax(1).numpy()
    found = np.stack([np.array(table[f"classify:{name}"])[whole] for name in CLASSES], axis=1)
    assert np.abs(found - wanted).max() < 1e-4
    assert wanted.std(axis=0).min() > 1e-3  # they differ from tile to tile
    likeliest = [table["classify"][i] for i in whole]
    assert likeliest == [CLASSES[number] for number in wanted.argmax(1)]


def test_tiles_are_objects_with_their_class(results: Path) -> None:
    """One rectangle per tile for QuPath, with the probabilities as measurements; no features are published."""
    with gzip.open(results / "result.geojson.gz", "rt") as file:
        features = json.load(file)["features"]
    rows = pq.read_table(results / "tiles.parquet").num_rows
    assert len(features) == rows
    assert {one["properties"]["classification"]["name"] for one in features} <= {*CLASSES}
    assert set(CLASSES) <= set(features[0]["properties"]["measurements"])
    facts = json.loads((results / "slide.json").read_text())
    assert "features" not in facts["files"] and sum(facts["classes"]["classify"].values()) == rows
    [facts] = json.loads((results / "report.json").read_text())["encoder"]
    assert facts["runtime"] == "torchscript" and "of its own" in facts["process"]


def test_a_process_that_is_killed_is_started_again(
    results: Path, model: Path, tiny_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block that was in it fails, in one line, and its slide; the same command again does what is missing."""

    def ask(process: ScriptProcess, tiles: U8) -> F32:
        process._process.kill()
        process._process.wait()
        return whole(process, tiles)

    whole = ScriptProcess.ask
    monkeypatch.setattr(ScriptProcess, "ask", ask)
    monkeypatch.setattr(script_runner, "LOSSES", 1)
    report = run(tiny_slide, model, output=tmp_path, tissue="none", allow_torchscript=True, block_tiles=8)
    assert report.exit_code != 0
    [row] = report.slides
    assert "the process of the model 'prostate' was killed" in row.error and "\n" not in row.error
    assert not (tmp_path / "tiny" / "slide.json").exists()
    monkeypatch.setattr(ScriptProcess, "ask", whole)
    monkeypatch.setattr(script_runner, "LOSSES", 100)
    again = run(tiny_slide, model, output=tmp_path, tissue="none", allow_torchscript=True, block_tiles=8)
    assert again.exit_code == 0
    for name in ("tiles.parquet", "result.geojson.gz"):
        assert (tmp_path / "tiny" / name).read_bytes() == (results / name).read_bytes()


@pytest.mark.slow
def test_a_worker_of_dask_gives_the_same(results: Path, model: Path, tiny_slide: Path, tmp_path: Path) -> None:
    """Byte for byte."""
    report = run(tiny_slide, model, output=tmp_path, tissue="none", allow_torchscript=True, workers=1)
    assert report.exit_code == 0
    for name in ("tiles.parquet", "result.geojson.gz"):
        assert (tmp_path / "tiny" / name).read_bytes() == (results / name).read_bytes()


def test_without_the_word_nothing_is_begun(model: Path, tiny_slide: Path, tmp_path: Path) -> None:
    """One line that says what TorchScript is, and what to add."""
    with pytest.raises(OptionError, match=r"is TorchScript, which is code.*--allow-torchscript"):
        run(tiny_slide, model, output=tmp_path)
    assert not any(tmp_path.iterdir())
