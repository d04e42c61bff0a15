"""Checkpoints under the names of other libraries: their tensors get timm's names, their vectors stay the same.

``dinov2``: Meta's names, with blocks in chunks and ``w12``/``w3``, as training wrote them or as they are released.
``transformers-dinov2``: Dinov2Model and Dinov2WithRegistersModel. ``transformers-dinov3``: DINOv3ViTModel, as Meta
publishes it on the hub; timm's network has no biases of queries and values, which are zero there. ``transformers-vit``:
ViTModel.

Position embeddings of another image size are resampled as that library does it: bicubic; antialiased only where the
network has registers; Meta's without registers with the offset of 0.1 that it was released with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError
from wsi_mmm.model.networks import grid_side

_WRAPPERS = re.compile(r"^(module|teacher|backbone|model|state_dict|dinov2|vit)\.")
_HEADS = ("dino_head.", "ibot_head.", "pooler.", "classifier.")
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")
_LAYER = re.compile(r"^(?:encoder\.)?layer\.(\d+)\.")
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.(query|key|value)\.(weight|bias)$")


@dataclass(frozen=True)
class KeyMap:
    """Pairs of (their part of a name, timm's); ``resamples``: the library fits position embeddings to the image;
    ``offset``: what it adds to the grid then, without registers; ``epsilon`` of its layer norms (None: timm's)."""

    parts: tuple[tuple[str, str], ...]
    resamples: bool
    offset: float = 0.0
    epsilon: float | None = None


_EMBEDDINGS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("attention.attention.", "attn."),
    ("attention.output.dense", "attn.proj"),
)

KEY_MAPS = {
    "dinov2": KeyMap(
        (("register_tokens", "reg_token"), (".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2.")), True, 0.1
    ),
    "transformers-dinov2": KeyMap(
        (
            *_EMBEDDINGS,
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("mlp.weights_in", "mlp.fc1"),
            ("mlp.weights_out", "mlp.fc2"),
            ("layernorm.", "norm."),
        ),
        True,
        epsilon=1e-6,
    ),
    "transformers-dinov3": KeyMap(
        (
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.mask_token", "mask_token"),
            ("embeddings.register_tokens", "reg_token"),
            ("embeddings.patch_embeddings.", "patch_embed.proj."),
            (".attention.q_proj.bias", ".attn.q_bias"),
            (".attention.v_proj.bias", ".attn.v_bias"),
            (".attention.q_proj.", ".attn.query."),
            (".attention.k_proj.", ".attn.key."),
            (".attention.v_proj.", ".attn.value."),
            (".attention.o_proj.", ".attn.proj."),
            ("layer_scale1.lambda1", "gamma_1"),
            ("layer_scale2.lambda1", "gamma_2"),
            (".mlp.gate_proj.", ".mlp.fc1_g."),
            (".mlp.up_proj.", ".mlp.fc1."),
            (".mlp.down_proj.", ".mlp.fc2."),
        ),
        False,
    ),
    "transformers-vit": KeyMap(
        (
            *_EMBEDDINGS,
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("layernorm.", "norm."),
        ),
        False,
        epsilon=1e-12,
    ),
}


def rename_tensors(
    tensors: dict[str, Tensor], key_map: str, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under timm's names, for a network whose tensors have the shapes ``wanted``.

    ``tensors`` is emptied on the way, so that hardly more than one copy is in memory. Heads and mask tokens of training
    are left out; whatever else is surplus or lacking is left to the strict comparison with the network. ModelError:
    there is no such key map.
    """
    if not key_map:
        return tensors
    rules = _known_map(key_map)
    teacher = any(key.startswith("teacher.") for key in tensors)
    named: dict[str, Tensor] = {}
    for key in list(tensors):
        value = tensors.pop(key)
        name = _timm_name(key, rules)
        if name is not None and not (teacher and not key.startswith("teacher.")):
            named[name] = value
    _join_qkv(named)
    _drop_zero_biases(named, wanted)
    _name_gates(named)
    _fit_positions(named, rules, wanted.get("pos_embed"))
    return named


def prepare_network(network: nn.Module, key_map: str) -> None:
    """Give the layer norms of a timm network the epsilon that the library of ``key_map`` computes with."""
    epsilon = _known_map(key_map).epsilon if key_map else None
    for module in network.modules():
        if epsilon is not None and isinstance(module, nn.LayerNorm):
            module.eps = epsilon


def _known_map(name: str) -> KeyMap:
    if name not in KEY_MAPS:
        raise ModelError(f"there is no key map '{name}'; there are: {', '.join(KEY_MAPS)}")
    return KEY_MAPS[name]


def _timm_name(key: str, rules: KeyMap) -> str | None:
    """None: a tensor that only training needs."""
    while (shorter := _WRAPPERS.sub("", key)) != key:
        key = shorter
    key = _LAYER.sub(r"blocks.\1.", _CHUNK.sub(r"blocks.\1.", key))
    for theirs, ours in rules.parts:
        key = key.replace(theirs, ours)
    return None if key == "mask_token" or key.startswith(_HEADS) else key


def _join_qkv(named: dict[str, Tensor]) -> None:
    """Queries, keys and values of a block in one tensor, as timm has them."""
    found = {match.group(1, 3) for key in named if (match := _QKV.match(key))}
    for block, kind in found:
        parts = [f"blocks.{block}.attn.{part}.{kind}" for part in ("query", "key", "value")]
        if all(part in named for part in parts):
            named[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([named.pop(part) for part in parts])


def _drop_zero_biases(named: dict[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Leave out biases of queries and values that add nothing, where the network has no place for them."""
    for key in [key for key in named if key.endswith((".attn.q_bias", ".attn.v_bias")) and key not in wanted]:
        if named[key].is_meta or not named[key].any():
            del named[key]


def _name_gates(named: dict[str, Tensor]) -> None:
    """The factor beside a gate (``fc1_g``) is ``fc1_x`` in timm."""
    for key in [key for key in named if key.replace(".mlp.fc1.", ".mlp.fc1_g.") in named and ".mlp.fc1." in key]:
        named[key.replace(".mlp.fc1.", ".mlp.fc1_x.")] = named.pop(key)


def _fit_positions(named: dict[str, Tensor], rules: KeyMap, due: tuple[int, ...] | None) -> None:
    """Position embeddings [1, 1 + side^2, c] as the network has them: with or without a place for the class token."""
    positions, token = named.get("pos_embed"), named.get("cls_token")
    if positions is None or token is None or due is None or positions.ndim != 3 or len(due) != 3:
        return
    side = grid_side(positions.shape[1] - 1)
    if side is None:
        return  # without a place for the class token, as timm writes them: nothing to do
    first, grid = positions[:, :1], positions[:, 1:]
    folded = grid_side(due[1]) is not None
    target = grid_side(due[1] if folded else due[1] - 1)
    if rules.resamples and target is not None and target != side:
        grid = _resample_grid(grid, side, target, rules.offset, "reg_token" in named)
    if folded:  # a constant that is added to the class token: timm keeps it there
        named["cls_token"] = token + first
    named["pos_embed"] = grid if folded else torch.cat([first, grid], dim=1)


def _resample_grid(grid: Tensor, side: int, target: int, offset: float, registers: bool) -> Tensor:
    maps = grid.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resize: Callable[..., Tensor] = functional.interpolate
    if offset and not registers:
        scale = (target + offset) / side
        maps = resize(maps, scale_factor=(scale, scale), mode="bicubic")
    else:
        maps = resize(maps, size=(target, target), mode="bicubic", align_corners=False, antialias=registers)
    return maps.permute(0, 2, 3, 1).reshape(1, target * target, -1).to(grid.dtype)
