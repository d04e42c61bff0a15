"""The multi-task model: one encoder pass, any number of heads.

Heads are handed in: the tasks that make them are above this module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from wsi_mmm.errors import ModelError
from wsi_mmm.model.aggregator import MilAggregator
from wsi_mmm.model.blocks import GlobalPooling, Neck, Resize, build_decoder
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.encoder import PyramidEncoder
from wsi_mmm.model.heads import MAP_STRIDE

ModelPass = Callable[[Tensor, Sequence[str]], tuple[Tensor, dict[str, Tensor]]]
"""uint8[n, s, s, 3] on the device, tasks -> (vectors, logits), however it is carried out."""


class MultiTaskModel(nn.Module):
    """``model(x, tasks=[...])`` -> dict of logits. ``encoder``, ``squeezer`` and ``decoder`` can be used alone.

    The card says which head each task has; only the shared parts that some head reads are there: "map" and "image"
    read the decoder's map, "dense" the neck's, "vector" the pooled vector, "bag" the aggregate of many vectors (the
    attribute ``grouper``, as checkpoints call it), "pixels" the image. ``tasks``: names of the heads; ``tile_heads``
    answer per tile, ``bag_heads`` per bag of tiles; ``vector_width``: D of `features`.
    """

    def __init__(self, card: ModelCard, encoder: PyramidEncoder, *, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.card = card
        self.encoder = encoder
        self.kinds: dict[str, str] = {task.name: task.head for task in card.tasks}
        self.squeezer = GlobalPooling(encoder.channels[-1], card.decoder.bottleneck, card.squeezer)
        self.vector_width = encoder.vector_width or self.squeezer.vector_width
        self.decoder = self._build_decoder() if self._has_head("map", "image") else None
        self.to_map = Resize(encoder.strides[0], MAP_STRIDE)
        self.heads = nn.ModuleDict(dict(heads))
        self.tasks = tuple(heads)
        self.tile_heads = frozenset(name for name, kind in self.kinds.items() if kind in ("vector", "pixels"))
        self.bag_heads = frozenset(name for name, kind in self.kinds.items() if kind == "bag")
        self.neck = Neck(card.neck, encoder.channels, encoder.strides) if self._has_head("dense") else None
        self.grouper = MilAggregator(card.bag, self.vector_width) if self._has_head("bag") else None
        self.register_buffer("mean", torch.tensor(card.mean).view(1, 3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(1, 3, 1, 1) * 255.0, persistent=False)

    def _has_head(self, *kinds: str) -> bool:
        return any(kind in kinds for kind in self.kinds.values())

    def _build_decoder(self) -> nn.Module:
        try:
            return build_decoder(self.card.decoder, self.squeezer.width, self.encoder.channels[:-1])
        except ModelError as error:
            raise ModelError(f"model '{self.card.name}': {error}") from error

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.get_buffer("mean").device

    def train(self, mode: bool = True) -> MultiTaskModel:
        """Set the mode as every module does, but keep norms whose statistics are to stay in evaluation mode.

        These are the batch norms of an encoder whose card says "frozen", and those none of whose parameters learn.
        """
        super().train(mode)
        all_frozen = self.card.encoder.norm == "frozen"
        for name, norm in self.named_modules():
            if isinstance(norm, _BatchNorm) and ((all_frozen and name.startswith("encoder.")) or _is_frozen(norm)):
                norm.eval()
        return self

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8[n, h, w, 3] -> float32[n, 3, h, w], normalised, channels_last in memory, on the model's device."""
        n, h, w, _ = pixels.shape
        side = self.card.encoder.input_px
        if side and (h, w) != (side, side):
            return self._prepare_resized(pixels, side)
        mean, std = (self.get_buffer(name).view(3).repeat(w) for name in ("mean", "std"))
        # Rows of 3 w values, in place: ten times faster than broadcasting over three channels, the same bits.
        rows = pixels.to(self.device, non_blocking=True).reshape(n, h, 3 * w).float()
        return normalise(rows, mean, std).view(n, h, w, 3).permute(0, 3, 1, 2)

    def _prepare_resized(self, pixels: Tensor, side: int) -> Tensor:
        """`prepare` through antialiased resizing to ``side`` px on the device, to whole grey levels."""
        x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        x = resize_tiles(x, side, self.card.encoder.interpolation)
        x = normalise(x, self.get_buffer("mean"), self.get_buffer("std"))
        return x.contiguous(memory_format=torch.channels_last)

    def trunk(self, x: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """float[n, 3, h, w] from `prepare` -> by kind of head the tensor that such heads read; always "vector".

        The one pass of encoder, pooling, decoder and neck: inference, training and export all go through it. Decoder
        and neck run only where a head of ``kinds`` reads them. Bag heads read what the aggregator makes of "vector".
        """
        decoded = self.decoder is not None and not {"map", "image"}.isdisjoint(kinds)
        dense = self.neck is not None and "dense" in kinds
        pyramid, pooled = self.encoder.forward_pooled(x, maps=decoded or dense)
        bottleneck, vector = self.squeezer.split(pyramid, pooled)
        shared: dict[str, Tensor] = {"vector": vector}
        if self.decoder is not None and decoded:
            shared["map"] = shared["image"] = self.to_map(self.decoder(bottleneck, pyramid))
        if self.neck is not None and dense:
            shared["dense"] = self.neck(pyramid)
        if "pixels" in kinds:  # RGB in [0, 1]
            shared["pixels"] = (x * self.get_buffer("std") + self.get_buffer("mean")) / 255.0
        return shared

    def forward(self, x: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """float[n, 3, h, w] from `prepare` -> logits of ``tasks`` (None: all), one encoder pass."""
        return self.forward_all(x, tasks)[1]

    def forward_all(self, x: Tensor, tasks: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The pooled vector float[n, D] and the logits of ``tasks`` (None: all) but those that `bag_logits` answers."""
        names = self.check_tasks(tasks)
        wanted = {name: kind for name in names if (kind := self.kinds[name]) != "bag"}
        shared = self.trunk(x, wanted.values())
        return shared["vector"], {name: self.heads[name](shared[kind]) for name, kind in wanted.items()}

    def bag_logits(
        self, vectors: Tensor, bag: Tensor, tasks: Sequence[str] | None = None, *, bags: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pooled vectors float[m, D] of tiles, their bag int64[m] -> logits float[b, K] and attention float[m] by task.

        ``tasks`` (None: all bag tasks); ``bags``: how many bags there are (None: up to the largest number in ``bag``).
        ModelError for a task without a bag head.
        """
        names = [name for name in self.tasks if name in self.bag_heads] if tasks is None else self.check_tasks(tasks)
        other = [name for name in names if name not in self.bag_heads]
        if other or self.grouper is None:
            what = f"task '{other[0]}' is not" if other else "there is no task that is"
            raise ModelError(f"model '{self.card.name}': {what} answered per bag of tiles")
        grouped, attention = self.grouper(vectors, bag, bags)
        return {name: self.heads[name](grouped) for name in names}, dict.fromkeys(names, attention)

    def check_tasks(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        """``tasks`` (None: all). ModelError for one that the model does not have."""
        names = self.tasks if tasks is None else tuple(tasks)
        unknown = [name for name in names if name not in self.heads]
        if unknown:
            raise ModelError(f"model '{self.card.name}' has no task '{unknown[0]}'; it has: {', '.join(self.tasks)}")
        return names

    def features(self, x: Tensor) -> Tensor:
        """float[n, 3, h, w] from `prepare` -> pooled vectors float[n, D]; the heads are not run."""
        return self.trunk(x, ())["vector"]


def resize_tiles(rgb: Tensor, side: int, interpolation: str) -> Tensor:
    """float RGB[n, 3, h, w] of 0..255 -> [n, 3, side, side], antialiased as PIL does it: rows first, whole levels."""
    for size in ((rgb.shape[-2], side), (side, side)):
        rgb = functional.interpolate(rgb, size=size, mode=interpolation, antialias=True, align_corners=False)
        rgb = rgb.add_(0.5).floor_().clamp_(0, 255)
    return rgb


def normalise(rgb: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise float RGB of 0..255, in place; ``mean`` and ``std``: the model's buffers, shaped to broadcast."""
    return rgb.sub_(mean).div_(std)


def _is_frozen(norm: nn.Module) -> bool:
    own = list(norm.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)
