"""Few-shot heads: learnt from files, judged on groups not seen, the same numbers behind the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from shapely.geometry import MultiPoint, Point, box

import wsi_mmm
from helpers.annotation_targets import geojson
from wsi_mmm import api
from wsi_mmm.errors import InputError, ManifestError, ModelError, OptionError
from wsi_mmm.model.card import DecoderCard, EncoderCard, ModelCard, read_card
from wsi_mmm.model.checkpoint import build_model, load_model, save_model
from wsi_mmm.outputs.exports import read_features, write_features
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.training import fewshot
from wsi_mmm.training.data.embedding import source_identity
from wsi_mmm.training.fewshot import KINDS, Labelled, Linear
from wsi_mmm.training.fewshot_run import embedded, learn, predict, slides_by_table, tiles_by_regions

FACTS = {"encoder": "small", "model_hash": "h", "mpp": 0.5, "patch_size": 64, "patch_size_level0": 128}


def planted(n: int, classes: int = 3, seed: int = 0) -> Labelled:
    """Vectors of 16 values scattered round a centre per class, ten groups that hold every class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % classes
    centres = np.random.default_rng(99).normal(size=(classes, 16)) * 2
    vectors = (centres[labels] + rng.normal(size=(n, 16))).astype(np.float32)
    return Labelled(vectors, labels, [f"g{i // classes % 10}" for i in range(n)], tuple("abc"[:classes]))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_head_learns_and_survives_its_files(kind: str, classes: int, tmp_path: Path) -> None:
    """It tells planted classes apart on vectors it has not seen, and says the same after saving and loading."""
    head, figures = fewshot.fit(kind, planted(120, classes))
    fresh = planted(60, classes, seed=1)
    chance = head.probabilities(fresh.vectors)
    assert chance.shape == (60, classes) and np.allclose(chance.sum(axis=1), 1)
    assert (chance.argmax(axis=1) == fresh.labels).mean() > 0.9
    assert figures["folds"] == 5 and figures["balanced_accuracy"] > 0.85 and figures["auroc"] > 0.9
    fewshot.save(tmp_path, head, {"classes": list(fresh.classes)})
    again, facts = fewshot.load(tmp_path)
    assert facts["kind"] == kind and np.allclose(again.probabilities(fresh.vectors), chance, atol=1e-6)


def test_noise_is_said_to_be_noise() -> None:
    """Labels that have nothing to do with the vectors get a balanced accuracy near chance: folds do not leak."""
    data = planted(300, 2)
    noise = Labelled(data.vectors, np.random.default_rng(5).integers(0, 2, 300, np.int32), data.groups, data.classes)
    assert abs(fewshot.fit("linear", noise)[1]["balanced_accuracy"] - 0.5) < 0.12


def test_what_cannot_be_learnt_is_one_line() -> None:
    """A class without examples, and a head that does not exist, are named."""
    data = planted(30, 2)
    with pytest.raises(InputError, match="without any: c"):
        fewshot.fit("linear", Labelled(data.vectors, data.labels, data.groups, ("a", "b", "c")))
    with pytest.raises(OptionError, match="linear, knn, gbm"):
        fewshot.fit("svm", data)
    assert fewshot.fit("linear", Labelled(data.vectors, data.labels, ["g"] * 30, ("a", "b")))[1]["folds"] == 0


