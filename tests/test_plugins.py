"""Extensions by entry points: a real package is installed with pip, and every kind of extension is used through it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from wsi_mmm import plugins
from wsi_mmm.annotations import parse_shapes
from wsi_mmm.engine.stages.publish import _checked_columns
from wsi_mmm.errors import ModelError, OptionError, PluginError
from wsi_mmm.model import checkpoint
from wsi_mmm.model.card import TaskCard, model_path
from wsi_mmm.model.heads import HeadSpec
from wsi_mmm.slides.base import ReaderPlugin
from wsi_mmm.slides.region_reader import RegionReader
from wsi_mmm.slides.registry import find_reader, reader_plugin
from wsi_mmm.tasks import find_kind, make_task
from wsi_mmm.tasks.tile_kinds import Regress
from wsi_mmm.types import U8, Block, Level, SlideInfo, TaskInfo

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
    facts = json.loads((tmp_path / "out" / "picture" / "slide.json").read_text())
    assert (facts["reader"], facts["classes"]) == ("npy", {})


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


INFO = SlideInfo("a.npy", 90, 70, 0.5, 0.5, (Level(90, 70, 1.0, 1.0, 256, 256),), "npy", "npy", "0")
CARD = TaskCard(name="t", kind="odd", head="vector", outputs=1, classes=("a",), colors=((0, 0, 0),))


def _offer(monkeypatch: pytest.MonkeyPatch, place: str, name: str, found: object) -> None:
    monkeypatch.setattr(f"{place}.plugin_names", lambda _: (name,))
    monkeypatch.setattr(f"{place}.load_plugin", lambda *_: found)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((70, 90, 3), np.float32), r"gave float32\[70, 90, 3\] for a region that is uint8\[70, 90, 3\]"),
        (np.zeros((90, 70, 3), np.uint8), r"gave uint8\[90, 70, 3\]"),
        (np.zeros((70, 90), np.uint8), r"gave uint8\[70, 90\]"),
        (None, "'npy' gave NoneType"),
    ],
)
def test_a_reader_that_gives_no_rgb_of_the_region_says_so(pixels: U8, words: str) -> None:
    """Floats would become black and nothing would become white without a word."""
    with pytest.raises(PluginError, match=words):
        RegionReader(INFO, lambda level, window: pixels, lambda: None).read(Block(0, 0, 90, 70, 1.0, 1.0))


def test_names_of_our_own_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of such a plug-in would be used, and half of ours."""
    _offer(monkeypatch, "wsi_mmm.tasks", "classify", Regress)
    with pytest.raises(PluginError, match="kind of task by the name 'classify', which is taken"):
        find_kind("classify")
    with pytest.raises(PluginError, match="reader by the name 'tiff', which is taken"):
        reader_plugin("tiff")


def test_a_reader_is_called_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives a Reader."""
    _offer(monkeypatch, "wsi_mmm.slides.registry", "odd", ReaderPlugin(lambda uri: None, lambda *_: True))  # type: ignore[arg-type,return-value]
    with pytest.raises(PluginError, match=r"gave a NoneType, not a Reader with SlideInfo\.reader='odd'"):
        find_reader("odd")("a.npy")
    reader = RegionReader(INFO, lambda level, window: "", lambda: None)
    _offer(monkeypatch, "wsi_mmm.slides.registry", "odd", ReaderPlugin(lambda uri: reader, lambda *_: True))
    with pytest.raises(PluginError, match="gave a SlideInfo of 'npy'"):
        find_reader("odd")("a.npy")


def test_a_task_that_lacks_something_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods are missed when the task is made, a head when the model is."""

    class Half(Regress):
        @classmethod
        def from_params(cls, *_: object) -> object:  # type: ignore[override]
            return SimpleNamespace(heads={}, info=None, head=lambda spec: None, loss=None, quantise=None, target=None)

    _offer(monkeypatch, "wsi_mmm.tasks", "odd", Half)
    with pytest.raises(PluginError, match="task 't': the kind 'odd' of a plug-in lacks channels, from_params, halo"):
        make_task(CARD)
    _offer(monkeypatch, "wsi_mmm.model.checkpoint", "odd", Half)
    with pytest.raises(
        PluginError, match=r"head of the kind 'odd' of a plug-in gave NoneType, not a torch\.nn\.Module"
    ):
        checkpoint._task_head(CARD, HeadSpec(8, 8, 8, 8))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (None, "NoneType, no dict"),
        ({"t": np.zeros(1, np.float32)}, r"'t' as something else than an array of one number per tile \(here 2\)"),
        ({"x": np.zeros(2, np.float32)}, "a column 'x', a name that is taken"),
        ({"t_count": np.zeros(2, np.int64)}, "integers as 't_count': numbers are float32, classes are indices"),
        ({"t": np.full(2, 70)}, "integers as 't': numbers are float32"),
    ],
)
def test_a_table_that_cannot_be_written_is_refused(columns: object, words: str) -> None:
    """With the task's name and kind."""
    task: Any = SimpleNamespace(info=TaskInfo("t", "odd", ("a",), ((0, 0, 0),)), table=lambda values: columns)
    with pytest.raises(PluginError, match=f"task 't': table of the kind 'odd' gave {words}"):
        _checked_columns(task, np.zeros((2, 1), np.float32))
