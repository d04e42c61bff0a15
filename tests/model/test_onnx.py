"""Models as ONNX files, and the runtime that runs them: the same answers as torch's, or no file at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsi_mmm import api
from wsi_mmm.errors import MissingPackage, ModelError, OutputError
from wsi_mmm.model import identity, onnx
from wsi_mmm.model.card import CARD, card_json
from wsi_mmm.model.checkpoint import build_model, load_encoder, load_model
from wsi_mmm.model.fold import fold_norms
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.onnx import Exported, export_onnx, open_session
from wsi_mmm.model.runner import Runner
from wsi_mmm.tasks import make_task
from wsi_mmm.types import U8

CPU = torch.device("cpu")
TASKS = ["nuclei", "stain"]


@pytest.fixture(scope="module")
def model(small_model: Path) -> MultiTaskModel:
    """The small model, folded."""
    return fold_norms(load_model(small_model))[0]


@pytest.fixture(scope="module")
def exported(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """It, with all of its tasks, in a file."""
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "new" / "small.onnx")


@pytest.fixture(scope="module")
def cache(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder in which the runtime has left its file for 64 px and both tasks."""
    folder = tmp_path_factory.mktemp("cache")
    runner(small_model, folder, 1).run(tiles(1), TASKS)
    return folder


def runner(folder: Path, cache: Path | None, threads: int = 2, name: str = "onnx") -> Runner:
    """A runner of the model in ``folder``."""
    loaded = load_model(folder)
    quantise = {card.name: make_task(card).quantise for card in loaded.card.tasks}
    return Runner(loaded, "cpu", threads, quantise=quantise, runtime=name, cache=cache)


def tiles(n: int, height: int = 64, width: int = 64) -> U8:
    """Seeded noise."""
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


@pytest.mark.parametrize(("n", "height", "width"), [(1, 64, 64), (5, 96, 160)])
def test_a_file_answers_as_the_model_does_for_any_number_and_size(
    model: MultiTaskModel, exported: Exported, n: int, height: int, width: int
) -> None:
    """Features first, then each task, from plain uint8 pixels; the stated difference holds."""
    assert (exported.tasks, exported.side) == (("nuclei", "stain"), None)
    assert exported.difference < 1e-5
    pixels = tiles(n, height, width)
    with torch.inference_mode():
        vector, logits = model.forward_all(model.prepare(torch.from_numpy(pixels)))
    wanted = [vector.numpy(), *(x.numpy() for x in logits.values())]
    for one, other in zip(open_session(exported.path, CPU)(pixels), wanted, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_a_file_says_what_it_is(model: MultiTaskModel, exported: Exported) -> None:
    """Names of what goes in and comes out, the card's hash, mpp and tasks."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    assert [(one.name, one.type) for one in session.get_inputs()] == [("pixels", "tensor(uint8)")]
    assert [one.name for one in session.get_outputs()] == ["features", "nuclei", "stain"]
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["wsi_mmm.card_sha256"] == hashlib.sha256(card_json(model.card).encode()).hexdigest()
    assert (facts["wsi_mmm.mpp"], facts["wsi_mmm.tile_size"]) == ("0.5", "64")
    assert [task["classes"] for task in json.loads(facts["wsi_mmm.tasks"])] == [["nucleus"], ["a", "b"]]


def test_a_model_that_onnx_runtime_answers_otherwise_is_not_published(
    model: MultiTaskModel, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelError with the difference; neither the file nor a half one is left."""

    def foreign(*_: object) -> SimpleNamespace:  # the graph of another model
        saved = lambda path, external_data: shutil.copy(exported.path, path)  # noqa: E731
        return SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=saved)

    monkeypatch.setattr(onnx, "_trace_graph", foreign)
    torch.manual_seed(5)
    other = build_model(model.card).eval()
    with pytest.raises(ModelError, match=r"differ from torch's by .* beyond 0\.001; nothing was written"):
        export_onnx(other, tmp_path / "wrong.onnx")
    assert list(tmp_path.iterdir()) == []


def test_wrong_tasks_and_places_are_refused(model: MultiTaskModel, tmp_path: Path) -> None:
    """In one line, and before anything is traced."""
    with pytest.raises(ModelError, match="no task 'dogs'; it has: nuclei, stain"):
        export_onnx(model, tmp_path / "a.onnx", tasks=["dogs"])
    renamed = model.card.tasks[1].model_copy(update={"name": "features"})
    clash = build_model(model.card.model_copy(update={"tasks": (renamed,)})).eval()
    with pytest.raises(ModelError, match="called 'features' cannot be exported"):
        export_onnx(clash, tmp_path / "a.onnx")


def test_a_folder_that_cannot_be_written_is_one_line(
    model: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OutputError with the path."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(onnx, "_trace_graph", lambda *_: SimpleNamespace(model=SimpleNamespace(metadata_props={})))
    with pytest.raises(OutputError, match=r"file/a\.onnx: file exists; choose another folder"):
        export_onnx(model, tmp_path / "file" / "a.onnx")


@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("resnet10t", True),
        ("mobilenetv4_conv_small", True),
        ("tf_efficientnet_b0", False),  # TensorFlow's padding
        ("vit_tiny_patch16_224", False),
        ("swin_tiny_patch4_window7_224", False),
    ],
)
def test_the_tile_size_is_free_for_plain_convolutions_only(name: str, free: bool) -> None:
    """What a transformer makes of its positions depends on the size, and so does some padding."""
    assert onnx.fits_any_size(load_encoder(name, "random")) is free


