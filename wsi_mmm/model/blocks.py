"""Shared parts between encoder and heads: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import SqueezerCard


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
