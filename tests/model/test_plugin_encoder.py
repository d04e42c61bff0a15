"""Encoders with code of their own: the example package of the docs is installed with pip, and used by its name."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file
from torch import Tensor, nn

import wsi_mmm
from helpers.commands import invoke
from wsi_mmm import plugins
from wsi_mmm.engine.stages import context
from wsi_mmm.errors import MissingPackage, ModelError, PluginError, WsiError
from wsi_mmm.model import plugin_encoder, registry
from wsi_mmm.model.card import DecoderCard, ModelCard, TaskCard
from wsi_mmm.model.checkpoint import build_model, load_encoder, load_model, open_encoder, save_model
from wsi_mmm.model.choose import EncoderOptions, bare_card, choose_encoder
from wsi_mmm.model.registry import EncoderPlugin, find_entry, near_names, offered_entries
from wsi_mmm.model.runner import Runner

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "example_encoder"
NAME = "example-encoder"
PIXELS = torch.randint(0, 256, (3, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
Weights = dict[str, Tensor]


def forget_plugins() -> None:
    """What was found of installed packages."""
    for found in (plugins.plugin_names, plugins.load_plugin, plugins.plugin_package):
        found.cache_clear()
    context.release()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the example package into."""
    source, target = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, timeout=120)
    return target


@pytest.fixture
def installed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with that package, a folder of weights that holds some, and no network."""
    monkeypatch.syspath_prepend(site)
    forget_plugins()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("WSI_MMM_WEIGHTS", str(tmp_path / "all"))
    (tmp_path / "all" / NAME).mkdir(parents=True)
    yield tmp_path
    monkeypatch.undo()
    forget_plugins()
    for name in [name for name in sys.modules if name.partition(".")[0] == "example_encoder"]:
        del sys.modules[name]


@pytest.fixture
def weights(installed: Path) -> Weights:
    """Weights at their place in the folder of folders."""
    from example_encoder.network import ExampleNetwork  # type: ignore[import-not-found]

    torch.manual_seed(2)
    found = dict(ExampleNetwork().state_dict())
    save_file(found, installed / "all" / NAME / "model.safetensors")
    return found


def reference(weights: Weights, pixels: Tensor) -> Tensor:
    """The vectors by torch alone: uint8[n, 224, 224, 3] -> float[n, 32]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    x = nn.functional.conv2d(x, weights["first.weight"], weights["first.bias"], stride=8).relu()
    x = nn.functional.conv2d(x, weights["second.weight"], weights["second.bias"], stride=2).relu()
    return nn.functional.layer_norm(x.mean((2, 3)), (32,), weights["norm.weight"], weights["norm.bias"])


@torch.inference_mode()
def test_its_vectors_are_those_of_its_code(weights: Weights) -> None:
    """Found by name in any writing, weights in the folder of folders, normalised by its entry; resized as it says."""
    model = load_encoder("Example_Encoder")
    inner = PIXELS[:, :224, :224]
    torch.testing.assert_close(model.features(model.prepare(inner)), reference(weights, inner), rtol=1e-5, atol=1e-5)
    assert model.prepare(PIXELS).shape == (3, 3, 224, 224)
    assert (model.card.licence, model.card.tile_size) == ("CC0-1.0", 256)


def test_it_is_listed_shown_and_suggested(weights: Weights) -> None:
    """Beside the published ones, with its package and the file of its weights."""
    listed = invoke("models", "encoders").stdout
    assert "uni2-h" in listed and "example-encoder is of the package example-encoder==0.1" in listed
    shown = invoke("models", "encoders", NAME).stdout
    assert f"{NAME}/model.safetensors (WSI_MMM_WEIGHTS)" in shown and "https://example.org" in shown
    assert near_names("exampleencodr") == [NAME]
    with pytest.raises(ModelError, match="there is no encoder 'exmple-encoder'; did you mean example-encoder"):
        choose_encoder("exmple-encoder")


