"""The few-shot commands: what they print, what they leave, how they end. Features are made up, in two clouds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from shapely.geometry import box
from typer.testing import CliRunner, Result

from helpers.annotation_targets import geojson
from wsi_mmm import api
from wsi_mmm.cli.main import app
from wsi_mmm.outputs.exports import write_features

FACTS = {"encoder": "small", "model_hash": "h", "mpp": 0.5, "patch_size": 64, "patch_size_level0": 128}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Six slides of 20 tiles: the left ones far from the right ones, outlined as "a" and "b"; a table of slides."""
    for number in range(6):
        rng = np.random.default_rng(number)
        side = np.arange(20) % 2
        vectors = rng.normal(size=(20, 8)) + side[:, None] * np.array([6.0] * 4 + [-6.0] * 4) + number % 2 * 3
        coords = np.stack([side * 6400 + np.arange(20) * 128, np.zeros(20, int)], axis=1)
        write_features(f"{tmp_path}/emb/s{number}/features.zarr", vectors.astype(np.float32), coords, FACTS)
        (tmp_path / "ann").mkdir(exist_ok=True)
        geojson(tmp_path / f"ann/s{number}.geojson", [("a", box(0, 0, 6400, 900)), ("b", box(6400, 0, 12800, 900))])
    with (tmp_path / "slides.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide", "grade"), *((f"s{n}", ["low", "high"][n % 2]) for n in range(6))])
    return tmp_path


def invoke(*arguments: str | Path) -> Result:
    """The result of ``wsi-mmm fewshot ARGUMENTS``; an exception that no command may let out fails the test."""
    result = CliRunner().invoke(app, ["fewshot", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_fit_and_predict_print_tables(study: Path) -> None:
    """A head of tiles: how good it is on what it has not seen; then an answer and a table per slide."""
    fitted = invoke("fit", study / "emb", "--labels", study / "ann", "-o", study / "head", "--head", "knn")
    lines = fitted.stdout.splitlines()
    assert fitted.exit_code == 0 and lines[0].split("\t") == ["head", "balanced accuracy", "AUROC", "folds", "examples"]
    assert lines[1].split("\t")[0] == "knn (kept)" and float(lines[1].split("\t")[1]) > 0.9
    assert lines[2:] == ["judged on slides not learnt from", f"head {study}/head"]
    said = invoke("predict", study / "emb", "--head", study / "head", "-o", study / "out").stdout.splitlines()
    assert len(said) == 7 and all(Path(line.split("\t")[3]).is_file() for line in said[1:])


def test_they_speak_json(study: Path) -> None:
    """An object per head that was tried, the kept one marked; an object per slide."""
    arguments = ("--labels", study / "slides.csv", "--column", "grade", "-o", study / "head", "--head", "knn", "--json")
    (found,) = (json.loads(line) for line in invoke("fit", study / "emb", *arguments).stdout.splitlines())
    assert found["kind"] == "knn" and found["kept"] is True and found["figures"]["examples"] == 6
    said = invoke("predict", study / "emb", "--head", study / "head", "--json").stdout.splitlines()
    assert [json.loads(line)["answer"] for line in said] == ["low", "high"] * 3


def test_mistakes_are_one_line(study: Path) -> None:
    """No features, no annotations, an unknown kind: exit codes 1 and 2, the fix in the line."""
    for arguments, words in (
        (("fit", study / "ann", "--labels", study / "ann"), "wsi-mmm embed makes them"),
        (("fit", study / "emb", "--labels", study / "emb"), "holds no <slide>.geojson"),
        (("predict", study / "emb", "--head", study / "ann"), "ann"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1 and words in result.stderr and result.stderr.count("\n") == 1
    assert invoke("fit", study / "emb", "--labels", study / "ann", "--head", "svm").exit_code == 2
    assert "Examples:" in invoke("fit", "--help").stdout


def test_the_api_fits_the_same_head(study: Path) -> None:
    """`fit_head` gives what the command prints."""
    (found,) = api.fit_head(study / "emb", study / "ann", output=study / "head", head="knn", classes=["a", "b"])
    assert found.kept and found.figures["balanced_accuracy"] > 0.9
