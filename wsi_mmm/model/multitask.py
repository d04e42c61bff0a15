"""The multi-task model: one encoder pass, any number of heads.

Heads are handed in (the tasks that make them live on a higher floor), so this room knows no task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wsi_mmm.errors import ModelError
from wsi_mmm.model.blocks import Decoder, Squeezer
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.encoder import PyramidEncoder


class MultiTaskModel(nn.Module):
    """``model(x, tasks=[...])`` -> dict of logits. ``encoder``, ``squeezer`` and ``decoder`` can be used alone.

    Pixel heads read the decoder's map, tile heads the pooled vector; ``tile_heads`` names the latter.
    """

    def __init__(
        self, card: ModelCard, encoder: PyramidEncoder, *, heads: Mapping[str, nn.Module], tile_heads: frozenset[str]
    ) -> None:
        super().__init__()
        self.card = card
        self.encoder = encoder
        self.squeezer = Squeezer(encoder.channels[-1], card.decoder.bottleneck)
        pixel = [name for name in heads if name not in tile_heads]
        self.decoder = self._decoder() if pixel else None
        self.heads = nn.ModuleDict(dict(heads))
        self.tile_heads = tile_heads
        self.register_buffer("mean", torch.tensor(card.mean).view(1, 3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(1, 3, 1, 1) * 255.0, persistent=False)

    def _decoder(self) -> Decoder:
        channels, widths = self.encoder.channels[:-1], self.card.decoder.widths
        if len(widths) != len(channels):
            raise ModelError(
                f"model '{self.card.name}': decoder.widths has {len(widths)} entries, the encoder needs {len(channels)}"
            )
        return Decoder(self.squeezer.width, channels, widths)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the heads."""
        return tuple(self.heads)

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8[n, h, w, 3] -> float32[n, 3, h, w], normalised, channels_last in memory, on the model's device."""
        n, h, w, _ = pixels.shape
        mean, std = (self.get_buffer(name).view(3).repeat(w) for name in ("mean", "std"))
        # Rows of 3 w values, in place: ten times faster than broadcasting over three channels, the same bits.
        rows = pixels.to(self.device, non_blocking=True).reshape(n, h, 3 * w).float()
        return rows.sub_(mean).div_(std).view(n, h, w, 3).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """float[n, 3, h, w] from `prepare` -> logits of ``tasks`` (None: all), one encoder pass."""
        return self.forward_all(x, tasks)[1]

    def forward_all(self, x: Tensor, tasks: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The pooled vector float[n, D] and the logits of ``tasks`` (None: all)."""
        names = self.tasks if tasks is None else tuple(tasks)
        unknown = [name for name in names if name not in self.heads]
        if unknown:
            raise ModelError(f"model '{self.card.name}' has no task '{unknown[0]}'; it has: {', '.join(self.tasks)}")
        pyramid = self.encoder(x)
        bottleneck, vector = self.squeezer(pyramid)
        pixel = [name for name in names if name not in self.tile_heads]
        shared = self.decoder(bottleneck, pyramid) if pixel and self.decoder is not None else vector
        return vector, {name: self.heads[name](vector if name in self.tile_heads else shared) for name in names}

    def features(self, x: Tensor) -> Tensor:
        """float[n, 3, h, w] from `prepare` -> pooled vectors float[n, D]; the heads are not run."""
        vector: Tensor = self.squeezer(self.encoder(x))[1]
        return vector

    @property
    def vector_width(self) -> int:
        """D of `features`."""
        return self.squeezer.vector_width
