"""Encoders: pixels -> feature pyramid, and the vector of a tile. Any timm backbone, convolutional or ViT.

A pyramid is a list of float[n, c_i, h / s_i, w / s_i], finest first, with strides s_i of 2, 4, 8, 16, 32
(or those of them that the backbone has; a ViT's equal-stride maps are resampled to 4, 8, 16, 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError, OptionError, first_line
from wsi_mmm.model.card import EncoderCard, ModelCard
from wsi_mmm.model.hub import check_hub
from wsi_mmm.model.key_maps import prepare_network
from wsi_mmm.model.networks import BUILD_ERRORS, PooledBackbone, check_input, create_network, fill_network
from wsi_mmm.model.plugin_encoder import VectorBackbone, build_module, is_plugin, wrap_module

_VIT_STRIDES = (4, 8, 16, 32)


class PyramidEncoder(nn.Module):
    """A timm backbone whose forward gives one map per stride, finest first.

    ``channels`` and ``strides`` describe the maps. Backbones whose maps all have one stride (ViTs) are
    adapted: four depths of theirs are resampled bilinearly to strides 4, 8, 16 and 32. ``vector_width``: numbers in the
    vector that the backbone pools itself, 0: it does not.
    """

    def __init__(self, backbone: nn.Module, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = channels
        self.resampled = len(strides) > 1 and len(set(strides)) == 1
        self.strides = _VIT_STRIDES[-len(strides) :] if self.resampled else strides
        self.vector_width = backbone.vector_width if isinstance(backbone, PooledBackbone | VectorBackbone) else 0

    def forward(self, x: Tensor) -> list[Tensor]:
        """float[n, 3, h, w], normalised -> the pyramid; h and w must be multiples of the largest stride.

        Raises OptionError for anything else, such as uint8[n, h, w, 3] as tiles are read.
        """
        _check_pixels(x)
        return self._make_pyramid(self.backbone(x), x)

    def forward_pooled(self, x: Tensor, *, maps: bool) -> tuple[list[Tensor], Tensor | None]:
        """The pyramid, and the vector float[n, vector_width] of the same pass, None where the backbone pools none.

        Without ``maps`` a backbone that pools makes no pyramid: it is empty.
        """
        if not isinstance(self.backbone, PooledBackbone | VectorBackbone):
            return self(x), None
        _check_pixels(x)
        found, vector = self.backbone.forward_pooled(x, maps=maps)
        return self._make_pyramid(found, x) if found else [], vector

    def _make_pyramid(self, found: list[Tensor], x: Tensor) -> list[Tensor]:
        # Some transformers (Swin) give channels last.
        maps = [m if m.shape[1] == c else m.permute(0, 3, 1, 2) for m, c in zip(found, self.channels, strict=True)]
        if not self.resampled:
            return maps
        height, width = int(x.shape[-2]), int(x.shape[-1])
        return [
            functional.interpolate(m, size=(height // s, width // s), mode="bilinear", align_corners=False)
            for m, s in zip(maps, self.strides, strict=True)
        ]


def _check_pixels(x: Tensor) -> None:
    """Raise OptionError, naming the function that makes it, unless ``x`` is what an encoder computes with."""
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        given = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        raise OptionError(
            f"an encoder takes normalised float[n, 3, h, w], not {given}: model.prepare(tiles) makes it of "
            "uint8[n, h, w, 3]"
        )


def build_encoder(
    card: EncoderCard,
    *,
    pretrained: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
    empty: bool = False,
    weights: Path | None = None,
) -> PyramidEncoder:
    """The encoder of a card, of a plug-in or timm (``hf-hub:`` ids pass through when the squeezer pools).

    A network that pools itself is given its ``tensors`` (of `fit_weights`), random ones when they are None, or none at
    all (``empty``: on the meta device). ``pretrained``: timm's own weights, for the squeezer; ``weights``: the file of
    those of a plug-in. ModelError if it cannot be made; MissingPackage, PluginError.
    """
    if is_plugin(card):
        return _plugin_encoder(card, weights)
    if card.own_pooling is not None:
        network = create_network(card.name, card.args, empty=empty or tensors is not None)
        if tensors is not None:
            network = fill_network(card.name, card.args, network, tensors)
        prepare_network(network, card.key_map)
        backbone = PooledBackbone(network, card.own_pooling, card.registers)
        width = int(getattr(network, "num_features", 0) or backbone.vector_width)
        return PyramidEncoder(backbone, backbone.channels or (width,), backbone.strides or (32,))
    if pretrained:
        check_hub(card.name)
    try:
        features = _features_only(card.name, pretrained, dict(card.args))
    except BUILD_ERRORS as error:
        raise ModelError(f"timm cannot build the encoder '{card.name}': {first_line(error)}") from error
    except Exception as error:  # huggingface_hub raises its own tree (offline, gated, missing): one meaning for us
        why = f"the weights of '{card.name}' cannot be downloaded ({first_line(error)})"
        raise ModelError(f"{why}; give a .safetensors file of them as weights") from error
    info: Any = features.feature_info
    return PyramidEncoder(features, tuple(info.channels()), tuple(int(r) for r in info.reduction()))


def check_tile(encoder: PyramidEncoder, card: ModelCard, tile: int) -> None:
    """ModelError, naming sizes that fit, when the encoder of a model cannot take tiles of ``tile`` px."""
    if isinstance(encoder.backbone, PooledBackbone):
        check_input(encoder.backbone.model, card.encoder.input_px or tile, card.name)


def check_encoder(card: ModelCard, tile: int) -> int:
    """The numbers in a vector of the bare encoder of a card (0: a plug-in's, not known). No weights are made.

    ModelError when timm cannot build it, when it has not what its pooling takes, or cannot take tiles of ``tile`` px.
    """
    if not is_plugin(card.encoder):
        encoder = build_encoder(card.encoder, empty=True)
        check_tile(encoder, card, tile)
        return encoder.vector_width or encoder.channels[-1]
    return 0


def _plugin_encoder(card: EncoderCard, weights: Path | None) -> PyramidEncoder:
    if card.args:
        raise ModelError(f"the encoder '{card.name}' of a package takes no arguments: leave them out")
    module = build_module(card.name, card.package, weights)
    if isinstance(module, PyramidEncoder):
        return module
    backbone = wrap_module(module, card.name)
    return PyramidEncoder(backbone, backbone.channels, backbone.strides)


def _features_only(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """timm's features_only wrapper; ViTs get four evenly spread depths and free image sizes."""
    vit = name.split("/")[-1].split(":")[-1].startswith(("vit", "deit", "beit", "eva", "samvit"))
    if vit:
        options = {"dynamic_img_size": True, "dynamic_img_pad": True, **options}
    with torch.device("meta") if vit else nullcontext():  # of a ViT only the depth is wanted first
        backbone: Any = timm.create_model(name, pretrained=pretrained and not vit, features_only=True, **options)
    strides = backbone.feature_info.reduction()
    if len(strides) > 1 and len(set(strides)) == 1:  # timm offers the last three layers: take four depths instead
        depth = len(backbone.feature_info.info)
        options["out_indices"] = [round((i + 1) * depth / 4) - 1 for i in range(4)]
    elif not vit:
        return backbone
    return timm.create_model(name, pretrained=pretrained, features_only=True, **options)