def test_its_identity_is_that_of_weights_recipe_and_package(
    weights: Weights, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes, another mean, another version: another identity; the package says what to install."""
    file = installed / "all" / NAME / "model.safetensors"
    first = choose_encoder(NAME)
    assert first.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert choose_encoder(NAME, str(file)).identity == choose_encoder(NAME, str(file.parent)).identity == first.identity
    assert choose_encoder(NAME, said=EncoderOptions(mean=(0.5, 0.5, 0.5))).identity != first.identity
    save_file(weights | {"norm.bias": weights["norm.bias"] + 1}, file)
    assert choose_encoder(NAME).identity != first.identity
    monkeypatch.setattr(registry, "plugin_package", lambda *_: "example-encoder==0.2")
    save_file(weights, file)
    assert choose_encoder(NAME).identity != first.identity


def test_weights_that_are_nowhere_or_do_not_fit(installed: Path) -> None:
    """One line; "random" needs none and is the same each time."""
    with pytest.raises(ModelError, match=r"'example-encoder' are not on this machine: put model.safetensors into"):
        choose_encoder(NAME)
    (installed / "w.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(ModelError, match="wsi-mmm models convert"):
        choose_encoder(NAME, str(installed / "w.bin"))
    save_file({"first.weight": torch.zeros(1)}, installed / "w.safetensors")
    with pytest.raises(PluginError, match=r"of the package example-encoder==0.1 cannot be built: RuntimeError: Error"):
        load_encoder(NAME, str(installed / "w.safetensors"))
    one, two = (load_encoder(NAME, "random").state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    for said in (EncoderOptions(pooling="cls"), EncoderOptions({"depth": 1})):
        with pytest.raises(
            ModelError, match="decides how example-encoder pools: leave embed --pool and --encoder-args"
        ):
            choose_encoder(NAME, "random", said)


def test_a_worker_without_the_package_names_it(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does one with another version, and one that is given a model that was trained with it."""
    chosen = choose_encoder(NAME)
    monkeypatch.setattr(plugin_encoder, "plugin_package", lambda *_: "example-encoder==0.3")
    with pytest.raises(ModelError, match=r"has example-encoder==0.3: pip install 'example-encoder==0.1' there"):
        open_encoder(chosen, identity=chosen.identity)
    monkeypatch.setattr(plugin_encoder, "plugin_package", lambda *_: "")
    monkeypatch.setattr(plugin_encoder, "plugin_names", lambda _: ())
    with pytest.raises(MissingPackage, match=r"package example-encoder==0.1, which .* does not have: pip install"):
        open_encoder(chosen, identity=chosen.identity)
    with pytest.raises(MissingPackage, match="pip install 'example-encoder' there"):
        build_model(bare_card(chosen.recipe))


def test_embed_beside_another_encoder_on_a_cluster(weights: Weights, installed: Path, tiny_slide: Path) -> None:
    """One pass over the pixels, in this process and on Dask workers: the same vectors."""
    import distributed

    words = {"tile_size": 256, "mpp": 1.0, "tissue": "none", "weights": None}
    names = [NAME, "default"]
    wsi_mmm.embed_encoders(str(tiny_slide), names, output=installed / "here", **words)  # type: ignore[arg-type]
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0", protocol="inproc://"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        wsi_mmm.embed(
            str(tiny_slide), NAME, output=installed / "there", scheduler=client.scheduler.address, tile_size=256,
            mpp=1.0, tissue="none",
        )  # fmt: skip
    [here] = (installed / "here" / NAME).glob("*/features.zarr")
    [there] = (installed / "there").glob("*/features.zarr")
    first, second = (zarr.open_group(str(path), mode="r") for path in (here, there))
    vectors: Any = first["features"]
    assert vectors.shape[1] == 32 and np.array_equal(vectors[:], second["features"][:])  # type: ignore[index]
    assert first.attrs["licence"] == "CC0-1.0" and '"package": "example-encoder==0.1"' in str(first.attrs["network"])


def test_a_model_is_trained_on_it(weights: Weights, installed: Path) -> None:
    """A head on its vectors: saved and loaded, the same answers; a head on maps is refused."""
    recipe = choose_encoder(NAME).recipe
    task = TaskCard(name="t", kind="classify", head="vector", outputs=2, classes=("a", "b"), colors=((0, 0, 0),) * 2)
    card = bare_card(recipe).model_copy(update={"tasks": (task,), "decoder": DecoderCard()})
    model = build_model(card, weights=None).eval()
    save_model(model, installed / "model", half=False)
    loaded = load_model(installed / "model")
    with torch.inference_mode():
        x = model.prepare(PIXELS)
        torch.testing.assert_close(loaded(x)["t"], model(x)["t"])
        torch.testing.assert_close(loaded.features(x), load_encoder(NAME).features(x))
    assert ModelCard.model_validate_json(loaded.card.model_dump_json()).encoder.package == "example-encoder"
    with pytest.raises(ModelError, match="gives no maps"):
        model.encoder(x)


# ---------------------------------------------------------------- packages with faults

