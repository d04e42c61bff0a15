"""Checkpoints of vision transformers under the names that others publish, and the tokens that they mean.

Names and shapes are of facebookresearch/dinov2 (``dinov2/models/vision_transformer.py``) and of transformers'
``modeling_dinov2.py``, ``modeling_dinov2_with_registers.py`` and ``modeling_vit.py``; `reference_tokens` computes the
published equations on those names, with nothing of timm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Family = Literal["dinov2", "transformers-dinov2", "transformers-vit"]


@dataclass(frozen=True)
class Transformer:
    """``cell``: px of a token; ``side``: tokens per side of the image that its positions are for; ``chunks`` of blocks
    in Meta's training checkpoints (0: none)."""

    family: Family
    width: int
    heads: int
    depth: int
    cell: int
    side: int
    registers: int = 0
    swiglu: bool = False
    chunks: int = 0

    @property
    def inner(self) -> int:
        """Channels inside a block's perceptron, by DINOv2's rule for a ratio of 4."""
        return (int(self.width * 4 * 2 / 3) + 7) // 8 * 8 if self.swiglu else self.width * 4

    @property
    def names(self) -> dict[str, str]:
        """The family's name of each part; of a block's parts behind ``block``."""
        if self.family == "dinov2":
            return {
                "cells": "patch_embed.proj", "cls": "cls_token", "positions": "pos_embed", "mask": "mask_token",
                "registers": "register_tokens", "norm1": "norm1", "norm2": "norm2", "proj": "attn.proj",
                "scale1": "ls1.gamma", "scale2": "ls2.gamma", "last": "norm",
                "first": "mlp.w12" if self.swiglu else "mlp.fc1", "second": "mlp.w3" if self.swiglu else "mlp.fc2",
            }  # fmt: skip
        vit = self.family == "transformers-vit"
        first, second = ("intermediate.dense", "output.dense") if vit else ("mlp.fc1", "mlp.fc2")
        return {
            "cells": "embeddings.patch_embeddings.projection", "cls": "embeddings.cls_token",
            "positions": "embeddings.position_embeddings", "mask": "" if vit else "embeddings.mask_token",
            "registers": "embeddings.register_tokens", "norm1": "layernorm_before" if vit else "norm1",
            "norm2": "layernorm_after" if vit else "norm2", "proj": "attention.output.dense",
            "scale1": "" if vit else "layer_scale1.lambda1", "scale2": "" if vit else "layer_scale2.lambda1",
            "last": "layernorm", "first": "mlp.weights_in" if self.swiglu else first,
            "second": "mlp.weights_out" if self.swiglu else second,
        }  # fmt: skip

    def block(self, i: int) -> str:
        """What the names of block ``i`` begin with."""
        if self.family != "dinov2":
            return f"encoder.layer.{i}."
        return f"blocks.{i // math.ceil(self.depth / self.chunks)}.{i}." if self.chunks else f"blocks.{i}."


def published_shapes(net: Transformer) -> Shapes:
    """Name and shape of every tensor of a checkpoint."""
    wide, names = net.width, net.names
    shapes: Shapes = {
        names["cls"]: (1, 1, wide),
        names["positions"]: (1, 1 + net.side**2, wide),
        names["cells"] + ".weight": (wide, 3, net.cell, net.cell),
        names["cells"] + ".bias": (wide,),
        **_norm(names["last"], wide),
    }
    if names["mask"]:
        shapes[names["mask"]] = (1, wide)
    if net.registers:
        shapes[names["registers"]] = (1, net.registers, wide)
    for i in range(net.depth):
        block = net.block(i)
        shapes |= _norm(block + names["norm1"], wide) | _norm(block + names["norm2"], wide)
        shapes |= {block + names[part]: (wide,) for part in ("scale1", "scale2") if names[part]}
        if net.family == "dinov2":
            shapes |= _linear(block + "attn.qkv", wide, 3 * wide)
        else:
            for part in ("query", "key", "value"):
                shapes |= _linear(f"{block}attention.attention.{part}", wide, wide)
        shapes |= _linear(block + names["proj"], wide, wide)
        shapes |= _linear(block + names["first"], wide, 2 * net.inner if net.swiglu else net.inner)
        shapes |= _linear(block + names["second"], net.inner, wide)
    if net.family == "transformers-vit":
        shapes |= _linear("pooler.dense", wide, wide)
    return shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def random_state(shapes: Shapes, seed: int = 7) -> State:
    """Tensors of those shapes; gains and layer scales away from 0."""
    draw = torch.Generator().manual_seed(seed)
    return {key: torch.randn(s, generator=draw) * 0.3 + (0.5 if len(s) == 1 else 0) for key, s in shapes.items()}


def resampled(positions: Tensor, target: int, **how: Any) -> Tensor:
    """Position embeddings on a grid of ``target`` tokens per side; ``how``: of torch's bicubic interpolation."""
    side, width = math.isqrt(positions.shape[1] - 1), positions.shape[2]
    grid = positions[:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, mode="bicubic", **how).permute(0, 2, 3, 1).reshape(1, target**2, width)
    return torch.cat([positions[:, :1], grid], dim=1)


def reference_tokens(net: Transformer, state: State, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """All tokens after the last norm, [n, 1 + registers + cells, width]; ``positions``: in place of the state's own."""
    names, eps = net.names, 1e-12 if net.family == "transformers-vit" else 1e-6
    if positions is None:
        positions = state[names["positions"]]

    def norm(values: Tensor, name: str) -> Tensor:
        return functional.layer_norm(values, (net.width,), state[name + ".weight"], state[name + ".bias"], eps)

    def linear(values: Tensor, name: str) -> Tensor:
        return functional.linear(values, state[name + ".weight"], state[name + ".bias"])

    cells = functional.conv2d(x, state[names["cells"] + ".weight"], state[names["cells"] + ".bias"], stride=net.cell)
    tokens = torch.cat([state[names["cls"]].expand(len(x), -1, -1), cells.flatten(2).transpose(1, 2)], 1) + positions
    if net.registers:
        tokens = torch.cat([tokens[:, :1], state[names["registers"]].expand(len(x), -1, -1), tokens[:, 1:]], dim=1)
    for i in range(net.depth):
        block = net.block(i)
        y = norm(tokens, block + names["norm1"])
        if net.family == "dinov2":
            q, k, v = linear(y, block + "attn.qkv").chunk(3, dim=-1)
        else:
            q, k, v = (linear(y, f"{block}attention.attention.{part}") for part in ("query", "key", "value"))
        q, k, v = (t.unflatten(-1, (net.heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = ((q @ k.transpose(-2, -1)) / math.sqrt(net.width / net.heads)).softmax(-1) @ v
        y = linear(mixed.transpose(1, 2).flatten(2), block + names["proj"])
        tokens = tokens + (y * state[block + names["scale1"]] if names["scale1"] else y)
        y = linear(norm(tokens, block + names["norm2"]), block + names["first"])
        if net.swiglu:
            one, two = y.chunk(2, dim=-1)
            y = functional.silu(one) * two
        else:
            y = functional.gelu(y)
        y = linear(y, block + names["second"])
        tokens = tokens + (y * state[block + names["scale2"]] if names["scale2"] else y)
    return norm(tokens, names["last"])
