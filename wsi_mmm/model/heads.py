"""Heads: from a shared map or vector to logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from wsi_mmm.errors import ModelError
from wsi_mmm.model.blocks import conv_unit

MAP_STRIDE = 2
"""Px per map px of the map that "map" and "image" heads read, whatever the encoder."""


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Widths that heads read: channels of the decoder's map, the pooled vector, the bag's vector, the neck's map."""

    map_width: int
    vector_width: int
    bag_width: int = 0
    dense_width: int = 0


def build_head(kind: str, spec: HeadSpec, outputs: int) -> nn.Module:
    """The head called ``kind`` in a card (see `TaskCard`)."""
    if kind == "map":
        return MapHead(spec.map_width, outputs)
    if kind == "dense":
        return MapHead(spec.dense_width, outputs)
    if kind == "image":
        return ImageHead(spec.map_width, outputs)
    if kind in ("vector", "bag"):
        return VectorHead(spec.vector_width if kind == "vector" else spec.bag_width, outputs)
    raise ModelError(f"there is no head '{kind}'")


class MapHead(nn.Module):
    """Shared map float[n, inputs, h, w] -> logits float[n, outputs, h, w]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mix = conv_unit(inputs, inputs)
        self.out = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the map's stride."""
        y: Tensor = self.out(self.mix(x))
        return y


class ImageHead(nn.Module):
    """Decoder map float[n, inputs, h, w] -> float[n, outputs, 2h, 2w]: every map px draws the px that it covers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mix = conv_unit(inputs, inputs)
        self.out = nn.Conv2d(inputs, outputs * MAP_STRIDE**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Values at stride 1."""
        return functional.pixel_shuffle(self.out(self.mix(x)), MAP_STRIDE)


class VectorHead(nn.Module):
    """Vector float[n, inputs] of a tile or a bag -> logits float[n, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits per tile or bag."""
        y: Tensor = self.out(self.drop(self.norm(x)))
        return y
