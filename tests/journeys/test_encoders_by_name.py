"""A published encoder by its name, offline: wherever its weights lie, the same vectors, and its licence beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
import zarr
from safetensors.torch import save_file
from torch import Tensor

import wsi_mmm
from helpers.commands import invoke
from wsi_mmm.errors import ModelError
from wsi_mmm.model import registry
from wsi_mmm.model.checkpoint import load_encoder
from wsi_mmm.model.convert_weights import read_tensors, write_tensors
from wsi_mmm.model.registry import parse_entry

SMALL = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 4, "num_heads": 3}
ENTRY = parse_entry(
    {
        "name": "tiny-h", "title": "Tiny-H", "hub_id": "Lab/Tiny-H", "licence": "CC-BY-NC-ND-4.0", "commercial": "no",
        "gated": True, "architecture": "vit_small_patch14_reg4_dinov2", "arguments": SMALL,
        "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2], "input_px": 56, "tile_px": 64, "pooling": "cls",
        "registers": 4, "dimension": 48, "file": "pytorch_model.bin",
    },
    "the encoder of this test",
)  # fmt: skip
PIXELS = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up checkpoint as its authors publish it: a pickle."""
    torch.manual_seed(4)
    network = timm.create_model(ENTRY.recipe.architecture, num_classes=0, **SMALL)
    path = tmp_path_factory.mktemp("published") / "pytorch_model.bin"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that knows this encoder, has no network, and no weights yet."""
    monkeypatch.setattr(registry, "encoder_entries", lambda: {ENTRY.name: ENTRY})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "all").mkdir()
    monkeypatch.setenv("WSI_MMM_WEIGHTS", str(tmp_path / "all"))
    return tmp_path


def converted(source: Path, target: Path) -> Path:
    """What ``models convert`` writes, in this process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(read_tensors(source)[0], target, 1 << 30)
    return target


def vectors(weights: Path | None = None) -> Tensor:
    """Those of the encoder for some pixels."""
    model = load_encoder("tiny-h", None if weights is None else str(weights))
    with torch.inference_mode():
        return model.trunk(model.prepare(PIXELS), ())["vector"]


def test_every_place_gives_the_same_vectors(places: Path, pickled: Path) -> None:
    """--weights FILE and FOLDER, the folder of folders, the hub's cache: one after the other."""
    file = converted(pickled, places / "given" / "model.safetensors")
    want = vectors(file)
    assert want.shape == (3, 48)
    assert torch.equal(vectors(file.parent), want)
    snapshot = places / "hf" / "hub" / "models--Lab--Tiny-H" / "snapshots" / "0123abc"
    converted(pickled, snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    assert torch.equal(vectors(), want)
    shutil.rmtree(places / "hf")
    converted(pickled, places / "all" / "tiny-h" / "model.safetensors")
    assert torch.equal(vectors(), want)


def test_what_keeps_it_from_running_is_one_line(places: Path, pickled: Path) -> None:
    """No weights anywhere, a pickle, weights of another network: each names the fix."""
    with pytest.raises(ModelError, match=r"'tiny-h' are not on this machine.*hf download Lab/Tiny-H.*accept its terms"):
        vectors()
    with pytest.raises(ModelError, match=r"are a pickle, which can run code; wsi-mmm models convert .*pytorch_model"):
        vectors(pickled.parent)
    other = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **SMALL)
    save_file(other.state_dict(), places / "other.safetensors")
    with pytest.raises(ModelError, match=r"do not fit the encoder: .*(reg_token|pos_embed)"):
        vectors(places / "other.safetensors")


def test_the_licence_is_said_once_and_kept_with_the_features(places: Path, pickled: Path, tiny_slide: Path) -> None:
    """embed by the registry's name: its tile, what it saw of it, its licence."""
    converted(pickled, places / "all" / "tiny-h" / "model.safetensors")
    result = invoke("embed", tiny_slide, "--encoder", "tiny-h", "-o", places / "out", "--tile-size", "256")
    assert result.exit_code == 0
    line = "Tiny-H: licence CC-BY-NC-ND-4.0 (no commercial use); https://huggingface.co/Lab/Tiny-H"
    assert (result.stdout + result.stderr).count(line) == 1
    [features] = places.glob("out/*/features.zarr")
    attributes = dict(zarr.open_group(str(features), mode="r").attrs)
    assert attributes["licence"] == "CC-BY-NC-ND-4.0"
    assert (attributes["input_px"], attributes["input_mpp"]) == (56, round(0.5 * 256 / 56, 6))


def test_unknown_names_say_near_ones(places: Path) -> None:
    """From embed, before any slide is looked for."""
    with pytest.raises(ModelError, match="there is no encoder 'tinyh'; did you mean tiny-h"):
        wsi_mmm.embed("none.svs", "tinyh", output=places / "out")
