"""How the authors of each registered encoder, or the tools that run it, make its network and its vector.

Written from the sources that the registry cites, in their own words: timm's calls with their arguments (functions
included), transformers' and Meta's networks by their published names. `encoder_table` makes the table of
docs/encoders.md; ``python -m helpers.published_encoders`` (with PYTHONPATH=tests) writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.resnet import Bottleneck, ResNet

from helpers.published_names import State, Transformer, published_shapes, random_state, reference_tokens, resampled
from wsi_mmm.model.networks import create_network
from wsi_mmm.model.registry import EncoderEntry, encoder_entries

PAGE = Path(__file__).resolve().parents[2] / "docs" / "encoders.md"
BEGIN, END = "<!-- begin of the encoder table: made by tests/helpers/published_encoders.py -->", "<!-- end -->"
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
_DRAWS = {
    "uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "constant_",
    "ones_", "zeros_", "zero_", "fill_", "erfinv_", "mul_", "add_", "clamp_",
}  # fmt: skip
_GATED: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}


@dataclass(frozen=True)
class Call:
    """A network of timm or torchvision: ``make(**arguments)``; ``small``: what makes a cheap one of the same kind;
    ``pool``: from its tokens or features to the vector (None: what it returns)."""

    make: Callable[..., Any]
    arguments: dict[str, Any]
    small: dict[str, Any]
    pool: Callable[[Any], Tensor] | None = None


def _timm(name: str, pool: Callable[[Any], Tensor] | None = None, **arguments: Any) -> Call:
    def make(**given: Any) -> Any:
        return timm.create_model(name, pretrained=False, num_classes=0, **given)

    return Call(make, arguments, SMALL, pool)


def _convolutions(name: str, **small: Any) -> Call:
    return replace(_timm(name), small=small)


def _concatenated(first: int) -> Callable[[Any], Tensor]:
    """The class token and the mean of tokens[first:], as the cards of Virchow write it."""
    return lambda output: torch.cat([output[:, 0], output[:, first:].mean(1)], dim=-1)


def _class_token(output: Any) -> Tensor:
    first: Tensor = output[:, 0]
    return first


def _lunit_resnet(**arguments: Any) -> Any:
    trunk = ResNet(Bottleneck, **arguments)
    trunk.fc = nn.Identity()
    return trunk


def _kaiko(name: str) -> Call:
    return _timm(name, dynamic_img_size=True)


_UNI = _timm("vit_large_patch16_224", img_size=224, patch_size=16, init_values=1e-5, dynamic_img_size=True)
_OPTIMUS = _timm("vit_giant_patch14_reg4_dinov2", img_size=224, init_values=1e-5, dynamic_img_size=False)
_VIRCHOW: dict[str, Any] = {
    "img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "depth": 32, **_GATED,
}  # fmt: skip
_LUNIT = Call(_lunit_resnet, {"layers": [3, 4, 6, 3]}, {"layers": [1, 1, 1, 1]})
_GIGAPATH: dict[str, Any] = {"img_size": 224, "patch_size": 16, "init_values": 1e-5, **_GATED}


_THIN: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


def _lunit_vit(cell: int) -> Call:
    made = {"img_size": 224, "patch_size": cell, "embed_dim": 384, "num_heads": 6, "num_classes": 0}
    return Call(VisionTransformer, made, SMALL)


CALLS: dict[str, Call] = {
    "uni": _UNI, "mstar": _UNI, "pathorchestra": _UNI, "h-optimus-0": _OPTIMUS, "h-optimus-1": _OPTIMUS,
    "uni2-h": _timm(
        "vit_giant_patch14_224", img_size=224, patch_size=14, depth=24, num_heads=24, init_values=1e-5,
        embed_dim=1536, mlp_ratio=2.66667 * 2, no_embed_class=True, reg_tokens=8, dynamic_img_size=True, **_GATED,
    ),
    "virchow": _timm("vit_huge_patch14_224", _concatenated(1), **_VIRCHOW),
    "virchow2": _timm("vit_huge_patch14_224", _concatenated(5), reg_tokens=4, **_VIRCHOW),
    "h0-mini": _timm(
        "vit_base_patch14_reg4_dinov2", _class_token, img_size=224, init_values=1e-5, reg_tokens=4,
        mlp_ratio=5.33334, global_pool="", dynamic_img_size=True, **_GATED,
    ),
    "gigapath": _timm(
        "vit_giant_patch14_dinov2", embed_dim=1536, depth=40, num_heads=24, mlp_ratio=5.33334, **_GIGAPATH
    ),
    "gigapath-flash": Call(
        VisionTransformer,
        {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 2048 / 384.0, "num_classes": 0,
         "global_pool": "token", "class_token": True, "reg_tokens": 0, **_GIGAPATH},
        SMALL,
    ),
    "kaiko-s16": _kaiko("vit_small_patch16_224"), "kaiko-s8": _kaiko("vit_small_patch8_224"),
    "kaiko-b16": _kaiko("vit_base_patch16_224"), "kaiko-b8": _kaiko("vit_base_patch8_224"),
    "kaiko-l14": _kaiko("vit_large_patch14_reg4_dinov2"),
    "lunit-s8": _lunit_vit(8), "lunit-s16": _lunit_vit(16),
    "lunit-resnet50-bt": _LUNIT, "lunit-resnet50-mocov2": _LUNIT, "lunit-resnet50-swav": _LUNIT,
    **{f"dinov2-{size}": _timm(f"vit_{name}_patch14_dinov2.lvd142m", dynamic_img_size=True)
       for size, name in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))},
    **{f"dinov3-{size}": _timm(f"vit_{name}_patch16_dinov3.lvd1689m", _class_token, global_pool="")
       for size, name in (("s", "small"), ("b", "base"), ("l", "large"), ("h", "huge_plus"))},
    "resnet50-imagenet": _convolutions("resnet50.tv_in1k", layers=[1, 1, 1, 1]),
    "convnext-tiny-imagenet": _convolutions("convnext_tiny.in12k_ft_in1k", **_THIN),
    "convnext-base-imagenet": _convolutions("convnext_base.fb_in22k_ft_in1k", **_THIN),
    "efficientnet-b0-imagenet": _convolutions("efficientnet_b0.ra_in1k"),
}  # fmt: skip

NETWORKS: dict[str, Transformer] = {
    "gpfm": Transformer("dinov2", 1024, 16, 24, 14, 16, chunks=4),
    "crown": Transformer("dinov2", 1024, 16, 24, 16, 14, swiglu=True, chunks=4),
    "openmidnight": Transformer("dinov2", 1536, 24, 40, 14, 16, registers=4, swiglu=True),
    "dinobloom-s": Transformer("dinov2", 384, 6, 12, 14, 16),
    "dinobloom-b": Transformer("dinov2", 768, 12, 12, 14, 16),
    "dinobloom-l": Transformer("dinov2", 1024, 16, 24, 14, 16),
    "dinobloom-g": Transformer("dinov2", 1536, 24, 40, 14, 16, swiglu=True),
    "phikon": Transformer("transformers-vit", 768, 12, 12, 16, 14),
    "phikon-v2": Transformer("transformers-dinov2", 1024, 16, 24, 16, 14),
    "hibou-b": Transformer("transformers-dinov2", 768, 12, 12, 14, 16, registers=4, swiglu=True),
    "hibou-l": Transformer("transformers-dinov2", 1024, 16, 24, 14, 16, registers=4, swiglu=True),
    "midnight": Transformer("transformers-dinov2", 1536, 24, 40, 14, 37, swiglu=True),
}
"""Those whose published files have names of Meta or transformers. Midnight's positions are of 518 px."""

