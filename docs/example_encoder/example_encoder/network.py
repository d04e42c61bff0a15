"""The network: two convolutions, a norm, and the mean over positions."""

from __future__ import annotations

from torch import Tensor, nn


class ExampleNetwork(nn.Module):
    """float32[n, 3, h, w], RGB normalised by the mean and std of encoder.json -> float[n, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, kernel_size=8, stride=8)
        self.second = nn.Conv2d(16, 32, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.second(self.first(x).relu()).relu()
        vectors: Tensor = self.norm(maps.mean((2, 3)))
        return vectors