def test_a_linear_head_says_the_same_behind_its_encoder(tmp_path: Path) -> None:
    """Put into a model, saved and loaded, its probabilities are those of the head on the encoder's vectors."""
    card = ModelCard(
        name="small", encoder=EncoderCard(name="resnet18", args={"channels": [8, 8, 16, 16]}),
        decoder=DecoderCard(bottleneck=0, widths=()), mpp=0.5, tile_size=64, overlap=0,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(card).eval()
    pixels = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        vectors = model.features(model.prepare(pixels)).numpy()
    rng = np.random.default_rng(0)
    head = Linear(rng.normal(size=(2, 16)).astype(np.float32), np.array([0.1, -0.1], np.float32))
    fewshot.save_with_head(model, head, tmp_path, name="grade", classes=("low", "high"))
    loaded = load_model(tmp_path)
    with torch.inference_mode():
        logits = loaded(loaded.prepare(pixels), ["grade"])["grade"]
    assert np.allclose(torch.softmax(logits, 1).numpy(), head.probabilities(vectors), atol=1e-4)
    with pytest.raises(ModelError, match="has a task 'grade' already"):
        fewshot.with_head(loaded, head, "grade", ("low", "high"))
    with pytest.raises(ModelError, match="the encoder gives 16"):
        fewshot.with_head(loaded, Linear(np.zeros((2, 8), np.float32), head.bias), "other", ("low", "high"))


def _slides(folder: Path, count: int) -> None:
    """Slides of 40 tiles, left half of class a, right half of class b, with a GeoJSON that says so."""
    (folder / "ann").mkdir()
    for n in range(count):
        data = planted(40, 2, seed=n)
        x = np.where(data.labels == 0, 0, 6400) + np.arange(40) // 2 % 10 * 128
        coords = np.stack([x, np.arange(40) // 20 * 128], axis=1)
        write_features(str(folder / "emb" / f"s{n}" / "features.zarr"), data.vectors, coords, FACTS)
        square = [[[x0, 0], [x0 + 6400, 0], [x0 + 6400, 9000], [x0, 9000], [x0, 0]] for x0 in (0, 6400)]
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"classification": {"name": name}},
            }
            for ring, name in zip(square, ("a", "b"), strict=True)
        ]
        text = json.dumps({"type": "FeatureCollection", "features": features})
        (folder / "ann" / f"s{n}.geojson").write_text(text)


def test_tiles_learn_from_regions_and_speak_of_slides(tmp_path: Path) -> None:
    """From a folder of features and one of annotations to a head, and from the head to a table per slide."""
    _slides(tmp_path, 3)
    found = learn(str(tmp_path / "emb"), str(tmp_path / "ann"), tmp_path / "head", head="knn")
    assert found[0].figures["balanced_accuracy"] > 0.85
    assert found[0].figures["judged_on"] == "slides not learnt from" and found[0].figures["examples"] == 120
    said = predict(str(tmp_path / "emb"), tmp_path / "head", str(tmp_path / "out"))
    assert [s.slide for s in said] == ["s0", "s1", "s2"] and Path(said[0].table).is_file()
    one = tiles_by_regions(str(tmp_path / "emb"), str(tmp_path / "ann"), classes=["b"])[0]
    assert len(one.labels) == 60


def test_features_of_another_encoder_are_refused(tmp_path: Path) -> None:
    """A head speaks only of features made as those it was fitted on; so do slides that are learnt from together."""
    _slides(tmp_path, 2)
    learn(str(tmp_path / "emb"), str(tmp_path / "ann"), tmp_path / "head", head="knn")
    other = {**FACTS, "model_hash": "another"}
    write_features(str(tmp_path / "emb" / "s2" / "features.zarr"), planted(4).vectors, np.zeros((4, 2), int), other)
    with pytest.raises(InputError, match="s2 was embedded with model_hash another"):
        predict(str(tmp_path / "emb"), tmp_path / "head", str(tmp_path / "out"))
    (tmp_path / "ann" / "s2.geojson").write_text((tmp_path / "ann" / "s1.geojson").read_text())
    with pytest.raises(InputError, match="embed them alike"):
        tiles_by_regions(str(tmp_path / "emb"), str(tmp_path / "ann"))


