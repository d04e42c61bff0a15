"""Weights in several files beside an index, as the hub's own writer makes them: loaded, known by all their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from wsi_mmm.errors import ModelError
from wsi_mmm.model.checkpoint import load_encoder, read_tensors
from wsi_mmm.model.choose import EncoderOptions, choose_encoder
from wsi_mmm.model.convert_weights import convert_weights
from wsi_mmm.model.convert_weights import read_tensors as read_pickles
from wsi_mmm.model.fitting import check_listed_weights
from wsi_mmm.model.identity import check_weights
from wsi_mmm.model.shards import weight_files

ARGUMENTS: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
VIT = "vit_tiny_patch16_224"
SAID = EncoderOptions(ARGUMENTS, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
INDEX = "model.safetensors.index.json"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Of a tiny ViT."""
    torch.manual_seed(0)
    return dict(timm.create_model(VIT, num_classes=0, **ARGUMENTS).state_dict())


@pytest.fixture
def folder(weights: Weights, tmp_path: Path) -> Path:
    """The same in several files."""
    (tmp_path / "cut").mkdir()
    save_torch_state_dict(weights, tmp_path / "cut", max_shard_size="100KB")
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 2
    return tmp_path / "cut"


def one_line(path: Path) -> str:
    """The text of the error, whoever looks first."""
    texts = set()
    for look in (check_weights, read_tensors):
        with pytest.raises(ModelError) as error:
            look(path)
        texts.add(str(error.value))
    [text] = texts
    assert "\n" not in text
    return text


@torch.inference_mode()
def test_the_vectors_are_those_of_one_file(
    weights: Weights, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, its index, the folder of folders, the hub's cache, whose files are links to elsewhere."""
    network = timm.create_model(VIT, num_classes=0, **ARGUMENTS).eval()
    network.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 64)
    chosen = choose_encoder(VIT, str(folder), SAID)
    assert chosen.path == folder / INDEX
    check_listed_weights(chosen.recipe, folder / INDEX)
    for given in (folder, folder / INDEX):
        model = load_encoder(VIT, str(given), options=SAID)
        torch.testing.assert_close(model.features(x), network(x), rtol=1e-5, atol=1e-5)
    config = {"architecture": VIT, "model_args": ARGUMENTS, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(config))
    home = tmp_path / "hub" / "models--org--tiny"
    (home / "snapshots" / "abc").mkdir(parents=True)
    folder.rename(home / "blobs")
    for file in (home / "blobs").iterdir():
        (home / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable, place in (("HF_HUB_CACHE", home.parent), ("WSI_MMM_WEIGHTS", tmp_path / "all")):
        monkeypatch.setenv(variable, str(place))
        found = load_encoder("hf-hub:org/tiny")
        torch.testing.assert_close(found.features(x), network(x), rtol=1e-5, atol=1e-5)
        if variable == "HF_HUB_CACHE":
            (tmp_path / "all" / "org").mkdir(parents=True)
            home.rename(tmp_path / "gone")
            (tmp_path / "gone" / "blobs").rename(tmp_path / "all" / "org" / "tiny")


def test_the_identity_covers_every_file(weights: Weights, folder: Path, tmp_path: Path) -> None:
    """One changed number in any of them; the same files elsewhere are the same."""
    first = choose_encoder(VIT, str(folder), SAID)
    assert read_tensors(folder / INDEX)[1] == first.sha256
    hashes = {first.sha256}
    (tmp_path / "again").mkdir()
    save_torch_state_dict(weights, tmp_path / "again", max_shard_size="100KB")
    assert choose_encoder(VIT, str(tmp_path / "again"), SAID).identity == first.identity
    for file in weight_files(folder / INDEX):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        hashes.add(check_weights(folder / INDEX))
    assert len(hashes) == 1 + len(weight_files(folder / INDEX))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside.safetensors", "is no .safetensors file of its folder"),
        ("/etc/passwd.safetensors", "is no .safetensors file of its folder"),
        ("a/b.safetensors", "is no .safetensors file of its folder"),
        ("..\\outside.safetensors", "is no .safetensors file of its folder"),
        ("pytorch_model.bin", "is no .safetensors file of its folder"),
        (".safetensors", "is no .safetensors file of its folder"),
        ("gone.safetensors", "names gone.safetensors, which is not beside it: copy all files"),
    ],
)
def test_names_in_an_index_are_not_trusted(name: str, words: str, folder: Path) -> None:
    """No file is opened but those of its folder."""
    save_file({"a": torch.ones(1)}, folder.parent / "outside.safetensors")
    raw = json.loads((folder / INDEX).read_text())
    raw["weight_map"]["norm.bias"] = name
    (folder / INDEX).write_text(json.dumps(raw))
    assert words in one_line(folder / INDEX).replace("'", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        (" " * (17 << 20), "more than 16 MiB"),
        (json.dumps({"weight_map": {str(i): f"m{i}.safetensors" for i in range(1001)}}), "more than 1,000"),
    ],
    ids=["cut", "deep", "list", "empty", "number", "large", "many"],
)
def test_an_index_that_is_none(text: str, words: str, folder: Path) -> None:
    """Bounds, and the fix, in one line."""
    (folder / INDEX).write_text(text)
    assert words in one_line(folder / INDEX)


def test_files_that_are_not_those_of_the_index(weights: Weights, folder: Path) -> None:
    """A tensor that is elsewhere, one too many, a file that is cut short."""
    files = weight_files(folder / INDEX)
    whole = files[0].read_bytes()
    first = read_tensors(files[0])[0]
    key = min(first)
    save_file({name: value for name, value in first.items() if name != key} | {"x": torch.ones(1)}, files[0])
    assert f"{files[0].name} lacks '{min(key, 'x')}'" in one_line(folder / INDEX).replace("also has", "lacks")
    files[0].write_bytes(whole[:-1])
    assert "cut short or damaged" in one_line(folder / INDEX)


def test_pickles_in_several_files_become_one(weights: Weights, tmp_path: Path) -> None:
    """By their index; a file that lies elsewhere is not opened."""
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, some in parts.items():
        torch.save({name: weights[name] for name in some}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, some in parts.items() for name in some}}))
    found, left_out, _ = read_pickles(index)
    assert found.keys() == weights.keys() and left_out == 0
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(ModelError, match=r"no .bin file of its folder"):
        convert_weights(index, tmp_path / "other.safetensors")
