"""Checkpoints in Meta's and transformers' names give the vectors of those libraries in timm's networks.

The references are the published equations on the published names (`helpers.published_names`), and transformers itself.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.published_names import State, Transformer, published_shapes, random_state, reference_tokens, resampled
from wsi_mmm.errors import ModelError
from wsi_mmm.model.key_maps import KEY_MAPS, prepare_network, rename_tensors

WIDTH, HEADS, DEPTH, CELL = 24, 2, 3, 14
META = Transformer("dinov2", WIDTH, HEADS, DEPTH, CELL, 3)
THEIRS = replace(META, family="transformers-dinov2")
X = torch.randn(2, 3, 3 * CELL, 3 * CELL, generator=torch.Generator().manual_seed(1))


def timm_network(net: Transformer) -> Any:
    """The same network of timm's, as the registry's arguments describe big ones, for images of 3 tokens a side."""
    plain = "vit_small_patch16_224" if net.family == "transformers-vit" else "vit_small_patch14_dinov2"
    extra: dict[str, Any] = {"reg_tokens": net.registers, "no_embed_class": True} if net.registers else {}
    return timm.create_model(
        "vit_giant_patch14_dinov2" if net.swiglu else plain, img_size=3 * CELL, patch_size=CELL, embed_dim=WIDTH,
        depth=DEPTH, num_heads=HEADS, mlp_ratio=2 * net.inner / WIDTH if net.swiglu else 4, num_classes=0, **extra,
    ).eval()  # fmt: skip


def load_renamed(state: State, key_map: str, network: nn.Module) -> None:
    """Load a checkpoint strictly through a key map."""
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(rename_tensors(dict(state), key_map, wanted), strict=True)
    prepare_network(network, key_map)


def largest_difference(network: Any, want: Tensor) -> float:
    """Of all tokens, relative to the largest."""
    with torch.inference_mode():
        return float((network.forward_features(X) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("prefix", ["", "teacher.backbone.", "backbone."])
@pytest.mark.parametrize(("registers", "swiglu"), [(0, False), (4, True)])
@pytest.mark.parametrize("chunks", [0, 2])
def test_metas_names(prefix: str, registers: int, swiglu: bool, chunks: int) -> None:
    """Released and training checkpoints of DINOv2: chunks or none, SwiGLU or not, registers or none; no heads."""
    net = replace(META, registers=registers, swiglu=swiglu, chunks=chunks)
    state = random_state(published_shapes(net))
    published = {prefix + key: value for key, value in state.items()}
    if prefix.startswith("teacher"):
        published |= {"teacher.dino_head.mlp.0.weight": torch.ones(2), "student.backbone.cls_token": torch.ones(1)}
    network = timm_network(net)
    load_renamed(published, "dinov2", network)
    assert largest_difference(network, reference_tokens(net, state, X)) < 1e-5


@pytest.mark.parametrize(("registers", "swiglu"), [(0, False), (0, True), (4, True), (4, False)])
def test_transformers_names_of_dinov2(registers: int, swiglu: bool) -> None:
    """Phikon-v2 (plain), Midnight (SwiGLU) and Hibou (SwiGLU and registers)."""
    net = replace(THEIRS, registers=registers, swiglu=swiglu)
    state = random_state(published_shapes(net))
    network = timm_network(net)
    load_renamed(state, "transformers-dinov2", network)
    assert largest_difference(network, reference_tokens(net, state, X)) < 1e-5


def test_transformers_names_of_vit() -> None:
    """Phikon: its layer norms have transformers' epsilon; the pooler, which its vector does not use, is left out."""
    net = replace(META, family="transformers-vit")
    state = random_state(published_shapes(net))
    state = {key: value * 1e-3 if "embeddings" in key else value for key, value in state.items()}
    network = timm_network(net)
    load_renamed({f"vit.{key}": value for key, value in state.items()}, "transformers-vit", network)
    assert largest_difference(network, reference_tokens(net, state, X)) < 1e-5


@pytest.mark.parametrize(
    ("family", "registers", "how"),
    [
        ("transformers-dinov2", 0, {"size": (3, 3), "antialias": False}),
        ("transformers-dinov2", 4, {"size": (3, 3), "antialias": True}),
        ("dinov2", 0, {"scale_factor": ((3 + 0.1) / 7, (3 + 0.1) / 7)}),
        ("dinov2", 4, {"size": (3, 3), "antialias": True}),
    ],
)
def test_positions_are_resampled_as_their_library_does(family: Any, registers: int, how: dict[str, Any]) -> None:
    """Position embeddings of a bigger image (Midnight: 518 px), which timm would antialias."""
    net = replace(META, family=family, registers=registers, side=7)
    state = random_state(published_shapes(net))
    network = timm_network(net)
    load_renamed(state, family, network)
    positions = resampled(state[net.names["positions"]], 3, **how)
    assert largest_difference(network, reference_tokens(net, state, X, positions)) < 1e-5


