"""Checkpoints in Meta's and transformers' names give the vectors of those libraries in timm's networks.

The references are written from the published equations, on the published names; transformers itself is compared with
where it is installed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError
from wsi_mmm.model.key_maps import KEY_MAPS, prepare_network, rename_tensors

WIDTH, HEADS, DEPTH, CELL = 24, 2, 3, 14
State = dict[str, Tensor]


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    """Tensors of those shapes; gains and layer scales away from 0."""
    draw = torch.Generator().manual_seed(7)
    return {
        key: torch.randn(shape, generator=draw) * 0.3 + (0.5 if len(shape) == 1 else 0) for key, shape in shapes.items()
    }


def hidden_width(swiglu: bool) -> int:
    """Channels inside a block's perceptron: those of DINOv2's rule for a ratio of 4."""
    return (int(WIDTH * 4 * 2 / 3) + 7) // 8 * 8 if swiglu else WIDTH * 4


def dinov2_shapes(side: int, registers: int, swiglu: bool, chunks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of facebookresearch/dinov2's DinoVisionTransformer."""
    inner = hidden_width(swiglu)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + side * side, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, CELL, CELL),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    first, second = ("w12", "w3") if swiglu else ("fc1", "fc2")
    for i in range(DEPTH):
        block = f"blocks.{i // math.ceil(DEPTH / chunks)}.{i}" if chunks else f"blocks.{i}"
        shapes |= {f"{block}.{name}.{kind}": (WIDTH,) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{block}.ls1.gamma": (WIDTH,), f"{block}.ls2.gamma": (WIDTH,)}
        shapes |= {f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH), f"{block}.attn.qkv.bias": (3 * WIDTH,)}
        shapes |= {f"{block}.attn.proj.weight": (WIDTH, WIDTH), f"{block}.attn.proj.bias": (WIDTH,)}
        wide = 2 * inner if swiglu else inner
        shapes |= {f"{block}.mlp.{first}.weight": (wide, WIDTH), f"{block}.mlp.{first}.bias": (wide,)}
        shapes |= {f"{block}.mlp.{second}.weight": (WIDTH, inner), f"{block}.mlp.{second}.bias": (WIDTH,)}
    return shapes


def transformers_shapes(side: int, registers: int, swiglu: bool, vit: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' Dinov2Model and Dinov2WithRegistersModel, or ViTModel."""
    inner = hidden_width(swiglu)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + side * side, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, CELL, CELL),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    if not vit:
        shapes["embeddings.mask_token"] = (1, WIDTH)
    if registers:
        shapes["embeddings.register_tokens"] = (1, registers, WIDTH)
    norms = ("layernorm_before", "layernorm_after") if vit else ("norm1", "norm2")
    first, second = ("intermediate.dense", "output.dense") if vit else ("mlp.fc1", "mlp.fc2")
    if swiglu:
        first, second = "mlp.weights_in", "mlp.weights_out"
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}"
        shapes |= {f"{layer}.{name}.{kind}": (WIDTH,) for name in norms for kind in ("weight", "bias")}
        if not vit:
            shapes |= {f"{layer}.layer_scale1.lambda1": (WIDTH,), f"{layer}.layer_scale2.lambda1": (WIDTH,)}
        for name in (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
        ):
            shapes |= {f"{layer}.{name}.weight": (WIDTH, WIDTH), f"{layer}.{name}.bias": (WIDTH,)}
        wide = 2 * inner if swiglu else inner
        shapes |= {f"{layer}.{first}.weight": (wide, WIDTH), f"{layer}.{first}.bias": (wide,)}
        shapes |= {f"{layer}.{second}.weight": (WIDTH, inner), f"{layer}.{second}.bias": (WIDTH,)}
    if vit:
        shapes |= {"pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,)}
    return shapes


def reference_tokens(state: State, x: Tensor, names: dict[str, str], positions: Tensor, eps: float) -> Tensor:
    """All tokens after the last norm, by the equations of the papers; ``names``: theirs for each part."""
    cells = functional.conv2d(x, state[names["cells"] + ".weight"], state[names["cells"] + ".bias"], stride=CELL)
    tokens = (
        torch.cat([state[names["cls"]].expand(len(x), -1, -1), cells.flatten(2).transpose(1, 2)], dim=1) + positions
    )
    if names["registers"] in state:
        tokens = torch.cat([tokens[:, :1], state[names["registers"]].expand(len(x), -1, -1), tokens[:, 1:]], dim=1)

    def norm(values: Tensor, name: str) -> Tensor:
        return functional.layer_norm(values, (WIDTH,), state[name + ".weight"], state[name + ".bias"], eps)

    def linear(values: Tensor, name: str) -> Tensor:
        return functional.linear(values, state[name + ".weight"], state[name + ".bias"])

    for i in range(DEPTH):
        block = names["block"].format(i=i)
        y = norm(tokens, block + names["norm1"])
        if names["qkv"]:
            q, k, v = linear(y, block + names["qkv"]).chunk(3, dim=-1)
        else:
            q, k, v = (linear(y, f"{block}attention.attention.{part}") for part in ("query", "key", "value"))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = ((q @ k.transpose(-2, -1)) / math.sqrt(WIDTH / HEADS)).softmax(-1) @ v
        y = linear(mixed.transpose(1, 2).flatten(2), block + names["proj"])
        tokens = tokens + y * state.get(block + names["scale1"], torch.ones(1))
        y = linear(norm(tokens, block + names["norm2"]), block + names["first"])
        if names["gated"]:
            one, two = y.chunk(2, dim=-1)
            y = functional.silu(one) * two
        else:
            y = functional.gelu(y)
        y = linear(y, block + names["second"])
        tokens = tokens + y * state.get(block + names["scale2"], torch.ones(1))
    return norm(tokens, names["last"])


def resampled(positions: Tensor, side: int, target: int, **how: Any) -> Tensor:
    """Position embeddings on another grid; ``how``: of torch's interpolation."""
    grid = positions[:, 1:].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, mode="bicubic", **how).permute(0, 2, 3, 1).reshape(1, target * target, WIDTH)
    return torch.cat([positions[:, :1], grid], dim=1)