ENTRY = {
    "name": "odd", "title": "Odd", "licence": "MIT", "commercial": "yes", "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5], "dimension": 4,
}  # fmt: skip


class Answer(nn.Module):
    """Answers with whatever it was given."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        """The answer."""
        return self.answer(x)


def offer(monkeypatch: pytest.MonkeyPatch, found: object, name: str = "odd") -> None:
    """Let a package odd 1.0 offer an object."""
    for module in (registry, plugin_encoder):
        monkeypatch.setattr(module, "plugin_names", lambda _: (name,))
        monkeypatch.setattr(module, "plugin_package", lambda *_: "odd==1.0")
    monkeypatch.setattr(registry, "load_plugin", lambda *_: found)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x.mean((2, 3)), r"odd==1.0 gave float\[\d+, 3\], not \[\d+, 4\], as the dimension of its entry"),
        (lambda x: x, r"gave float\[\d+, 3, 64, 64\]"),
        (lambda x: (x, x), r"gave tuple, not vectors float\[\d+, 4\]"),
        (lambda x: x[:, 0, 0, :4].long(), r"gave torch.int64"),
        (lambda x: x[9999], r"failed on float32\[\d+x3x64x64\]: IndexError"),
        (lambda x: 1 / 0, r"failed on .*: ZeroDivisionError: division by zero"),
    ],
)
def test_answers_that_are_no_vectors(
    answer: Callable[[Tensor], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first tile: one line that names the package."""
    offer(monkeypatch, EncoderPlugin(ENTRY, lambda _: Answer(answer)))
    runner = Runner(load_encoder("odd"), "cpu", 1)
    with pytest.raises(PluginError, match=words) as error:
        runner.warm_up(64)
    runner.close()
    assert "\n" not in str(error.value)


def test_vectors_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of any model."""
    offer(monkeypatch, EncoderPlugin(ENTRY, lambda _: Answer(lambda x: torch.full((len(x), 4), torch.nan))))
    runner = Runner(load_encoder("odd"), "cpu", 1)
    with pytest.raises(ModelError, match="model 'odd': the feature vectors hold NaN or infinity"):
        runner.run(np.zeros((1, 64, 64, 3), np.uint8))
    runner.close()


def refuse(weights: Path | None) -> nn.Module:
    """Cannot be built."""
    raise KeyError("no such layer\nmore")


@pytest.mark.parametrize(
    ("found", "name", "words"),
    [
        (EncoderPlugin(ENTRY, refuse), "odd", r"odd==1.0 cannot be built: KeyError: "),
        (EncoderPlugin(ENTRY, lambda _: 3), "odd", "build gave int, not a torch.nn.Module"),  # type: ignore[arg-type,return-value]
        (EncoderPlugin(ENTRY, lambda _: nn.Linear(1, 1, device="meta")), "odd", "on the meta device"),
        (refuse, "odd", r"'odd' of odd==1.0 is no wsi_mmm.model.registry.EncoderPlugin"),
        (EncoderPlugin(ENTRY, refuse), "uni", "by the name 'uni', which is taken"),
        (EncoderPlugin(ENTRY, refuse), "resnet50", "has name 'odd': leave it out"),
        (EncoderPlugin(ENTRY | {"name": "resnet50"}, refuse), "resnet50", "has the name of a network of timm"),
        (EncoderPlugin(ENTRY, refuse), "Odd One", "use small letters"),
        (EncoderPlugin(ENTRY | {"dimension": 0}, refuse), "odd", "must say licence, mean, std and dimension"),
        (EncoderPlugin(ENTRY | {"architecture": "resnet50"}, refuse), "odd", "has architecture 'resnet50': leave it"),
        (EncoderPlugin(ENTRY | {"mpp": "x"}, refuse), "odd", "cannot be used: .* is no valid encoder: mpp"),
        (EncoderPlugin({}, refuse), "odd", "cannot be used: .*title"),
        (EncoderPlugin(None, refuse), "odd", "cannot be used: "),  # type: ignore[arg-type]
    ],
)
def test_a_package_with_faults_is_one_line(
    found: object, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is used; the list of encoders and other encoders are as before."""
    offer(monkeypatch, found, name)
    with pytest.raises(WsiError, match=words) as error:
        load_encoder(name, "random")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, PluginError)
    assert find_entry("uni2-h") is not None and invoke("models", "encoders").exit_code == 0
    assert all(fault.count("\n") == 0 for fault in offered_entries()[1])