def test_what_is_surplus_or_lacking_is_not_hidden() -> None:
    """A key map renames; a foreign tensor stays, a lacking one stays lacking, and the input is used up."""
    state = random_state(published_shapes(THEIRS)) | {"surprise.weight": torch.ones(1)}
    state.pop("encoder.layer.1.attention.attention.key.bias")
    named = rename_tensors(state, "transformers-dinov2", {"pos_embed": (1, 10, WIDTH)})
    assert "surprise.weight" in named
    assert "blocks.1.attn.qkv.bias" not in named and "blocks.1.attn.query.bias" in named
    assert state == {}


def test_timm_names_pass_through() -> None:
    """A copy of a DINOv2 checkpoint that has timm's names already (the hub's DINOBloom) is left as it is."""
    state = timm_network(replace(META, registers=4, swiglu=True)).state_dict()
    wanted = {key: tuple(value.shape) for key, value in state.items()}
    named = rename_tensors(dict(state), "dinov2", wanted)
    assert named.keys() == state.keys()
    assert all(torch.equal(named[key], state[key]) for key in state)


def test_an_unknown_key_map_names_the_known_ones() -> None:
    """One line."""
    with pytest.raises(ModelError, match=f"no key map 'flax'; there are: {', '.join(KEY_MAPS)}"):
        rename_tensors({}, "flax", {})


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2-swiglu", "registers", "dinov2-518"])
def test_transformers_itself_agrees(name: str, tmp_path: Path) -> None:
    """The same tokens as its own model, from the file that it writes: its modules have other names than its files."""
    transformers = importlib.import_module("transformers")
    side = 7 if name == "dinov2-518" else 3
    shared = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "patch_size": CELL,
        "image_size": side * CELL,
    }  # fmt: skip
    torch.manual_seed(3)
    if name == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(intermediate_size=4 * WIDTH, **shared))
    elif name == "registers":
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=4, use_swiglu_ffn=True, **shared)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.Dinov2Config(use_swiglu_ffn=name == "dinov2-swiglu", **shared)
        model = transformers.Dinov2Model(config)
    with torch.inference_mode():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.3 + (0.5 if value.ndim == 1 else 0))
        want = model.eval()(pixel_values=X).last_hidden_state
    family: Any = "transformers-vit" if name == "vit" else "transformers-dinov2"
    swiglu, registers = name in ("dinov2-swiglu", "registers"), 4 if name == "registers" else 0
    network = timm_network(replace(META, family=family, swiglu=swiglu, registers=registers))
    model.save_pretrained(tmp_path)
    load_renamed(load_file(tmp_path / "model.safetensors"), family, network)
    assert largest_difference(network, want) < 1e-5
    assert set(KEY_MAPS) == {"dinov2", "transformers-dinov2", "transformers-dinov3", "transformers-vit"}


@pytest.mark.parametrize(("gated", "biases"), [(False, "zero"), (True, "none"), (False, "kept"), (True, "kept")])
def test_transformers_dinov3_agrees(gated: bool, biases: str, tmp_path: Path) -> None:
    """As facebook/dinov3-* are published: S, B and L plain, H+ gated; biases that add nothing are left out, others are
    kept where the network has them, and are a surplus where it has not."""
    transformers = importlib.import_module("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, patch_size=16, image_size=64,
        intermediate_size=4 * WIDTH, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", num_register_tokens=4,
        query_bias=biases != "none", value_bias=biases != "none",
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.DINOv3ViTModel(config).eval()
    x = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        for name, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * 0.3 + (0.5 if value.ndim == 1 else 0))
            if biases == "zero" and name.endswith(("q_proj.bias", "v_proj.bias")):
                value.zero_()
        want = model(pixel_values=x).last_hidden_state
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        name = f"vit_{'huge_plus' if gated else 'small'}_patch16_dinov3{'_qkvb' if biases == 'kept' else ''}"
        arguments: dict[str, Any] = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 4}
        network = timm.create_model(name, num_classes=0, **arguments).eval()
        load_renamed(state, "transformers-dinov3", network)
        found = network.forward_features(x)
    assert float((found - want).abs().max() / want.abs().max()) < 1e-5
    if biases == "kept":
        plain = timm.create_model(name.removesuffix("_qkvb"), num_classes=0, **arguments)
        wanted = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
        assert "blocks.0.attn.q_bias" in rename_tensors(dict(state), "transformers-dinov3", wanted)