def timm_network(registers: int, swiglu: bool, scales: bool = True, side: int = 3) -> nn.Module:
    """A small network of timm's, as the registry's arguments describe big ones."""
    name = "vit_giant_patch14_dinov2" if swiglu else "vit_small_patch14_dinov2" if scales else "vit_small_patch16_224"
    extra: dict[str, Any] = {"patch_size": CELL}
    if registers:
        extra |= {"reg_tokens": registers, "no_embed_class": True}
    ratio = 2 * hidden_width(True) / WIDTH if swiglu else 4
    return timm.create_model(
        name,
        img_size=side * CELL,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=ratio,
        num_classes=0,
        **extra,
    ).eval()


META = {
    "cells": "patch_embed.proj", "cls": "cls_token", "registers": "register_tokens", "block": "blocks.{i}.",
    "norm1": "norm1", "norm2": "norm2", "qkv": "attn.qkv", "proj": "attn.proj", "scale1": "ls1.gamma",
    "scale2": "ls2.gamma", "last": "norm",
}  # fmt: skip
THEIRS = {
    "cells": "embeddings.patch_embeddings.projection", "cls": "embeddings.cls_token",
    "registers": "embeddings.register_tokens", "block": "encoder.layer.{i}.", "qkv": "",
    "proj": "attention.output.dense", "last": "layernorm",
}  # fmt: skip
THEIR_DINOV2 = THEIRS | {
    "norm1": "norm1",
    "norm2": "norm2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
}
THEIR_VIT = THEIRS | {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "scale1": "none", "scale2": "none",
    "first": "intermediate.dense", "second": "output.dense", "gated": "",
}  # fmt: skip


def load_renamed(state: State, key_map: str, network: nn.Module) -> None:
    """Load a checkpoint strictly through a key map."""
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(rename_tensors(dict(state), key_map, wanted), strict=True)
    prepare_network(network, key_map)


def largest_difference(network: Any, x: Tensor, want: Tensor) -> float:
    """Of all tokens, relative to the largest."""
    with torch.inference_mode():
        return float((network.forward_features(x) - want).abs().max() / want.abs().max())


