"""Vectors of bare encoders against direct calls of timm, with the same random weights in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import DecoderCard, EncoderCard, ModelCard
from wsi_mmm.model.checkpoint import load_encoder, load_model, open_encoder
from wsi_mmm.model.choose import ChosenEncoder, EncoderOptions, choose_encoder
from wsi_mmm.model.encoder import build_encoder, check_tile
from wsi_mmm.model.recipe import IMAGENET_MEAN, IMAGENET_STD, Pooling
from wsi_mmm.training.fewshot import Linear, save_with_head

TINY_VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 64}
GATED = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 56, "mlp_ratio": 5.33334}

FAMILIES: list[tuple[str, dict[str, object], int]] = [
    ("vit_tiny_patch16_224", TINY_VIT, 64),
    ("vit_small_patch14_dinov2", TINY_VIT | {"img_size": 56}, 56),
    ("vit_small_patch14_reg4_dinov2", TINY_VIT | {"img_size": 56}, 56),
    ("vit_giant_patch14_reg4_dinov2", GATED, 56),
    ("vit_small_patch16_dinov3", {"depth": 3, "embed_dim": 48, "num_heads": 3}, 64),
    ("eva02_tiny_patch14_224", {"depth": 3, "img_size": 56}, 56),
    ("vit_base_patch16_siglip_224", TINY_VIT, 64),
    ("deit_tiny_distilled_patch16_224", TINY_VIT, 64),
    ("beit_base_patch16_224", TINY_VIT, 64),
    ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 64),
    ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 2, 1], "embed_dim": 24, "img_size": 64, "window_size": 2}, 64),
    ("swinv2_tiny_window8_256", {"depths": [1, 1, 2, 1], "embed_dim": 24, "img_size": 64, "window_size": 2}, 64),
    ("hiera_tiny_224", {"embed_dim": 24, "stages": [1, 1, 1, 1]}, 224),
    ("fastvit_t8", {"layers": [1, 1, 1, 1]}, 64),
    ("efficientnet_lite0", {}, 64),
    ("mobilenetv4_conv_small", {}, 64),
    ("regnety_002", {}, 64),
    ("resnet18", {"channels": [8, 16, 24, 32]}, 64),
]


def lively(network: nn.Module) -> nn.Module:
    """The network with all its weights random, also those that begin at zero or one."""
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(torch.randn(value.shape, generator=dice) * 0.1 + (0.5 if value.ndim == 1 else 0))
    return network.eval()


def written(name: str, arguments: dict[str, object], folder: Path, **more: object) -> tuple[Any, Path]:
    """A network of timm with random weights, and the file of them."""
    network = lively(timm.create_model(name, **{"num_classes": 0, **arguments, **more}))
    path = folder / "weights.safetensors"
    save_file({key: value.contiguous().clone() for key, value in network.state_dict().items()}, path)
    return network, path


def said(arguments: dict[str, object], pooling: Pooling | None = None, **more: Any) -> EncoderOptions:
    """What a user says of weights that lie alone."""
    return EncoderOptions(arguments, IMAGENET_MEAN, IMAGENET_STD, pooling, **more)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Within 1e-5 of the largest number."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert float(wanted.abs().max()) > 0


@pytest.mark.parametrize(("name", "arguments", "side"), FAMILIES)
@torch.inference_mode()
def test_the_vector_is_that_of_timm(name: str, arguments: dict[str, object], side: int, tmp_path: Path) -> None:
    """From a file, with or without maps of the same pass: what timm's own head would be given."""
    network, path = written(name, arguments, tmp_path)
    model = load_encoder(name, str(path), options=said(arguments))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    wanted = network.forward_head(network.forward_features(x), pre_logits=True)
    assert_close(model.features(x), wanted)
    assert model.vector_width == wanted.shape[1]
    maps, vector = model.encoder.forward_pooled(x, maps=True)
    assert vector is not None
    assert_close(vector, wanted)
    assert [m.shape[1] for m in maps] == list(model.encoder.channels)
    assert [m.shape[-1] for m in maps] == [side // stride for stride in model.encoder.strides]


def cls(tokens: Tensor, prefix: int) -> Tensor:
    """The class token."""
    return tokens[:, 0]


def patches(tokens: Tensor, prefix: int) -> Tensor:
    """The mean of all but the first tokens."""
    return tokens[:, prefix:].mean(1)


def both(tokens: Tensor, prefix: int) -> Tensor:
    """One after the other."""
    return torch.cat((cls(tokens, prefix), patches(tokens, prefix)), -1)


@pytest.mark.parametrize(
    ("name", "arguments", "prefix"),
    [
        ("vit_tiny_patch16_224", TINY_VIT, 1),
        ("vit_small_patch14_reg4_dinov2", TINY_VIT | {"img_size": 56, "reg_tokens": 8}, 9),
        ("vit_giant_patch14_reg4_dinov2", GATED, 5),
        ("vit_small_patch16_dinov3", {"depth": 3, "embed_dim": 48, "num_heads": 3}, 5),
        ("eva02_tiny_patch14_224", {"depth": 3, "img_size": 56, "global_pool": "token"}, 1),
    ],
)
@pytest.mark.parametrize(("pooling", "wanted"), [("cls", cls), ("patch_mean", patches), ("cls+patch_mean", both)])
@torch.inference_mode()
def test_tokens_are_pooled_after_the_last_norm_without_registers(
    name: str, arguments: dict[str, object], prefix: int, pooling: Pooling, wanted: Callable[[Tensor, int], Tensor],
    tmp_path: Path,
) -> None:  # fmt: skip
    """By hand from timm's normed tokens, of which the first ``prefix`` are no patches."""
    network, path = written(name, arguments, tmp_path)
    model = load_encoder(name, str(path), options=said(arguments, pooling))
    side = 56 if "patch14" in name else 64
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    assert_close(model.features(x), wanted(network.forward_features(x), prefix))
    assert model.vector_width == model.features(x).shape[1]


@torch.inference_mode()
def test_registers_may_be_given_by_number(tmp_path: Path) -> None:
    """A recipe that counts fewer tokens as registers than the network declares is followed."""
    arguments = TINY_VIT | {"img_size": 56}
    network, _ = written("vit_small_patch14_reg4_dinov2", arguments, tmp_path)
    card = EncoderCard(name="vit_small_patch14_reg4_dinov2", args=arguments, pooling="patch_mean", registers=0)
    encoder = build_encoder(card, tensors=network.state_dict()).eval()
    x = torch.randn(1, 3, 56, 56)
    vector = encoder.forward_pooled(x, maps=False)[1]
    assert vector is not None
    assert_close(vector, network.forward_features(x)[:, 1:].mean(1))


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "resnet18"])
@torch.inference_mode()
def test_gap_is_the_mean_of_the_last_map(name: str, tmp_path: Path) -> None:
    """Channels first or last."""
    arguments = next(arguments for family, arguments, _ in FAMILIES if family == name)
    network, path = written(name, arguments, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    final = network.forward_features(x)
    wanted = final.mean((1, 2) if name.startswith("swin") else (2, 3))
    assert_close(load_encoder(name, str(path), options=said(arguments, "gap")).features(x), wanted)


@pytest.mark.parametrize(
    ("name", "arguments", "pooling", "words"),
    [
        ("resnet18", {"channels": [8, 16, 24, 32]}, "cls", "needs tokens"),
        ("vit_tiny_patch16_224", TINY_VIT | {"class_token": False, "global_pool": "avg"}, "cls", "class token"),
        ("vit_tiny_patch16_224", TINY_VIT | {"global_pool": "avg"}, "patch_mean", "global_pool"),
    ],
)
def test_a_pooling_that_the_network_has_not_is_refused(
    name: str, arguments: dict[str, object], pooling: Pooling, words: str
) -> None:
    """One line that names what it would take."""
    with pytest.raises(ModelError, match=words) as error:
        load_encoder(name, "random", options=said(arguments, pooling))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "tile", "input_px", "near"),
    [
        ("swin_tiny_patch4_window7_224", 254, 0, 252),
        ("beit_base_patch16_224", 256, 0, 224),
        ("vit_small_patch14_dinov2", 256, 0, 252),
        ("vit_small_patch14_dinov2", 256, 224, 0),
        ("vit_tiny_patch16_224", 256, 0, 0),
        ("eva02_tiny_patch14_224", 250, 0, 238),
        ("convnext_atto", 250, 0, 0),
    ],
)
def test_a_tile_that_does_not_fit_is_an_error_that_names_sizes(name: str, tile: int, input_px: int, near: int) -> None:
    """Networks of one size, and of patches that do not divide the tile; others take it."""
    card = EncoderCard(name=name, pooling="native", input_px=input_px)
    encoder = build_encoder(card, empty=True)
    whole = ModelCard(
        name="bare", encoder=card, decoder=DecoderCard(bottleneck=0), mpp=0.5, tile_size=tile, overlap=0,
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip
    if not near:
        check_tile(encoder, whole, tile)
        return
    with pytest.raises(ModelError, match=f"--tile-size {near} .* --input-size {near} ") as error:
        check_tile(encoder, whole, tile)
    assert "\n" not in str(error.value)


@torch.inference_mode()
def test_tiles_are_resized_as_pil_does_it(tmp_path: Path) -> None:
    """Antialiased to the input size; within a grey level of PIL, and the vector that of a plain script."""
    network, path = written("vit_tiny_patch16_224", TINY_VIT, tmp_path)
    for interpolation in ("bicubic", "bilinear"):
        chosen = choose_encoder("vit_tiny_patch16_224", str(path), said(TINY_VIT, "cls", input_px=64))
        recipe = chosen.recipe.model_copy(update={"interpolation": interpolation})
        model = open_encoder(ChosenEncoder(recipe, chosen.path, chosen.sha256))
        tile = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
        small = np.array(Image.fromarray(tile).resize((64, 64), getattr(Image.Resampling, interpolation.upper())))
        found = model.prepare(torch.from_numpy(tile[None]))
        mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
        plain = (torch.from_numpy(small).permute(2, 0, 1) / 255 - mean) / std
        levels = ((found[0] - plain) * std * 255).abs()
        assert float(levels.max()) < 1.01
        assert float((levels > 0.5).float().mean()) < 0.06
        wanted = network.forward_features(plain[None])[:, 0]
        assert float(torch.cosine_similarity(model.features(found), wanted)) > 0.9999


@torch.inference_mode()
def test_a_model_with_its_own_pooling_is_saved_and_loaded(tmp_path: Path) -> None:
    """Card and vector come back, and a head behind the pooled vector answers."""
    _, path = written("vit_small_patch14_reg4_dinov2", TINY_VIT | {"img_size": 56}, tmp_path)
    model = load_encoder(
        "vit_small_patch14_reg4_dinov2",
        str(path),
        options=said(TINY_VIT | {"img_size": 56}, "cls+patch_mean", input_px=56),
    )
    head = Linear(np.ones((2, 96), np.float32), np.zeros(2, np.float32))
    folder = tmp_path / "model"
    save_with_head(model, head, folder, name="grade", classes=("a", "b"))
    again = load_model(folder)
    pixels = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    x = again.prepare(pixels)
    assert x.shape == (1, 3, 56, 56)
    assert torch.equal(again.features(x), model.features(model.prepare(pixels)))
    assert again(x)["grade"].shape == (1, 2)
    assert not any(value.is_meta for value in (*again.parameters(), *again.buffers()))