PREFIXES = {"gpfm": "teacher.backbone.", "dinobloom-s": "teacher.backbone."}
"""What the names in their files begin with."""

COUNTS = {"uni2-h": 343, "virchow": 454, "virchow2": 455, "h-optimus-0": 567, "openmidnight": 568, "phikon-v2": 439,
          "midnight": 727}  # fmt: skip
"""Tensors in the published files, as counted by others who opened them."""


class _Uninitialised(TorchFunctionMode):
    """Networks are made without drawing their weights, which is most of the time that it takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and getattr(func, "__name__", "") in _DRAWS:
            return args[0]
        return func(*args, **(kwargs or {}))


@cache
def published_tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published file of an encoder, at full depth."""
    if name in NETWORKS:
        prefix = PREFIXES.get(name, "")
        return {prefix + key: shape for key, shape in published_shapes(NETWORKS[name]).items()}
    call = CALLS[name]
    with torch.device("meta"), _Uninitialised():
        state = call.make(**call.arguments).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


@cache
def network_tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the network that we make of an entry, at full depth."""
    recipe = encoder_entries()[name].recipe
    with _Uninitialised():
        state = create_network(recipe.architecture, recipe.arguments, empty=True).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


def small_arguments(entry: EncoderEntry) -> dict[str, Any]:
    """Arguments of our network for a cheap one of the same kind."""
    small = SMALL if entry.name in NETWORKS else CALLS[entry.name].small
    return {**entry.recipe.arguments, **small}


def small_reference(name: str, x: Tensor) -> tuple[State, Tensor]:
    """A cheap network of the published kind: the tensors of its file, under the published names, and its vectors."""
    if name in NETWORKS:
        net = replace(NETWORKS[name], width=48, heads=3, depth=2, chunks=min(NETWORKS[name].chunks, 2))
        state = random_state(published_shapes(net))
        side = x.shape[-1] // net.cell
        positions = state[net.names["positions"]]
        if side != net.side:
            positions = resampled(positions, side, size=(side, side), antialias=False)
        tokens = reference_tokens(net, state, x, positions)
        vector = _concatenated(1)(tokens) if name == "midnight" else tokens[:, 0]
        return {PREFIXES.get(name, "") + key: value for key, value in state.items()}, vector
    call = CALLS[name]
    network = call.make(**(call.arguments | call.small)).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=draw)
                value.copy_(noise.abs() + 0.5 if key.endswith("running_var") else noise * 0.2 + 0.5 * (value.ndim == 1))
        output = network(x)
    return network.state_dict(), output if call.pool is None else call.pool(output)


def encoder_table() -> str:
    """The registry as the table of docs/encoders.md."""
    head = ("encoder", "licence", "commercial use", "vector", "pooling", "tile px", "GPU", "tensors", "parameters")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for entry in encoder_entries().values():
        recipe, shapes = entry.recipe, network_tensors(entry.name)
        count = sum(torch.Size(shape).numel() for shape in shapes.values())
        gated = ", gated" if recipe.gated else ""
        tile = f"{recipe.tile_px} to {recipe.input_px}" if recipe.tile_px != recipe.input_px else str(recipe.tile_px)
        cells = (
            f"[`{entry.name}`]({entry.page})", recipe.licence + gated, entry.commercial, recipe.dimension,
            recipe.pooling, tile, recipe.precision, len(shapes), f"{count / 1e6:.1f} M",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def table_in(page: str) -> str:
    """The table as it stands in the text of a page."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{encoder_table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