def test_slides_learn_from_a_table(tmp_path: Path) -> None:
    """Mean vectors by slide, patients as groups, rows without a label left out; what is wrong is named with its row."""
    for n in range(8):
        vectors = planted(10, seed=n).vectors + (3 if n % 2 else 0)
        write_features(str(tmp_path / f"s{n}" / "features.zarr"), vectors, np.zeros((10, 2), int), FACTS)
    rows = [f"s{n},{'high' if n % 2 else 'low'},p{n}" for n in range(7)] + ["s7,,p7"]
    table = tmp_path / "labels.csv"
    table.write_text("slide,label,patient\n" + "\n".join(rows) + "\n")
    data, facts = slides_by_table(str(tmp_path), str(table))
    assert data.classes == ("high", "low") and data.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert data.groups[3] == "p3" and facts["mpp"] == 0.5
    table.write_text("slide,label\ns0,low\nnone,high\n")
    with pytest.raises(ManifestError, match="row 3: no slide 'none'"):
        slides_by_table(str(tmp_path), str(table))
    with pytest.raises(ManifestError, match="no column 'grade'"):
        slides_by_table(str(tmp_path), str(table), column="grade")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="wsi-mmm embed makes them"):
        embedded(str(tmp_path / "empty"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a task of its own, learnt at other sizes than the features below are embedded at."""
    task = {"name": "other", "kind": "classify", "head": "vector", "outputs": 2, "classes": ["x", "y"],
            "colors": [[0, 0, 0]] * 2}  # fmt: skip
    card = ModelCard.model_validate(
        {"name": "base", "encoder": {"name": "resnet18", "args": {"channels": [8, 8, 16, 16]}},
         "decoder": {"bottleneck": 0, "widths": []}, "mpp": 0.5, "tile_size": 256, "overlap": 32, "mean": [0.7] * 3,
         "std": [0.2] * 3, "tasks": [task]}
    )  # fmt: skip
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("base")
    save_model(build_model(card), folder)
    return folder


@pytest.mark.parametrize("bare", [False, True])
def test_a_run_says_of_every_tile_what_predict_says(base: Path, tmp_path: Path, bare: bool) -> None:
    """The model of a head cuts tiles as the head learnt them, whatever the base model's card says: the same tiles, the
    same classes, the same counts. It answers its own task alone unless others are named."""
    slide = tmp_path / "s.tiff"
    synthetic_slide(slide, 2, width=1200, height=900, mpp=0.25, nuclei=60)
    options: Any = {"mpp": 1.0, "tile_size": 64, "overlap": 16}
    encoder, weights = ("test_vit", "random") if bare else (str(base), None)
    wsi_mmm.embed(str(slide), encoder, output=tmp_path / "emb", tissue="none", weights=weights, **options)
    (tmp_path / "ann").mkdir()
    halves = [("left", box(0, 0, 600, 900)), ("right", box(600, 0, 1200, 900))]
    geojson(tmp_path / "ann" / "s.geojson", halves)
    learn(str(tmp_path / "emb"), str(tmp_path / "ann"), tmp_path / "head", task="side", weights=weights)
    predict(str(tmp_path / "emb"), tmp_path / "head", str(tmp_path / "said"))
    said = pq.read_table(tmp_path / "said" / "s.parquet")
    report = wsi_mmm.run(str(slide), tmp_path / "head" / "model", output=tmp_path / "out", tissue="none")
    run = pq.read_table(tmp_path / "out" / "s" / "tiles.parquet")
    assert report.exit_code == 0 and len(run) == len(said) > 25
    for column in ("x", "y", "side"):
        assert run[column].to_pylist() == said[column].to_pylist(), column
    assert np.allclose(run["side:left"].to_numpy(), said["side:left"].to_numpy(), atol=1 / 200)
    assert set(said["side"].to_pylist()) == {"left", "right"}
    counts = json.loads((tmp_path / "out" / "s" / "slide.json").read_text())["classes"]
    assert counts == {"side": {name: said["side"].to_pylist().count(name) for name in ("left", "right")}}
    card = read_card(tmp_path / "head" / "model")
    assert (card.mpp, card.tile_size, card.overlap, card.default_tasks) == (1.0, 64, 16, ("side",))
    made = json.loads((tmp_path / "head" / "head.json").read_text())
    assert card.data["features"] == {name: made[name] for name in card.data["features"]}
    assert made["model_hash"] == source_identity(encoder, weights) and made["overlap"] == 16
    if bare:
        return
    both = api.run_request(str(slide), tmp_path / "head" / "model", output=tmp_path / "o", tasks=["side", "other"])
    assert both.recipe.tasks == ("other", "side")


@pytest.mark.parametrize(("name", "value"), [("mpp", 1.0), ("patch_size", 128), ("overlap", 16)])
def test_vectors_of_other_scales_are_not_mixed(tmp_path: Path, name: str, value: float) -> None:
    """Learning and predicting: a line that names both files, the attribute and both values."""
    _slides(tmp_path, 2)
    uri = tmp_path / "emb" / "s1" / "features.zarr"
    found = read_features(str(uri))
    facts = {**FACTS, "overlap": 0}
    write_features(str(tmp_path / "emb" / "s0" / "features.zarr"), found.vectors, found.coords, facts)
    write_features(str(uri), found.vectors, found.coords, {**facts, name: value})
    words = (
        rf"s1 was embedded with {name} {value}, s0 with .*s1/features\.zarr, .*s0/features\.zarr\): embed them alike"
    )
    with pytest.raises(InputError, match=words):
        learn(str(tmp_path / "emb"), str(tmp_path / "ann"), tmp_path / "head", head="knn")
    (tmp_path / "ann" / "s1.geojson").unlink()
    learn(str(tmp_path / "emb"), str(tmp_path / "ann"), tmp_path / "head", head="knn")
    with pytest.raises(InputError, match=rf"s1 was embedded with {name} {value}, the head with .*head\.json"):
        predict(str(tmp_path / "emb"), tmp_path / "head", str(tmp_path / "out"))


def test_tiles_that_no_model_takes_are_said_before_fitting(tmp_path: Path) -> None:
    """A linear head becomes a model; where `run` could not cut such tiles, the line says at which size to embed."""
    _slides(tmp_path, 2)
    for n in range(2):
        uri = str(tmp_path / "emb" / f"s{n}" / "features.zarr")
        found = read_features(uri)
        write_features(uri, found.vectors, found.coords, {**FACTS, "patch_size": 250})
    with pytest.raises(InputError, match=r"no model takes tiles of 250 px .*multiple of 32"):
        learn(str(tmp_path / "emb"), str(tmp_path / "ann"), tmp_path / "head")
    learn(str(tmp_path / "emb"), str(tmp_path / "ann"), tmp_path / "head", head="knn")


def test_points_teach_the_tiles_that_they_lie_in(tmp_path: Path) -> None:
    """As outlines do: a tile learns the class of the points in it, those of several classes teach nothing."""
    for name in ("s0", "s1"):
        coords = np.stack([np.arange(8) * 128, np.zeros(8, int)], axis=1)
        write_features(str(tmp_path / "emb" / name / "features.zarr"), planted(8, 2).vectors, coords, FACTS)
        points = [("a", MultiPoint([(30, 60), (140, 5)])), ("b", Point(600, 60)), ("b", Point(700, 100)),
                  ("a", Point(900, 9)), ("b", Point(910, 9)), ("b", Point(9000, 9))]  # fmt: skip
        (tmp_path / "ann").mkdir(exist_ok=True)
        geojson(tmp_path / "ann" / f"{name}.geojson", points)
    data, _ = tiles_by_regions(str(tmp_path / "emb"), str(tmp_path / "ann"))
    assert data.classes == ("a", "b") and data.labels.tolist() == [0, 0, 1, 1] * 2
    write_features(str(tmp_path / "emb" / "s0" / "features.zarr"), planted(8, 2).vectors, coords, {"mpp": 0.5})
    write_features(str(tmp_path / "emb" / "s1" / "features.zarr"), planted(8, 2).vectors, coords, {"mpp": 0.5})
    with pytest.raises(InputError, match="do not say how large their tiles are"):
        tiles_by_regions(str(tmp_path / "emb"), str(tmp_path / "ann"))


@pytest.mark.parametrize(("head", "tensor"), [("linear", "weight"), ("knn", "vectors")])
def test_a_head_of_numbers_that_are_none_is_refused(tmp_path: Path, head: str, tensor: str) -> None:
    """It would say the first class of everything."""
    found, _ = fewshot.fit(head, planted(30, 2))
    getattr(found, tensor)[0, 0] = np.nan
    fewshot.save(tmp_path, found, {"classes": ["a", "b"]})
    with pytest.raises(ModelError, match=f"holds NaN or infinity in '{tensor}'; fit it again"):
        fewshot.load(tmp_path)