@pytest.mark.slow
def test_a_transformer_is_exported_at_one_size(tmp_path: Path) -> None:
    """Its features agree, and the result says the size."""
    torch.manual_seed(0)
    done = export_onnx(fold_norms(load_encoder("vit_tiny_patch16_224", "random"))[0], tmp_path / "vit.onnx", side=96)
    assert done.side == 96
    assert done.difference < 1e-4
    assert open_session(done.path, CPU)(tiles(2, 96, 96))[0].shape == (2, 192)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        open_session(done.path, CPU)(tiles(2, 64, 64))


# ---------------------------------------------------------------- the runtime


def test_bits_do_not_depend_on_grouping_or_threads(small_model: Path, cache: Path) -> None:
    """Any cut of the tiles into calls, any order, any number of threads: the same bytes, near eager's."""
    one, three = runner(small_model, cache, 1), runner(small_model, cache, 3)
    pixels = tiles(one.batch_size(64) + 7)
    whole, eager = one.run(pixels, TASKS), runner(small_model, None, name="eager").run(pixels, TASKS)
    again, some, back = three.run(pixels, TASKS), three.run(pixels[5:9], TASKS), one.run(pixels[::-1].copy(), TASKS)
    for kind in ("features", "nuclei", "stain"):
        full, same, part, turned = (_answer(x, kind) for x in (whole, again, some, back))
        assert np.array_equal(full, same)
        assert np.array_equal(full[5:9], part)
        assert np.array_equal(full[::-1], turned)
    assert np.abs(whole.features - eager.features).max() <= 1e-3 * np.abs(eager.features).max()
    assert np.abs(whole.maps["nuclei"].astype(int) - eager.maps["nuclei"]).max() <= 1
    assert one.describe()["tolerance"].startswith("float32 through ONNX Runtime: within 1e-3")


def _answer(output: object, kind: str) -> np.ndarray:  # type: ignore[type-arg]
    found = {"features": output.features, **output.maps, **output.tables}  # type: ignore[attr-defined]
    return found[kind]  # type: ignore[no-any-return]


def test_a_file_is_made_once_per_model_and_size(
    small_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next runner reads it; other weights under the same name would not."""
    [kept] = (cache / "onnx").iterdir()
    made: list[Path] = []
    monkeypatch.setattr(onnx, "export_onnx", lambda model, path, **_: (made.append(path), shutil.copy(kept, path)))
    runner(small_model, cache).run(tiles(1), TASKS)
    assert made == []
    other = fold_norms(load_model(small_model))[0]
    next(other.heads.parameters()).data.add_(1.0)
    same = fold_norms(load_model(small_model))[0]
    assert onnx._file_key(other, tuple(TASKS), 64) != onnx._file_key(same, tuple(TASKS), 64) == kept.stem


@pytest.mark.parametrize("place", ["broken", "file", "none"])
def test_a_broken_file_or_no_cache_is_made_anew(
    small_model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A file cut short, a folder that cannot be written, no folder: the answers come all the same."""
    [kept] = (cache / "onnx").iterdir()

    def made(model: MultiTaskModel, path: Path, **_: object) -> None:
        try:
            shutil.copy(kept, path)
        except OSError as error:
            raise OutputError("cannot write") from error

    monkeypatch.setattr(onnx, "export_onnx", made)
    if place == "broken":
        (tmp_path / "broken" / "onnx").mkdir(parents=True)
        (tmp_path / "broken" / "onnx" / kept.name).write_bytes(kept.read_bytes()[:500])
    (tmp_path / "file").write_text("in the way")
    found = runner(small_model, None if place == "none" else tmp_path / place).run(tiles(3), TASKS)
    assert np.array_equal(found.features, runner(small_model, cache).run(tiles(3), TASKS).features)


def test_without_the_packages_one_line_names_the_fix(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded or a slide opened; other runtimes do not mind."""
    monkeypatch.setattr(identity, "find_spec", lambda name: None)
    line = r"ONNX needs the package onnx: pip install 'wsi-mmm\[onnx\]'"
    with pytest.raises(MissingPackage, match=line):
        runner(small_model, None)
    with pytest.raises(MissingPackage, match=line):
        api.export_model(small_model, output=tmp_path / "a.onnx")
    slide = tmp_path / "a.tiff"
    slide.touch()
    with pytest.raises(MissingPackage, match=line):
        api.run(slide, output=tmp_path / "out", runtime="onnx")
    assert identity.lacking("eager") == []


def test_a_device_that_onnx_runtime_lacks_is_refused(exported: Exported) -> None:
    """It never falls back to the CPU without a word."""
    with pytest.raises(ModelError, match="cannot use cuda:0; pip install onnxruntime-gpu"):
        onnx._choose_providers(torch.device("cuda:0"), ["CPUExecutionProvider"])
    [first, _] = onnx._choose_providers(torch.device("cuda:1"), ["CUDAExecutionProvider"])
    assert (first[0], first[1]["device_id"]) == ("CUDAExecutionProvider", "1")


def test_the_api_exports_a_model_folder(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a bare encoder, with the tasks asked for."""
    asked: list[tuple[str, object, object]] = []

    def noted(model: MultiTaskModel, path: Path, *, tasks: object, side: object) -> None:
        asked.append((model.card.name, tasks, side))

    monkeypatch.setattr(onnx, "export_onnx", noted)
    api.export_model(small_model, output=tmp_path / "a.onnx", tasks="stain")
    api.export_model("resnet10t", output=tmp_path / "b.onnx", weights="random", tile_size=96)
    assert asked == [("small", ["stain"], None), ("resnet10t", None, 96)]
    assert (small_model / CARD).is_file()
