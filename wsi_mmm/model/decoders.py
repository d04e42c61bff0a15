"""Pixel decoders: bottleneck and pyramid -> one map at the pyramid's finest stride.

"unet" joins the levels one by one, each with its own width; "fpn" keeps one width everywhere, adds from the top down
and sums all levels at the end (Kirillov et al. 2019, panoptic feature pyramids): fewer weights, more of every scale.

segmentation-models-pytorch is not used: its decoders are tied to its own encoders' list of stages (one of stride 1
first) and widths, while ours must run on any timm pyramid, share `Fpn` with the detection neck, and keep the packaged
model's weights as they are; what would be saved is the sixty lines below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError
from wsi_mmm.model.blocks import conv_unit
from wsi_mmm.model.card import DecoderCard


def build_decoder(card: DecoderCard, bottleneck: int, channels: Sequence[int]) -> UNetDecoder | FpnDecoder:
    """The decoder of a card for a pyramid of ``channels`` (its coarsest level left out). ModelError: widths unfit."""
    if len(card.widths) != len(channels):
        raise ModelError(f"decoder.widths has {len(card.widths)} entries, the encoder needs {len(channels)}")
    if card.kind == "unet":
        return UNetDecoder(bottleneck, channels, card.widths)
    if len(set(card.widths)) != 1:
        raise ModelError(f"the decoder 'fpn' has one width: give decoder.widths {len(channels)} times the same number")
    return FpnDecoder(bottleneck, channels, card.widths[0])


class UNetDecoder(nn.Module):
    """U-shaped: the bottleneck map is doubled step by step, each time joined with the pyramid's map of that stride.

    ``widths[i]`` are the channels after joining pyramid level i (finest first, the coarsest level excluded).
    The result is float[n, widths[0], h / strides[0], w / strides[0]].
    """

    def __init__(self, bottleneck: int, channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        above = [*widths[1:], bottleneck]
        reduce = nn.ModuleList(nn.Conv2d(a, w, 1, bias=False) for a, w in zip(above, widths, strict=True))
        self.add_module("carry", reduce)  # the name that checkpoints have
        self.lateral = nn.ModuleList(nn.Conv2d(c, w, 1, bias=False) for c, w in zip(channels, widths, strict=True))
        self.norm = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.fuse = nn.ModuleList(conv_unit(w, w) if i else nn.Identity() for i, w in enumerate(widths))
        self.width = widths[0]

    def forward(self, bottleneck: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """``bottleneck`` from the squeezer, ``pyramid`` from the encoder."""
        x, reduce = bottleneck, self.get_submodule("carry")
        assert isinstance(reduce, nn.ModuleList)
        for i in reversed(range(len(self.lateral))):
            size = pyramid[i].shape[-2:]
            x = functional.interpolate(reduce[i](x), size=size, mode="bilinear", align_corners=False)
            x = self.fuse[i](torch.relu(self.norm[i](x + self.lateral[i](pyramid[i]))))
        return x


class Fpn(nn.Module):
    """Maps of any widths, finest first -> one map float[n, width, h0, w0] of the finest's size."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(conv_unit(width, width) for _ in channels)
        self.width = width

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Top down: each level adds the coarser one, doubled; then all levels, smoothed, are summed."""
        x = self.lateral[-1](maps[-1])
        out: Tensor = self.smooth[-1](x)
        for i in reversed(range(len(maps) - 1)):
            size = maps[i].shape[-2:]
            x = self.lateral[i](maps[i]) + functional.interpolate(x, size=size, mode="nearest")
            wide = functional.interpolate(out, size=size, mode="bilinear", align_corners=False)
            out = self.smooth[i](x) + wide
        return out


class FpnDecoder(nn.Module):
    """`Fpn` over the pyramid, its coarsest level replaced by the bottleneck map."""

    def __init__(self, bottleneck: int, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.fpn = Fpn([*channels, bottleneck], width)
        self.width = width

    def forward(self, bottleneck: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """``bottleneck`` from the squeezer, ``pyramid`` from the encoder."""
        x: Tensor = self.fpn([*pyramid[:-1], bottleneck])
        return x
