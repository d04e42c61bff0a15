"""Training that begins with a published encoder by its name: its weights, its recipe, its licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from helpers.annotation_targets import MODEL, disc_task, discs, joint, patches, tissue_task
from wsi_mmm.errors import ConfigError, ModelError
from wsi_mmm.model import registry
from wsi_mmm.model.checkpoint import load_encoder, load_model
from wsi_mmm.model.registry import parse_entry
from wsi_mmm.training.config import TrainConfig, parse
from wsi_mmm.training.job import prepare, train

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 1e-5}
ENTRY = parse_entry(
    {
        "name": "tiny-h", "title": "Tiny-H", "hub_id": "Lab/Tiny-H", "licence": "CC-BY-NC-ND-4.0", "commercial": "no",
        "gated": True, "architecture": "vit_small_patch16_224", "arguments": SMALL, "mean": [0.7, 0.6, 0.7],
        "std": [0.2, 0.2, 0.3], "input_px": 32, "tile_px": 64, "pooling": "cls", "registers": 0, "dimension": 48,
        "sources": ["https://example.org"],
    },
    "the encoder of this test",
)  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that knows this encoder and has its weights in its folder of folders; config.json names another
    network, as that of UNI2-h on the hub does."""
    monkeypatch.setattr(registry, "encoder_entries", lambda: {ENTRY.name: ENTRY})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("WSI_MMM_WEIGHTS", str(tmp_path / "all"))
    folder = tmp_path / "all" / "tiny-h"
    folder.mkdir(parents=True)
    torch.manual_seed(4)
    network = timm.create_model("vit_small_patch16_224", num_classes=0, **SMALL)
    save_file({key: value + 0.01 for key, value in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "vit_giant_patch14_224"}')
    return folder


def training(folder: Path, encoder: Any = "tiny-h", size: int = 64, **more: Any) -> dict[str, Any]:
    """Pictures of two classes, one step."""
    model = {"name": "m", "tile_size": size, "overlap": 0, "encoder": encoder, **more}
    data = [patches(folder / "pictures", size=size)]
    return joint(folder, model=model, task=[tissue_task()], data=data, steps=1)


@torch.inference_mode()
def test_it_begins_with_the_published_vectors(places: Path, tmp_path: Path) -> None:
    """Weights, mean and std, pooling and input size are those that embed takes; the card keeps them and the licence."""
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    published = load_encoder("tiny-h")
    want = published.features(published.prepare(pixels))
    for encoder in ("tiny-h", {"name": "Tiny_H", "weights": str(places / "model.safetensors")}):
        model = prepare(parse(training(tmp_path, encoder))).model.eval()
        torch.testing.assert_close(model.features(model.prepare(pixels)), want, rtol=1e-5, atol=1e-5)
        card = model.card
        assert (card.mean, card.std, card.encoder.input_px) == ((0.7, 0.6, 0.7), (0.2, 0.2, 0.3), 32)
        assert card.licence == "its encoder tiny-h: CC-BY-NC-ND-4.0"
    table = {"name": "tiny-h", "pooling": "gap"}
    card = prepare(parse(training(tmp_path, table, licence="MIT", mean=[0.1, 0.2, 0.3]))).model.card
    assert (card.licence, card.mean[0], card.std, card.encoder.pooling) == (
        "MIT; its encoder tiny-h: CC-BY-NC-ND-4.0", 0.1, (0.2, 0.2, 0.3), "gap"
    )  # fmt: skip


def test_the_trained_model_needs_the_registry_no_longer(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder says all."""
    folder = train(parse(training(tmp_path))).model
    monkeypatch.setattr(registry, "encoder_entries", dict)
    loaded = load_model(folder)
    assert loaded.card.licence.endswith("CC-BY-NC-ND-4.0") and loaded.vector_width == 48


def test_tasks_with_maps_see_tiles_as_they_are(places: Path, tmp_path: Path) -> None:
    """Resized tiles have no maps; tiles that do not fit the network are an error that names the setting."""
    model = {**MODEL, "encoder": "tiny-h", "decoder": {"bottleneck": 8, "widths": [8, 8, 8]}}
    raw = joint(tmp_path, model=model, task=[disc_task()], data=[discs(tmp_path / "discs")])
    card = prepare(parse(raw)).model.card
    assert (card.encoder.input_px, card.encoder.pooling) == (0, "cls")
    other = {**model, "encoder": {"name": "tiny-h", "weights": "random", "args": {"patch_size": 14, "img_size": 28}}}
    with pytest.raises(ConfigError, match=r"cannot take pictures of 32 px: set model.tile_size = 224"):
        prepare(parse({**raw, "model": other}))


def test_weights_that_are_not_there(places: Path, tmp_path: Path) -> None:
    """The line that embed says; random ones need none, and no licence. Names of timm are as before."""
    (places / "model.safetensors").unlink()
    raw = training(tmp_path, {"name": "tiny-h"})
    with pytest.raises(ModelError, match=r"'tiny-h' are not on this machine.*hf download Lab/Tiny-H.*accept its terms"):
        prepare(parse(raw))
    assert prepare(parse(raw, ["model.encoder.weights=random"])).model.card.licence == ""
    assert parse(raw, ["model.encoder=resnet18d"]).model.encoder.weights == "random"
    again = TrainConfig.model_validate(parse(raw).model_dump())
    assert again.model.encoder.weights == "pretrained"
