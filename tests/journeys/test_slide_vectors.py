"""A vector per slide: made with the features or added to them later, the same wherever it is made, in tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import wsi_mmm
from helpers.commands import invoke, json_lines
from wsi_mmm import api
from wsi_mmm.engine.events import silent
from wsi_mmm.engine.executors import wire
from wsi_mmm.engine.executors.serial import SerialExecutor
from wsi_mmm.engine.recipe import recipe_from_json
from wsi_mmm.engine.run import run_slides
from wsi_mmm.engine.stages import forward
from wsi_mmm.errors import InputError, ModelError, OptionError, StorageError
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.checkpoint import build_model, save_model
from wsi_mmm.outputs.exports import read_features
from wsi_mmm.slides.fake import synthetic_slide

ENCODER, WIDTH = "test_resnet", 96
OPTIONS: dict[str, Any] = {"weights": "random", "tissue": "none", "tile_size": 64, "block_tiles": 2, "device": "cpu"}
FILE = "slide_features.h5"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Sixteen tiles of 64 px each."""
    folder = tmp_path_factory.mktemp("slides")
    for name, seed in (("s", 1), ("t", 2)):
        synthetic_slide(folder / f"{name}.tiff", seed, width=256, height=256, mpp=0.5, nuclei=20)
    return [str(folder / "s.tiff"), str(folder / "t.tiff")]


