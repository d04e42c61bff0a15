"""Shared parts between encoder and heads: poolings, decoders, the neck of dense detection. Tensors in, tensors out.

Decoders make of bottleneck and pyramid one map at the pyramid's finest stride. "unet" joins the levels one by one,
each with its own width; "fpn" keeps one width everywhere, adds from the top down and sums all levels at the end
(Kirillov et al. 2019, panoptic feature pyramids): fewer weights, more of every scale.

segmentation-models-pytorch is not used: its decoders are tied to its own encoders' list of stages (one of stride 1
first) and widths, while ours must run on any timm pyramid, share `Fpn` with the detection neck, and keep the packaged
model's weights as they are; what would be saved is sixty lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import DecoderCard, NeckCard, SqueezerCard


def conv_unit(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """Convolution (same size), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class GlobalPooling(nn.Module):
    """Pyramid -> (bottleneck map float[n, width, h, w], pooled vector float[n, D]).

    The vector is pooled from the coarsest encoder map (by default its mean), so it means the same with or without
    trained heads. ``width`` 0 passes the coarsest map on as it is (a bare encoder).
    """

    def __init__(self, channels: int, width: int, card: SqueezerCard | None = None) -> None:
        super().__init__()
        self.width = width or channels
        self.vector_width = channels
        self.project: nn.Module = conv_unit(channels, width, 1) if width else nn.Identity()
        self.pool = build_pool(card or SqueezerCard(), channels)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The pyramid, finest first, as an encoder gives it."""
        last = pyramid[-1]
        return self.project(last), self.pool(last)

    def split(self, pyramid: Sequence[Tensor], pooled: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `forward`, where the vector may be ``pooled`` by the encoder; the map is empty when the pyramid is."""
        if pooled is None:
            bottleneck, vector = self(pyramid)
            return bottleneck, vector
        return self.project(pyramid[-1]) if pyramid else pooled.new_empty(0), pooled


def build_pool(card: SqueezerCard, channels: int) -> nn.Module:
    """The pooling that a card names: float[n, C, h, w] -> float[n, C]; the order of the positions plays no role."""
    if card.kind == "attention":
        return AttentionPool(channels, card.heads)
    return {"mean": MeanPool, "max": MaxPool, "gem": GemPool}[card.kind]()


class MeanPool(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """float[n, C, h, w] -> float[n, C]."""
        return x.mean(dim=(2, 3))


class MaxPool(nn.Module):
    """The largest value over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """float[n, C, h, w] -> float[n, C]."""
        return x.amax(dim=(2, 3))


class GemPool(nn.Module):
    """Generalised mean (Radenović et al. 2018): the p-th root of the mean of p-th powers, p learnt from 3.

    Values below ``least`` count as ``least``: powers of negative numbers mean nothing here.
    """

    def __init__(self, power: float = 3.0, least: float = 1e-6) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor([power]))
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        """float[n, C, h, w] -> float[n, C]. Divided by the largest value first, so that no power overflows."""
        with torch.autocast(x.device.type, enabled=False):  # half precision has no room for third powers
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            x = x.clamp_min(self.least)
            top = x.amax(dim=(2, 3), keepdim=True)
            power = self.power.to(x.dtype).clamp_min(1.0)
            mean: Tensor = (x / top).pow(power).mean(dim=(2, 3)).pow(1.0 / power)
            return mean * top[:, :, 0, 0]


class AttentionPool(nn.Module):
    """Weighted mean over positions, the weights a softmax of learnt scores of each position's own features.

    Every head weighs its share of the channels. No position codes: a permutation of the positions changes nothing, and
    any map size will do. Scores begin at zero, so it begins as the mean.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ModelError(f"squeezer.heads is {heads}, which does not divide the encoder's {channels} channels")
        self.norm = nn.LayerNorm(channels)
        self.score = nn.Linear(channels, heads)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        """float[n, C, h, w] -> float[n, C]."""
        rows = x.flatten(2).transpose(1, 2)  # [n, positions, C]
        weights = torch.softmax(self.score(self.norm(rows)).float(), dim=1).to(rows.dtype)
        shares = rows.reshape(*weights.shape, -1)
        return torch.einsum("nph,nphc->nhc", weights, shares).flatten(1)


class Resize(nn.Module):
    """A map of ``stride`` -> one of ``wanted``, bilinear; the same map when they are equal."""

    def __init__(self, stride: int, wanted: int) -> None:
        super().__init__()
        self.factor = stride / wanted

    def forward(self, x: Tensor) -> Tensor:
        """float[n, C, h, w] -> float[n, C, h * stride / wanted, w * stride / wanted]."""
        if self.factor == 1:
            return x
        return functional.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)


# ---------------------------------------------------------------- decoders and neck


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


class Neck(nn.Module):
    """FPN-style, over the levels of stride 4 and coarser. ``channels`` and ``strides`` describe the encoder's pyramid.

    ModelError if no level has stride 4.
    """

    def __init__(self, card: NeckCard, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        if 4 not in strides:
            raise ModelError(f"dense heads need a map of stride 4, the encoder has {', '.join(map(str, strides))}")
        self.first = list(strides).index(4)
        self.fpn = Fpn(channels[self.first :], card.width)
        self.width = card.width

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """The pyramid, finest first -> float[n, width, h / 4, w / 4]."""
        x: Tensor = self.fpn(pyramid[self.first :])
        return x
