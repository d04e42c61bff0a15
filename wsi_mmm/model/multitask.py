"""The multi-task model: one encoder pass, any number of heads.

Heads are handed in (the tasks that make them live on a higher floor), so this room knows no task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wsi_mmm.errors import ModelError
from wsi_mmm.model.blocks import Resize, Squeezer
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.decoders import build_decoder
from wsi_mmm.model.encoder import PyramidEncoder
from wsi_mmm.model.grouper import Grouper
from wsi_mmm.model.heads import MAP_STRIDE
from wsi_mmm.model.layers import hold_norms
from wsi_mmm.model.neck import Neck


class MultiTaskModel(nn.Module):
    """``model(x, tasks=[...])`` -> dict of logits. ``encoder``, ``squeezer`` and ``decoder`` can be used alone.

    The card says which head each task has; only the shared parts that some head reads are there: "map" and "image"
    read the decoder's map, "dense" the neck's, "vector" the pooled vector, "bag" what the grouper makes of many.
    """

    def __init__(self, card: ModelCard, encoder: PyramidEncoder, *, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.card = card
        self.encoder = encoder
        self.kinds: dict[str, str] = {task.name: task.head for task in card.tasks}
        self.squeezer = Squeezer(encoder.channels[-1], card.decoder.bottleneck, card.squeezer)
        self.decoder = self._decoder() if self._any("map", "image") else None
        self.to_map = Resize(encoder.strides[0], MAP_STRIDE)
        self.heads = nn.ModuleDict(dict(heads))
        self.neck = Neck(card.neck, encoder.channels, encoder.strides) if self._any("dense") else None
        self.grouper = Grouper(card.bag, encoder.channels[-1]) if self._any("bag") else None
        self.register_buffer("mean", torch.tensor(card.mean).view(1, 3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(1, 3, 1, 1) * 255.0, persistent=False)

    def _any(self, *kinds: str) -> bool:
        return any(kind in kinds for kind in self.kinds.values())

    def _decoder(self) -> nn.Module:
        try:
            return build_decoder(self.card.decoder, self.squeezer.width, self.encoder.channels[:-1])
        except ModelError as error:
            raise ModelError(f"model '{self.card.name}': {error}") from error

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the heads."""
        return tuple(self.heads)

    @property
    def tile_heads(self) -> frozenset[str]:
        """Tasks that answer per tile."""
        return frozenset(name for name, kind in self.kinds.items() if kind == "vector")

    @property
    def bag_heads(self) -> frozenset[str]:
        """Tasks that answer per bag of tiles."""
        return frozenset(name for name, kind in self.kinds.items() if kind == "bag")

    def train(self, mode: bool = True) -> MultiTaskModel:
        """As every module's, but that norms whose statistics are to stay remain in evaluation mode."""
        super().train(mode)
        hold_norms(self)
        return self

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
        """The pooled vector float[n, D] and the logits of ``tasks`` (None: all) but those that `bag_logits` answers."""
        names = self._known(tasks)
        wanted = {name: kind for name in names if (kind := self.kinds[name]) != "bag"}
        pyramid = self.encoder(x)
        bottleneck, vector = self.squeezer(pyramid)
        shared: dict[str, Tensor] = {"vector": vector}
        if self.decoder is not None and not {"map", "image"}.isdisjoint(wanted.values()):
            shared["map"] = shared["image"] = self.to_map(self.decoder(bottleneck, pyramid))
        if self.neck is not None and "dense" in wanted.values():
            shared["dense"] = self.neck(pyramid)
        return vector, {name: self.heads[name](shared[kind]) for name, kind in wanted.items()}

    def bag_logits(
        self, vectors: Tensor, bag: Tensor, tasks: Sequence[str] | None = None, *, bags: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pooled vectors float[m, D] of tiles, their bag int64[m] -> logits float[b, K] and attention float[m] by task.

        ``tasks`` (None: all bag tasks); ``bags``: how many bags there are (None: up to the largest number in ``bag``).
        ModelError for a task without a bag head.
        """
        names = [name for name in self.tasks if name in self.bag_heads] if tasks is None else self._known(tasks)
        other = [name for name in names if name not in self.bag_heads]
        if other or self.grouper is None:
            what = f"task '{other[0]}' is not" if other else "there is no task that is"
            raise ModelError(f"model '{self.card.name}': {what} answered per bag of tiles")
        grouped, attention = self.grouper(vectors, bag, bags)
        return {name: self.heads[name](grouped) for name in names}, dict.fromkeys(names, attention)

    def _known(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        names = self.tasks if tasks is None else tuple(tasks)
        unknown = [name for name in names if name not in self.heads]
        if unknown:
            raise ModelError(f"model '{self.card.name}' has no task '{unknown[0]}'; it has: {', '.join(self.tasks)}")
        return names

    def features(self, x: Tensor) -> Tensor:
        """float[n, 3, h, w] from `prepare` -> pooled vectors float[n, D]; the heads are not run."""
        vector: Tensor = self.squeezer(self.encoder(x))[1]
        return vector

    @property
    def vector_width(self) -> int:
        """D of `features`."""
        return self.squeezer.vector_width
