"""Shared parts between encoder and heads: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_unit(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """Convolution (same size), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Squeezer(nn.Module):
    """Pyramid -> (bottleneck map float[n, width, h, w], pooled vector float[n, D]).

    The vector is the mean over the coarsest encoder map, so it means the same with or without trained heads.
    ``width`` 0 passes the coarsest map on as it is (a bare encoder).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width or channels
        self.vector_width = channels
        self.project: nn.Module = conv_unit(channels, width, 1) if width else nn.Identity()

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The pyramid, finest first, as an encoder gives it."""
        last = pyramid[-1]
        return self.project(last), last.mean(dim=(2, 3))


class Decoder(nn.Module):
    """U-shaped: the bottleneck map is doubled step by step, each time joined with the pyramid's map of that stride.

    ``widths[i]`` are the channels after joining pyramid level i (finest first, the coarsest level excluded).
    The result is float[n, widths[0], h / strides[0], w / strides[0]].
    """

    def __init__(self, bottleneck: int, channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        above = [*widths[1:], bottleneck]
        self.carry = nn.ModuleList(nn.Conv2d(a, w, 1, bias=False) for a, w in zip(above, widths, strict=True))
        self.lateral = nn.ModuleList(nn.Conv2d(c, w, 1, bias=False) for c, w in zip(channels, widths, strict=True))
        self.norm = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.fuse = nn.ModuleList(conv_unit(w, w) if i else nn.Identity() for i, w in enumerate(widths))
        self.width = widths[0]

    def forward(self, bottleneck: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """``bottleneck`` from the squeezer, ``pyramid`` from the encoder."""
        x = bottleneck
        for i in reversed(range(len(self.lateral))):
            size = pyramid[i].shape[-2:]
            x = functional.interpolate(self.carry[i](x), size=size, mode="bilinear", align_corners=False)
            x = self.fuse[i](torch.relu(self.norm[i](x + self.lateral[i](pyramid[i]))))
        return x
