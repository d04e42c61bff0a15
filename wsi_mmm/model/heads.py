"""Heads: from the decoder's map or the pooled vector to logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from wsi_mmm.model.blocks import conv_unit


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What heads are fed: channels of the decoder's map and of the pooled vector."""

    map_width: int
    vector_width: int


def build_head(kind: str, spec: HeadSpec, outputs: int) -> nn.Module:
    """The head called ``kind`` in a card: "map" (reads the decoder's map) or "vector" (reads the pooled vector)."""
    if kind == "map":
        return MapHead(spec.map_width, outputs)
    return VectorHead(spec.vector_width, outputs)


class MapHead(nn.Module):
    """Decoder map float[n, inputs, h, w] -> logits float[n, outputs, h, w]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mix = conv_unit(inputs, inputs)
        self.out = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the decoder's stride."""
        y: Tensor = self.out(self.mix(x))
        return y


class VectorHead(nn.Module):
    """Pooled vector float[n, inputs] -> logits float[n, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits per tile."""
        y: Tensor = self.out(self.drop(self.norm(x)))
        return y
