"""The neck of dense detection: the pyramid's levels of stride 4 and coarser -> one map at stride 4."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import NeckCard
from wsi_mmm.model.decoders import Fpn

STRIDE = 4


class Neck(nn.Module):
    """FPN-style; ``channels`` and ``strides`` describe the encoder's pyramid. ModelError if no level has stride 4."""

    def __init__(self, card: NeckCard, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        if STRIDE not in strides:
            raise ModelError(
                f"dense heads need a map of stride {STRIDE}, the encoder has {', '.join(map(str, strides))}"
            )
        self.first = list(strides).index(STRIDE)
        self.fpn = Fpn(channels[self.first :], card.width)
        self.width = card.width

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """The pyramid, finest first -> float[n, width, h / 4, w / 4]."""
        x: Tensor = self.fpn(pyramid[self.first :])
        return x
