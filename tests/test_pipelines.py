"""The recipes of pipelines/: each is a configuration that opens its data, each script goes its whole way."""

from __future__ import annotations

import ast
import csv
import io
import runpy
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shapely.geometry import box

from helpers.annotation_targets import MODEL, geojson, save
from wsi_mmm import api
from wsi_mmm.errors import ConfigError, InputError
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.training.config import parse

PIPELINES = Path(__file__).parents[1] / "pipelines"


def recipe(name: str) -> dict[str, Any]:
    """A recipe as it is written."""
    return tomllib.loads((PIPELINES / name).read_text())


def go(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str, **counts: Any) -> int:
    """The exit code of a script; ``counts`` are constants of it that a test sets otherwise."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend((PIPELINES / script).parent)  # as Python does for a script
    if counts:
        begun = runpy.run_path(str(PIPELINES / script))["main"]
        assert counts.keys() <= begun.__globals__.keys()
        begun.__globals__.update(counts)
        return int(begun())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PIPELINES / script), run_name="__main__")
    return int(ended.value.code or 0)


def tiny(raw: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The same training of a tiny model, for one step."""
    model = {
        **raw["model"],
        **{key: MODEL[key] for key in ("tile_size", "overlap", "encoder", "decoder")},
        "crop": None,
    }
    return {**raw, "steps": 1, "threads": 0, "model": model, "tracking": {"tensorboard": False}, **more}


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.py")), ids=lambda p: p.name)
def test_scripts_use_the_public_api_only(path: Path) -> None:
    """What a recipe imports of this package is `wsi_mmm` and `wsi_mmm.api`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    assert {name for name in found if name.startswith("wsi_mmm")} <= {"wsi_mmm", "wsi_mmm.api"}


def test_joint(in_tmp: Path) -> None:
    """joint.toml learns from folders as its comments describe them."""
    rng = np.random.default_rng(0)
    for number in range(8):
        for folder in ("TUM", "STR", "NORM", "BACK"):
            save(in_tmp / f"data/patches/{folder}/p{number}_1.png", rng.integers(0, 256, (32, 32, 3)))
        save(in_tmp / f"data/glands/images/p{number}_1.png", rng.integers(0, 256, (32, 32, 3)))
        save(in_tmp / f"data/glands/masks/p{number}_1.png", rng.integers(0, 2, (32, 32)))
    raw = recipe("joint.toml")
    rows = api.prepare_training(tiny(raw)).summary()
    assert sum(rows[0][part] for part in ("train", "val", "test")) == 24 and set(rows[0]["classes"]) == {
        "tumour", "stroma", "normal",
    }  # fmt: skip
    done = api.train(tiny(raw, data=[{**data, "batch": 2} for data in raw["data"]]))
    assert Path(done.model) == Path("runs/joint/model") and set(done.test) == {"tissue", "gland"}


@pytest.mark.slow
def test_the_default_model(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """prepare.py makes the folders that train.toml opens: everything divided as the paths say.

    The data are a zip of ten pictures and one synthetic slide under the names of all."""
    with zipfile.ZipFile(in_tmp / "dsb2018_stained_nuclei.zip", "w") as archive:
        for number in range(10):
            labels = np.zeros((60, 48), np.uint16)
            labels[8:20, 8:20], labels[30:40, 20:35] = 1, 2
            for folder, values in (
                ("images", np.where(labels[..., None] > 0, (90, 60, 150), (225, 190, 215))),
                ("labels", labels),
            ):
                file = io.BytesIO()
                Image.fromarray(values.astype(np.uint8 if folder == "images" else np.uint16)).save(file, "PNG")
                archive.writestr(f"{folder}/{number}.png", file.getvalue())
    (in_tmp / "nuclei").mkdir()
    (in_tmp / "dsb2018_stained_nuclei.zip").rename(in_tmp / "nuclei/dsb2018_stained_nuclei.zip")
    (in_tmp / "slides").mkdir()
    synthetic_slide(in_tmp / "one.tiff", seed=1, width=2240, height=2240, nuclei=700)  # 7 x 7 tiles, 4 squares
    with (PIPELINES / "default/slides.csv").open() as file:
        for row in csv.DictReader(file):
            (in_tmp / "slides" / row["file"]).symlink_to(in_tmp / "one.tiff")
    assert go(monkeypatch, "default/prepare.py", "--data", "elsewhere") == 1
    few = {"OTHERS": {"val": 6, "train": 40}, "EMPTY": 4}  # pictures made by program, each in the same way
    assert go(monkeypatch, "default/prepare.py", "--data", str(in_tmp), **few) == 0
    raw = tiny(recipe("default/train.toml"))
    rows = {row["data"]: row for row in api.prepare_training(raw).summary()}
    assert (rows["nuclei"]["train"], rows["nuclei"]["val"]) == (16, 2)  # eight images, as they are and scaled
    assert rows["recoloured"]["train"] == 8 * 2 * 4 and rows["recoloured"]["val"] == 0
    assert set(rows["stain"]["classes"]) == {"H&E", "IHC", "Giemsa", "other"} and rows["stain"]["val"] > 6
    made = api.train(raw).model
    assert Path(made) == Path("runs/default/model")
    assert go(monkeypatch, "default/relabel.py", "--model", made, "--out", "data/default/found", "--eager", "0.1") == 0
    labels = {path.stem: np.load(path) for path in Path("data/default/found/labels/train").glob("*.npy")}
    pictures = {path.stem for path in Path("data/default/background/images/train").glob("*.png")}
    assert set(labels) == pictures and any(one.min() < 0 for one in labels.values())
    assert all((one == 0).all() for name, one in labels.items() if name.startswith("empty-"))
    again = [
        {**one, "labels": "data/default/found/labels"} if one["name"] == "background" else one for one in raw["data"]
    ]
    assert api.train({**raw, "data": again, "out": "runs/again", "steps": 1}).model
    assert go(monkeypatch, "default/relabel.py", "--model", made, "--data", "elsewhere") == 1  # no pictures


def test_what_a_model_finds_becomes_labels() -> None:
    """A nucleus keeps its number and gets a rim; what is too large is unknown; the rest is as it was known."""
    merged = runpy.run_path(str(PIPELINES / "default/relabel.py"))["merged"]
    known = np.full((40, 40), -1, np.int32)
    known[:, 30:] = 0
    found = np.zeros((40, 40), np.int32)
    found[5:10, 5:10], found[20:35, 5:25] = 1, 2
    labels = merged(found, known, 100)
    assert (labels[5:10, 5:10] == 1).all() and labels[7, 3] == labels[7, 11] == labels[3, 7] == 0
    assert labels[7, 13] == -1 and (labels[20:35, 5:25] == -1).all() and labels[15, 35] == 0
    assert (merged(found, known, 0)[20:35, 5:25] == 2).all()


def test_the_zip_of_the_default_model_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bytes that its pictures unpack to, and by their px."""
    monkeypatch.syspath_prepend(PIPELINES / "default")
    prepare = runpy.run_path(str(PIPELINES / "default/prepare.py"))
    for size, text in (((64, 64), ""), ((5000, 4000), "5000 x 4000 px")):
        file = io.BytesIO()
        Image.new("L", size).save(file, "PNG")
        path = tmp_path / "nuclei.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images/a.png", file.getvalue())
            archive.writestr("labels/a.png", file.getvalue())
        if not text:
            assert len(prepare["labelled_images"](path)) == 1
            continue
        with pytest.raises(InputError, match=text):
            prepare["labelled_images"](path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.png", bytes(65 << 20))
    with pytest.raises(InputError, match="unpacks to more than"):
        prepare["labelled_images"](path)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small slides, half of them with many nuclei, and what is to be learnt of them in a table and as regions."""
    folder = tmp_path_factory.mktemp("study")
    with (folder / "slides.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("slide", "patient", "label"))
        for number in range(10):
            synthetic_slide(folder / f"s{number}.tiff", seed=number, width=512, height=512, nuclei=150 * (number % 2))
            geojson(folder / f"s{number}.geojson", [("left", box(0, 0, 256, 512)), ("right", box(256, 0, 512, 512))])
            table.writerow((f"s{number}", f"p{number}", ("negative", "positive")[number % 2]))
    return folder


@pytest.mark.slow
def test_slide_bags(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """slide_bags.py embeds, trains and runs: an answer per slide, by the encoder that made the vectors."""
    out = tmp_path / "run"
    arguments = [str(slides), "--table", f"{slides}/slides.csv", "--out", str(out)]
    settings = ["--set", "steps=4", "--set", "validation.every=4", "--set", "threads=0"]
    assert go(monkeypatch, "slide_bags.py", *arguments, *settings, "--set", "tracking.tensorboard=false") == 0
    with (out / "results" / "slides.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["id"] if "id" in row else row["slide"] for row in rows} == {f"s{n}" for n in range(10)}
    before, after = api.load_model("default").state_dict(), api.load_model(out / "model").state_dict()
    assert all((before[key] == after[key]).all() for key in before if key.startswith("encoder."))


def test_features_of_another_encoder_are_refused(slides: Path, tmp_path: Path) -> None:
    """Vectors of another length than the model's are named before anything is learnt."""
    from wsi_mmm.outputs.exports import write_features

    facts = {"encoder": "e", "model_hash": "h", "mpp": 0.5, "patch_size": 256, "patch_size_level0": 256}
    for number in range(10):
        write_features(f"{tmp_path}/s{number}/features.zarr", np.zeros((3, 7), np.float32), np.zeros((3, 2), np.int64),
                       facts)  # fmt: skip
    raw = recipe("slide_bags.toml")
    settings = [f"data.bags.features={tmp_path}/{{slide}}/features.zarr", f"data.bags.slides.table={slides}/slides.csv"]
    with pytest.raises(ConfigError, match=r"holds vectors of 7 numbers, the model makes 224: give the encoder"):
        api.prepare_training(raw, settings)


@pytest.mark.slow
def test_fewshot(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """fewshot.py embeds, fits and runs: it says how good the head is, and tiles of every slide get an answer."""
    arguments = [str(slides), "--labels", str(slides), "--out", str(tmp_path), "--encoder", "resnet18"]
    assert go(monkeypatch, "fewshot.py", *arguments, "--weights", "random") == 0
    assert "linear: balanced accuracy" in capsys.readouterr().out
    assert all((tmp_path / "results" / f"s{n}" / "tiles.parquet").exists() for n in range(10))


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slide that is not there ends a script with exit code 1 and a line."""
    assert go(monkeypatch, "fewshot.py", f"{tmp_path}/no.svs", "--labels", "x", "--out", str(tmp_path)) == 1
    assert go(monkeypatch, "slide_bags.py", f"{tmp_path}/no.svs", "--table", "x", "--out", str(tmp_path)) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("**/*.toml")), ids=lambda p: p.name)
def test_recipes_begin_with_how_to_run_them(path: Path) -> None:
    """A recipe names its command or its script, and is a configuration."""
    text = path.read_text()
    name = path.relative_to(PIPELINES.parent).as_posix()
    assert f"wsi-mmm train {name}" in text or f"python {name.removesuffix('.toml')}.py" in text
    assert parse(tomllib.loads(text)).task_cards()