@pytest.fixture(scope="module")
def abmil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub's of Feather: weights in MIL-Lab's names, and the licence in README.md."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "feather"
    folder.mkdir()
    shapes = {"patch_embed.0": (16, WIDTH), "global_attn.attention_a.0": (8, 16), "global_attn.attention_b.0": (8, 16),
              "global_attn.attention_c": (1, 8)}  # fmt: skip
    tensors = {f"model.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"model.{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n")
    return folder


@pytest.fixture(scope="module")
def embedded(slides: list[str], abmil: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both slides, with the vectors of the ABMIL."""
    out = tmp_path_factory.mktemp("embedded")
    assert api.embed(slides, ENCODER, output=out, slide=abmil, **OPTIONS).exit_code == 0
    return out


def read_vector(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """As a reader of TRIDENT's files of slides does."""
    with h5py.File(folder / FILE) as file:
        return file["features"][:], dict(file["features"].attrs)


def test_the_mean_is_that_of_the_features(slides: list[str], tmp_path: Path) -> None:
    """float32 of the float64 mean; the attributes say what made it, and slide.json lists it."""
    report = wsi_mmm.embed(slides[0], ENCODER, output=tmp_path, slide="mean", **OPTIONS)
    features = read_features(str(tmp_path / "s" / "features.zarr"))
    vector, said = read_vector(tmp_path / "s")
    assert vector.dtype == np.float32
    assert vector.tobytes() == features.vectors.astype(np.float64).mean(axis=0).astype(np.float32).tobytes()
    assert {name: said[name] for name in features.attributes} == dict(features.attributes)
    assert (said["slide_encoder"], said["slide_kind"], said["slide_hash"]) == ("mean", "mean", "mean")
    facts = json.loads((tmp_path / "s" / "slide.json").read_text())
    assert facts["slide"] == {"name": "mean", "kind": "mean", "identity": "mean"} and facts["files"]["slide"] == FILE
    assert report.slides[0].extra["files"]["slide"] == str(tmp_path / "s" / FILE)


def test_a_vector_does_not_depend_on_what_made_it(
    slides: list[str], abmil: Path, embedded: Path, tmp_path: Path
) -> None:
    """Other blocks, threads, a cache, the serial executor, and recipes that travelled to another process."""
    request = api.embed_request(
        slides, ENCODER, output=tmp_path, slide=abmil, **{**OPTIONS, "block_tiles": 3}, cache=tmp_path / "c", threads=2
    )
    text = wire.recipe_json(request.recipe)
    assert wire.recipe_json(recipe_from_json(json.loads(text))) == text
    assert recipe_from_json(json.loads(text)).slide == request.recipe.slide
    assert api.execute(request).exit_code == 0
    serial = api.embed_request(slides, ENCODER, output=tmp_path / "serial", slide=abmil, **OPTIONS)
    assert run_slides(serial, SerialExecutor(), silent).exit_code == 0
    for name in ("s", "t"):
        for place in (tmp_path, tmp_path / "serial"):
            assert (place / name / FILE).read_bytes() == (embedded / name / FILE).read_bytes()


def test_a_vector_is_added_to_features_that_are_there(
    slides: list[str], abmil: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tile is read; the files are those of one run; features stay, without --slide the vector, too."""
    assert api.embed(slides, ENCODER, output=tmp_path, **OPTIONS).exit_code == 0
    before = (tmp_path / "s" / "features.zarr" / "zarr.json").stat().st_mtime_ns
    monkeypatch.setattr(forward, "read_block", None)
    for model in ("mean", abmil, abmil):
        report = api.embed(slides, ENCODER, output=tmp_path, slide=model, **OPTIONS)
        assert (report.exit_code, report.slides[0].extra["resumed"]) == (0, True)
        assert report.slides[0].extra["files"]["slide"] == str(tmp_path / "s" / FILE)
    for name in ("s", "t"):
        for file in (FILE, "slide.json"):
            assert (tmp_path / name / file).read_bytes() == (embedded / name / file).read_bytes()
    api.embed(slides, ENCODER, output=tmp_path, **OPTIONS)
    assert (tmp_path / "s" / "slide.json").read_bytes() == (embedded / "s" / "slide.json").read_bytes()
    assert (tmp_path / "s" / "features.zarr" / "zarr.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["gone", "torn", "other"])
def test_a_vector_that_is_not_the_right_one_is_made_again(
    damage: str, slides: list[str], embedded: Path, abmil: Path, tmp_path: Path
) -> None:
    """slide.json says that it is there: a run may have ended between the two files."""
    api.embed(slides[0], ENCODER, output=tmp_path, slide=abmil, **OPTIONS)
    path = tmp_path / "s" / FILE
    wanted = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(wanted[: len(wanted) // 2])
    else:
        with h5py.File(path, "a") as file:
            file["features"].attrs["slide_hash"] = "another"
    assert api.embed(slides[0], ENCODER, output=tmp_path, slide=abmil, **OPTIONS).exit_code == 0
    assert path.read_bytes() == wanted


def test_a_bag_model_makes_the_vector_of_its_own_run(slides: list[str], tmp_path: Path) -> None:
    """Its head on the slide's vector answers as `run` does; features of another encoder are refused by name."""
    torch.manual_seed(2)
    card = {
        "format": "wsi-mmm-model/1", "name": "bags",
        "encoder": {"name": "resnet18", "args": {"channels": [8, 8, 8, 16]}},
        "decoder": {"bottleneck": 8, "widths": [8, 8, 8, 8]}, "bag": {"width": 8, "hidden": 4}, "mpp": 0.5,
        "tile_size": 64, "overlap": 0, "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2],
        "tasks": [{"name": "risk", "kind": "survive", "head": "bag", "outputs": 1, "classes": ["death"],
                   "colors": [[90, 90, 90]]}],
    }  # fmt: skip
    made = build_model(ModelCard.model_validate(card)).eval()
    save_model(made, tmp_path / "m", half=False)
    model, own = str(tmp_path / "m"), {"tissue": "none", "device": "cpu"}
    run = wsi_mmm.run(slides[0], model, output=tmp_path / "r", **own)  # type: ignore[arg-type]
    api.embed(slides[0], model, output=tmp_path / "e", slide=model, tile_size=64, **own)  # type: ignore[arg-type]
    vector, said = read_vector(tmp_path / "e" / "s")
    with torch.inference_mode():
        risk = float(made.heads["risk"](torch.from_numpy(vector)[None]))
    assert run.slides[0].extra["answers"]["risk"] == pytest.approx(risk, rel=1e-5)
    assert (said["slide_encoder"], said["slide_kind"]) == ("bags", "bag")
    with pytest.raises(ModelError, match=f"not of '{ENCODER}': give --encoder"):
        api.embed_request(slides[0], ENCODER, output=tmp_path / "x", slide=model, **OPTIONS)


def test_tiles_that_cannot_be_read_are_left_out(
    slides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are from the answers of bag tasks."""
    read = forward.read_block

    def fail_first(reader: Any, grid: Any, block: Any, fetched: Any = None) -> Any:
        batch = read(reader, grid, block, fetched)
        if tuple(batch.index[0]) == (0, 0):
            batch.failed[0], batch.pixels[0] = True, 255
        return batch

    monkeypatch.setattr(forward, "read_block", fail_first)
    report = api.embed(slides[0], ENCODER, output=tmp_path, slide="mean", **OPTIONS)
    assert report.slides[0].status == "partial"
    vectors = read_features(str(tmp_path / "s" / "features.zarr")).vectors[1:]
    assert read_vector(tmp_path / "s")[0].tolist() == vectors.mean(axis=0, dtype=np.float64).astype(np.float32).tolist()


# ---------------------------------------------------------------- what is asked


def test_a_dry_run_checks_the_slide_model_and_says_what_is_assumed(
    slides: list[str], abmil: Path, tmp_path: Path
) -> None:
    """Its licence as a warning, the encoder that it is given; one line for one that does not fit."""
    words = ["embed", slides[0], "-o", tmp_path, "--encoder", ENCODER, "--weights", "random", "--tile-size", 64]
    said = invoke(*words, "--slide", abmil, "--dry-run").stdout
    assert "warning: slide model feather: licence cc-by-nc-nd-4.0 (no commercial use)" in said
    assert f"does not say the encoder that it learnt from: {ENCODER} is taken for it" in said
    fault = invoke(*[str(one).replace(ENCODER, "test_convnext") for one in words], "--slide", abmil, "--dry-run")
    assert fault.exit_code == 1 and len(fault.stderr.splitlines()) == 1
    assert f"takes tile vectors of {WIDTH} numbers, test_convnext gives" in fault.stderr
    other = invoke("embed", slides[0], "-o", tmp_path, "--tile-size", 64, "--slide", abmil, "--dry-run")
    assert "takes tile vectors of 96 numbers, default gives" in other.stderr  # a model's encoder, too
    assert "there is no slide model" in invoke(*words, "--slide", tmp_path / "none", "--dry-run").stderr
    assert not (tmp_path / "s").exists()


def test_a_slide_model_is_found_by_its_name_on_the_hub(
    slides: list[str], abmil: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where encoders are: in WSI_MMM_WEIGHTS and the hub's cache; nowhere: one line, how to get it."""
    name = "hf-hub:MahmoodLab/abmil.base.uni_v2.pc108-24k"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"hf download MahmoodLab/abmil\.base"):
        api.embed_request(slides, ENCODER, output=tmp_path, slide=name, **OPTIONS)
    snapshot = tmp_path / "hf" / "hub" / "models--MahmoodLab--abmil.base.uni_v2.pc108-24k" / "snapshots" / "abc"
    shutil.copytree(abmil, snapshot)
    report = api.embed(slides[0], ENCODER, output=tmp_path, slide=name, **OPTIONS)
    assert report.exit_code == 0
    vector, said = read_vector(tmp_path / "s")
    assert vector.tobytes() == read_vector(embedded / "s")[0].tobytes()
    assert said["slide_encoder"] == "abmil.base.uni_v2.pc108-24k" and said["slide_licence"] == "cc-by-nc-nd-4.0"


def test_several_encoders_have_means_and_no_folder(slides: list[str], abmil: Path, tmp_path: Path) -> None:
    """A folder fits the vectors of one."""
    several = [ENCODER, "test_efficientnet"]
    wsi_mmm.embed_encoders(slides[0], several, output=tmp_path, slide="mean", **OPTIONS)
    for name in several:
        vectors = read_features(str(tmp_path / name / "s" / "features.zarr")).vectors
        found = read_vector(tmp_path / name / "s")[0]
        assert found.tolist() == vectors.mean(axis=0, dtype=np.float64).astype(np.float32).tolist()
    with pytest.raises(OptionError, match="fits the vectors of one encoder: embed that alone"):
        wsi_mmm.embed_encoders(slides[0], several, output=tmp_path, slide=abmil, **OPTIONS)
    with pytest.raises(OptionError, match="leave features=False out"):
        api.embed_request(slides[0], ENCODER, output=tmp_path, slide="mean", features=False, **OPTIONS)
    with pytest.raises(OptionError, match="give slide too"):
        api.embed(slides[0], ENCODER, output=tmp_path, export="slides-h5", **OPTIONS)


# ---------------------------------------------------------------- exports


def test_exports_of_slides_are_as_other_tools_read_them(embedded: Path, tmp_path: Path) -> None:
    """One file per slide (TRIDENT's and STAMP's), and one with all."""
    vectors = {name: read_vector(embedded / name)[0] for name in ("s", "t")}
    for to in ("slide-h5", "slide-stamp"):
        assert invoke("export", embedded, "--to", to, "-o", tmp_path / to).exit_code == 0
    for name, vector in vectors.items():
        with h5py.File(tmp_path / "slide-h5" / f"{name}.h5") as file:
            assert np.array_equal(file["features"][:], vector)
        with h5py.File(tmp_path / "slide-stamp" / f"{name}.h5") as file:  # as STAMP tells tiles from slides
            assert str(file.attrs["feat_type"]) == "slide" and file.attrs["encoder"] == "feather"
            assert np.array_equal(file["feats"][:], vector)
    [line] = json_lines(invoke("export", embedded, "--to", "slides-h5", "--json"))
    with h5py.File(line["output"]) as file:
        assert Path(line["output"]) == embedded / "slides.h5"
        assert file["slides"].asstr()[:].tolist() == ["s", "t"]
        assert np.array_equal(file["features"][:], np.stack([vectors["s"], vectors["t"]]))
        assert file["features"].attrs["slide_encoder"] == "feather" and "name" not in file["features"].attrs
    (embedded / "slides.h5").unlink()


def test_exports_of_embed_have_slides_too(slides: list[str], tmp_path: Path) -> None:
    """Beside the features, and the table in the output."""
    formats = ("slide-h5", "slide-stamp", "slides-h5")
    api.embed(slides, ENCODER, output=tmp_path, slide="mean", export=formats, **OPTIONS)
    assert (tmp_path / "s" / "slide_features.stamp.h5").exists() and (tmp_path / "slides.h5").exists()


def test_a_table_is_anndata_too(embedded: Path, tmp_path: Path) -> None:
    """A row per slide, named by its id."""
    anndata = pytest.importorskip("anndata")
    assert invoke("export", embedded, "--to", "slides-h5ad", "-o", tmp_path).exit_code == 0
    table = anndata.read_h5ad(tmp_path / "slides.h5ad")
    assert table.obs_names.tolist() == ["s", "t"]
    assert np.array_equal(table.X[1], read_vector(embedded / "t")[0])


def test_tables_of_unlike_slides_are_refused(slides: list[str], embedded: Path, tmp_path: Path) -> None:
    """Made by two models; without vectors; in no folder."""
    from wsi_mmm.outputs.slide_vectors import export_table

    api.embed(slides[0], ENCODER, output=tmp_path, slide="mean", **OPTIONS)
    mixed = [str(folder / "features.zarr") for folder in (embedded / "t", tmp_path / "s")]
    with pytest.raises(InputError, match="s has slide_hash mean, t has"):
        export_table(mixed, str(tmp_path / "x.h5"), "slides-h5")
    api.embed(slides[0], "test_convnext", output=tmp_path / "other", slide="mean", **OPTIONS)
    with pytest.raises(InputError, match=r"s has encoder test_convnext, s has .*: export the folder of each enc"):
        export_table([mixed[1], str(tmp_path / "other" / "s" / "features.zarr")], str(tmp_path / "x.h5"), "slides-h5")
    with pytest.raises(InputError, match="two slides have the id 't'"):
        export_table([mixed[0], mixed[0]], str(tmp_path / "x.h5"), "slides-h5")
    (tmp_path / "s" / FILE).unlink()
    with pytest.raises(StorageError, match="wsi-mmm embed --slide mean"):
        export_table(mixed[1:], str(tmp_path / "x.h5"), "slides-h5")
    assert not (tmp_path / "x.h5").exists()
    assert "name it with -o" in invoke("export", embedded / "s", embedded / "t", "--to", "slides-h5").stderr
