"""Extensions by entry points: a real package is installed with pip, and every kind of extension is used through it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from wsi_mmm import plugins
from wsi_mmm.annotations import parse_shapes
from wsi_mmm.errors import ModelError, OptionError, PluginError
from wsi_mmm.model.card import model_path
from wsi_mmm.slides.registry import find_reader
from wsi_mmm.tasks import find_kind
from wsi_mmm.types import U8

ROOT = Path(__file__).resolve().parents[1]
TILE = 128
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs ``wsi-mmm`` with the example plug-in installed, in a folder of its own."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "tests" / "plugin_package", source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, timeout=120)
    env = {**os.environ, "PYTHONPATH": f"{target}:{ROOT}", "OMP_NUM_THREADS": "1"}

    def call(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "wsi_mmm", *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=250)

    return call


@pytest.fixture
def picture(tmp_path: Path) -> U8:
    """A picture of noise with a dark rectangle, as picture.npy in the test's folder."""
    pixels = np.random.default_rng(3).integers(120, 256, (300, 420, 3)).astype(np.uint8)
    pixels[40:200, 100:260] = 20
    np.save(tmp_path / "picture.npy", pixels)
    return pixels


def test_a_reader_a_task_and_an_executor_of_a_plugin_run_together(run: Run, picture: U8, tmp_path: Path) -> None:
    """Dark pixels of a .npy picture, counted per tile through the serial executor, equal numpy's count."""
    model = tmp_path / "model"
    shutil.copytree(model_path("default"), model)
    card = json.loads((model / "card.json").read_text())
    card["tasks"].append(
        {"name": "dark", "kind": "dark-pixels", "head": "pixels", "outputs": 1, "classes": ["dark"],
         "colors": [[0, 0, 0]], "params": {"below": 100}}
    )  # fmt: skip
    (model / "card.json").write_text(json.dumps(card))
    sizes = ("--mpp-override", "0.5", "--mpp", "0.5", "--tile-size", TILE, "--overlap", 0, "--tissue", "none")
    words = ("run", tmp_path, "-o", "out", "-m", model, "--task", "dark", "--scheduler", "one-thread://", *sizes)
    done = run(*map(str, words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "out" / "picture" / "tiles.parquet").to_pydict()
    padded = np.full((3 * TILE, 4 * TILE, 3), 255, np.uint8)
    padded[:300, :420] = picture
    want = [int((padded[y : y + TILE, x : x + TILE].mean(2) < 100).sum()) for x, y in zip(table["x"], table["y"])]  # noqa: B905
    assert table["dark"] == want and sum(want) == 160 * 160
    assert json.loads((tmp_path / "out" / "picture" / "slide.json").read_text())["reader"] == "npy"


def test_an_encoder_and_an_annotation_format_of_a_plugin(run: Run, picture: U8, tmp_path: Path) -> None:
    """Features of an encoder without weights, only on the tiles that a file of boxes asks for."""
    (tmp_path / "roi.txt").write_text("boxes\nroi 0 0 120 120\n")
    sizes = ("--mpp-override", "0.5", "--tile-size", TILE, "--tissue", "roi.txt")
    done = run("embed", "picture.npy", "-o", "out", "--encoder", "two-strides", *map(str, sizes), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "out" / "picture" / "tiles.parquet").to_pydict()
    assert list(zip(table["x"], table["y"], strict=True)) == [(0, 0)]


def test_names_that_nobody_offers_are_named_with_those_there_are() -> None:
    """Readers, kinds of tasks, and a plug-in that is not installed."""
    with pytest.raises(OptionError, match="there is no reader 'npy'; choose one of tiff, openslide"):
        find_reader("npy")
    with pytest.raises(ModelError, match="unknown kind 'dark-pixels'; known: classify"):
        find_kind("dark-pixels")
    with pytest.raises(PluginError, match="offered by no installed package"):
        plugins.load_plugin("readers", "npy")


def test_a_plugin_of_the_wrong_type_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each registry says what it wants."""
    monkeypatch.setattr("wsi_mmm.slides.registry.plugin_names", lambda _: ("odd",))
    monkeypatch.setattr("wsi_mmm.slides.registry.load_plugin", lambda *_: 1)
    monkeypatch.setattr("wsi_mmm.tasks.plugin_names", lambda _: ("odd",))
    monkeypatch.setattr("wsi_mmm.tasks.load_plugin", lambda *_: 1)
    monkeypatch.setattr("wsi_mmm.annotations.plugin_names", lambda _: ("odd",))
    monkeypatch.setattr("wsi_mmm.annotations.load_plugin", lambda *_: 1)
    with pytest.raises(PluginError, match="ReaderPlugin"):
        find_reader("odd")
    with pytest.raises(PluginError, match="no class with the methods"):
        find_kind("odd")
    with pytest.raises(PluginError, match="AnnotationFormat"):
        parse_shapes(b"{}", "a.geojson")
