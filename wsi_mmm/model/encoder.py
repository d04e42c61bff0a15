"""Encoders: pixels -> feature pyramid. Any timm backbone, convolutional or ViT.

A pyramid is a list of float[n, c_i, h / s_i, w / s_i], finest first, with strides s_i of 2, 4, 8, 16, 32
(or those of them that the backbone has; a ViT's equal-stride maps are resampled to 4, 8, 16, 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError, PluginError, first_line
from wsi_mmm.model.hub import check_hub
from wsi_mmm.plugins import load_plugin, plugin_names

_VIT_STRIDES = (4, 8, 16, 32)


class PyramidEncoder(nn.Module):
    """A timm backbone whose forward gives one map per stride, finest first.

    ``channels`` and ``strides`` describe the maps. Backbones whose maps all have one stride (ViTs) are
    adapted: four depths of theirs are resampled bilinearly to strides 4, 8, 16 and 32.
    """

    def __init__(self, backbone: nn.Module, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = channels
        self.resampled = len(strides) > 1 and len(set(strides)) == 1
        self.strides = _VIT_STRIDES[-len(strides) :] if self.resampled else strides

    def forward(self, x: Tensor) -> list[Tensor]:
        """float[n, 3, h, w] -> the pyramid; h and w must be multiples of the largest stride."""
        found: list[Tensor] = self.backbone(x)
        # Some transformers (Swin) give channels last.
        maps = [m if m.shape[1] == c else m.permute(0, 3, 1, 2) for m, c in zip(found, self.channels, strict=True)]
        if not self.resampled:
            return maps
        height, width = int(x.shape[-2]), int(x.shape[-1])
        return [
            functional.interpolate(m, size=(height // s, width // s), mode="bilinear", align_corners=False)
            for m, s in zip(maps, self.strides, strict=True)
        ]


def build_encoder(name: str, *, pretrained: bool = False, args: Mapping[str, Any] | None = None) -> PyramidEncoder:
    """The encoder that a plug-in or timm knows as ``name`` (``hf-hub:`` ids pass through).

    A plug-in's is a function with these arguments. ModelError if it cannot be made; PluginError.
    """
    options = dict(args or {})
    if name in plugin_names("encoders"):
        return _plugin_encoder(name, pretrained, options)
    if pretrained:
        check_hub(name)
    try:
        backbone = _features_only(name, pretrained, options)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ModelError(f"timm cannot build the encoder '{name}': {first_line(error)}") from error
    except Exception as error:  # huggingface_hub raises its own tree (offline, gated, missing): one meaning for us
        why = f"the weights of '{name}' cannot be downloaded ({first_line(error)})"
        raise ModelError(f"{why}; give a .safetensors file of them as weights") from error
    info: Any = backbone.feature_info
    return PyramidEncoder(backbone, tuple(info.channels()), tuple(int(r) for r in info.reduction()))


def _plugin_encoder(name: str, pretrained: bool, options: dict[str, Any]) -> PyramidEncoder:
    build: Any = load_plugin("encoders", name)
    found = build(name, pretrained=pretrained, args=options)
    if not isinstance(found, PyramidEncoder):
        raise PluginError(f"the encoder {name!r} of a plug-in gave no wsi_mmm.model.encoder.PyramidEncoder")
    return found


def _features_only(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """timm's features_only wrapper; ViTs get four evenly spread depths and free image sizes."""
    vit = name.split("/")[-1].split(":")[-1].startswith(("vit", "deit", "beit", "eva", "samvit"))
    if vit:
        options = {"dynamic_img_size": True, "dynamic_img_pad": True, **options}
    backbone: Any = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    strides = backbone.feature_info.reduction()
    if len(strides) > 1 and len(set(strides)) == 1:  # timm offers the last three layers: take four depths instead
        depth = len(backbone.feature_info.info)
        picks = [round((i + 1) * depth / 4) - 1 for i in range(4)]
        backbone = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=picks, **options)
    return backbone
