"""Embedding with a bare encoder: vectors of a plain script, what the file says of them, errors said once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from wsi_mmm import api
from wsi_mmm.errors import ModelError, OptionError
from wsi_mmm.outputs.exports import read_features
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.fake import synthetic_slide

VIT = "vit_small_patch16_dinov3"
MEAN, STD = (0.7, 0.6, 0.5), (0.2, 0.21, 0.22)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four tiles of 128 px."""
    path = tmp_path_factory.mktemp("slide") / "s.tiff"
    synthetic_slide(path, 1, width=256, height=256, mpp=0.5, nuclei=20)
    return str(path)


def written(path: Path) -> Any:
    """A tiny network with four registers, and its weights at ``path``."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    network: Any = timm.create_model(VIT, num_classes=0, **arguments).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    return network


OPTIONS: dict[str, Any] = {
    "encoder_args": '{"depth": 2, "embed_dim": 48, "num_heads": 3}', "mean": "0.7,0.6,0.5", "std": STD,
    "tissue": "none", "tile_size": 128, "device": "cpu",
}  # fmt: skip


@torch.inference_mode()
def test_features_are_those_of_a_plain_script(slide: str, tmp_path: Path) -> None:
    """Read, resized by PIL, normalised, the class token and the mean of patches: cosine of at least 0.9999; the file
    says tile, input, effective mpp and the whole recipe."""
    network = written(tmp_path / "w" / "model.safetensors")
    report = api.embed(
        slide, VIT, output=tmp_path / "o", weights=str(tmp_path / "w"), pool="cls+patch_mean", input_size=64, **OPTIONS
    )
    assert report.exit_code == 0
    found = read_features(str(tmp_path / "o" / "s" / "features.zarr"))
    assert found.vectors.shape == (4, 96)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with open_slide(slide) as held:
        whole = np.concatenate([tile.pixels for tile in api.stream_tiles(held, 0.5, 256, tissue="none")])[0]
    for vector, (x, y) in zip(found.vectors, found.coords.tolist(), strict=True):
        tile = Image.fromarray(whole[y : y + 128, x : x + 128]).resize((64, 64), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255 - mean) / std
        tokens = network.forward_features(pixels[None])[0]
        wanted = torch.cat((tokens[0], tokens[5:].mean(0)))
        assert float(torch.cosine_similarity(torch.from_numpy(vector), wanted, 0)) > 0.9999
    said = found.attributes
    assert (said["patch_size"], said["input_px"], said["mpp"], said["input_mpp"]) == (128, 64, 0.5, 1.0)
    assert said["pooling"] == "cls+patch_mean"
    assert json.loads(str(said["network"]))["mean"] == list(MEAN)


def test_other_weights_at_the_same_place_are_computed_anew(slide: str, tmp_path: Path) -> None:
    """The cache knows an encoder by its bytes, not by its name or address."""
    path = tmp_path / "w" / "model.safetensors"
    network = written(path)
    more: dict[str, Any] = {"weights": str(path), "cache": tmp_path / "cache", **OPTIONS}
    api.embed(slide, VIT, output=tmp_path / "one", **more)
    with torch.no_grad():
        network.norm.bias.add_(1.0)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    api.embed(slide, VIT, output=tmp_path / "two", **more)
    one, two = (read_features(str(tmp_path / name / "s" / "features.zarr")) for name in ("one", "two"))
    assert one.attributes["model_hash"] != two.attributes["model_hash"]
    np.testing.assert_allclose(two.vectors, one.vectors + 1, atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "options", "words"),
    [
        ("beit_base_patch16_224", {"weights": "random"}, "--tile-size 224 .*--input-size 224"),
        ("vit_small_patch14_dinov2", {"weights": "random"}, "--tile-size 252 .*--input-size 252"),
        ("resnet18", {"weights": "random", "pool": "cls"}, "needs tokens"),
        ("resnet18", {"weights": "nowhere.safetensors"}, "missing"),
        ("resnet18", {"weights": "random", "encoder_args": {"no_such": 1}}, "timm cannot build"),
    ],
)
def test_what_cannot_work_is_said_before_any_slide(
    encoder: str, options: dict[str, Any], words: str, slide: str, tmp_path: Path
) -> None:
    """Once, in one line; nothing is written."""
    with pytest.raises(ModelError, match=words) as error:
        api.embed_request(slide, encoder, output=tmp_path / "o", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state | {"extra": torch.ones(2)}, "the network has no 'extra'"),
        (lambda state: {key: value for key, value in state.items() if key != "norm.bias"}, "they lack 'norm.bias'"),
        (lambda state: state | {"norm.bias": torch.ones(7)}, "'norm.bias' is 7, the network's 48"),
        (lambda state: {key: value.to(torch.float8_e4m3fn) for key, value in state.items()}, "tensors of F8_E4M3"),
        (lambda state: {key: value.to(torch.int8) for key, value in state.items()}, "quantised"),
        (lambda state: timm.create_model("resnet18").state_dict(), "of quite another network"),
    ],
)
def test_weights_that_do_not_fit_are_said_before_any_slide(change: Any, words: str, slide: str, tmp_path: Path) -> None:
    """By the list of their tensors: nothing is written, no lock, no plan."""
    state = written(tmp_path / "model.safetensors").state_dict()
    save_file(change(dict(state)), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        api.embed_request(slide, VIT, output=tmp_path / "o", weights=str(tmp_path / "w.safetensors"), **OPTIONS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "max"}, "no pooling 'max'"), ({"input_size": 5}, "between 16 and 4096"),
        ({"mean": "0.5,0.5"}, "three numbers"), ({"std": "a,b,c"}, "three numbers"), ({"encoder_args": "{"}, "no JSON"),
        ({"encoder_args": "[1]"}, "names no arguments"),
    ],
)  # fmt: skip
def test_wrong_options_name_what_they_take(options: dict[str, Any], words: str, slide: str, tmp_path: Path) -> None:
    """One line."""
    with pytest.raises(OptionError, match=words):
        api.embed_request(slide, "resnet18", output=tmp_path / "o", weights="random", **options)
    with pytest.raises(OptionError, match="is a model"):
        api.embed_request(slide, "default", output=tmp_path / "o", pool="cls")