X = torch.randn(2, 3, 3 * CELL, 3 * CELL, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prefix", ["", "teacher.backbone.", "backbone."])
@pytest.mark.parametrize(("registers", "swiglu"), [(0, False), (4, True)])
@pytest.mark.parametrize("chunks", [0, 2])
def test_metas_names(prefix: str, registers: int, swiglu: bool, chunks: int) -> None:
    """Released and training checkpoints of DINOv2: chunks or none, SwiGLU or not, registers or none; no heads."""
    flat = random_state(dinov2_shapes(3, registers, swiglu, 0))
    first, second = ("mlp.w12", "mlp.w3") if swiglu else ("mlp.fc1", "mlp.fc2")
    names = META | {"first": first, "second": second, "gated": "yes" if swiglu else ""}
    want = reference_tokens(flat, X, names, flat["pos_embed"], 1e-6)
    written = dict(zip(dinov2_shapes(3, registers, swiglu, chunks), flat.values(), strict=True))
    published = {prefix + key: value for key, value in written.items()}
    if prefix.startswith("teacher"):
        published |= {"teacher.dino_head.mlp.0.weight": torch.ones(2), "student.backbone.cls_token": torch.ones(1)}
    network = timm_network(registers, swiglu)
    load_renamed(published, "dinov2", network)
    assert largest_difference(network, X, want) < 1e-5


@pytest.mark.parametrize(("registers", "swiglu"), [(0, False), (0, True), (4, True), (4, False)])
def test_transformers_names_of_dinov2(registers: int, swiglu: bool) -> None:
    """Phikon-v2 (plain), Midnight (SwiGLU) and Hibou (SwiGLU and registers)."""
    state = random_state(transformers_shapes(3, registers, swiglu))
    first, second = ("mlp.weights_in", "mlp.weights_out") if swiglu else ("mlp.fc1", "mlp.fc2")
    names = THEIR_DINOV2 | {"first": first, "second": second, "gated": "yes" if swiglu else ""}
    want = reference_tokens(state, X, names, state["embeddings.position_embeddings"], 1e-6)
    network = timm_network(registers, swiglu)
    load_renamed(state, "transformers-dinov2", network)
    assert largest_difference(network, X, want) < 1e-5


def test_transformers_names_of_vit() -> None:
    """Phikon: its layer norms have transformers' epsilon; the pooler, which its vector does not use, is left out."""
    state = random_state(transformers_shapes(3, 0, False, vit=True))
    state = {key: value * 1e-3 if "projection" in key or "embeddings" in key else value for key, value in state.items()}
    want = reference_tokens(state, X, THEIR_VIT, state["embeddings.position_embeddings"], 1e-12)
    network = timm_network(0, False, scales=False)
    load_renamed({f"vit.{key}": value for key, value in state.items()}, "transformers-vit", network)
    assert largest_difference(network, X, want) < 1e-5


@pytest.mark.parametrize(
    ("key_map", "registers", "how"),
    [
        ("transformers-dinov2", 0, {"size": (3, 3), "antialias": False}),
        ("transformers-dinov2", 4, {"size": (3, 3), "antialias": True}),
        ("dinov2", 0, {"scale_factor": ((3 + 0.1) / 7, (3 + 0.1) / 7)}),
        ("dinov2", 4, {"size": (3, 3), "antialias": True}),
    ],
)
def test_positions_are_resampled_as_their_library_does(key_map: str, registers: int, how: dict[str, Any]) -> None:
    """Position embeddings of a bigger image (Midnight: 518 px), which timm would antialias."""
    meta = key_map == "dinov2"
    state = random_state(dinov2_shapes(7, registers, False, 0) if meta else transformers_shapes(7, registers, False))
    positions = state["pos_embed" if meta else "embeddings.position_embeddings"]
    names = (META if meta else THEIR_DINOV2) | {"first": "mlp.fc1", "second": "mlp.fc2", "gated": ""}
    want = reference_tokens(state, X, names, resampled(positions, 7, 3, **how), 1e-6)
    network = timm_network(registers, False)
    load_renamed(state, key_map, network)
    assert largest_difference(network, X, want) < 1e-5


def test_what_is_surplus_or_lacking_is_not_hidden() -> None:
    """A key map renames; a foreign tensor stays, a lacking one stays lacking, and the input is used up."""
    state = random_state(transformers_shapes(3, 0, False)) | {"surprise.weight": torch.ones(1)}
    state.pop("encoder.layer.1.attention.attention.key.bias")
    named = rename_tensors(state, "transformers-dinov2", {"pos_embed": (1, 10, WIDTH)})
    assert "surprise.weight" in named
    assert "blocks.1.attn.qkv.bias" not in named and "blocks.1.attn.query.bias" in named
    assert state == {}


def test_timm_names_pass_through() -> None:
    """A copy of a DINOv2 checkpoint that has timm's names already (the hub's DINOBloom) is left as it is."""
    network = timm_network(4, True)
    state = network.state_dict()
    wanted = {key: tuple(value.shape) for key, value in state.items()}
    named = rename_tensors(dict(state), "dinov2", wanted)
    assert named.keys() == state.keys()
    assert all(torch.equal(named[key], state[key]) for key in state)


def test_an_unknown_key_map_names_the_known_ones() -> None:
    """One line."""
    with pytest.raises(
        ModelError, match=r"no key map 'flax'; there are: dinov2, transformers-dinov2, transformers-vit"
    ):
        rename_tensors({}, "flax", {})


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2-swiglu", "registers", "dinov2-518"])
def test_transformers_itself_agrees(name: str) -> None:
    """Where transformers is installed: the same tokens as its own model, from its own state dict."""
    transformers = pytest.importorskip("transformers")
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
    network = timm_network(4 if name == "registers" else 0, "swiglu" in name or name == "registers", name != "vit")
    load_renamed(dict(model.state_dict()), "transformers-vit" if name == "vit" else "transformers-dinov2", network)
    assert largest_difference(network, X, want) < 1e-5
    assert set(KEY_MAPS) == {"dinov2", "transformers-dinov2", "transformers-vit"}
