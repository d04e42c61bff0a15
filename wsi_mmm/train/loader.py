"""From draws to batches on the device: read ahead by threads, the same whatever their number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch of one feed; n = ``len(keys)`` items (pictures, or bags), 0 when every one of them failed.

    Of pictures: ``pixels`` uint8[n, H, W, 3], padded with white; ``sizes`` int64[n, 2] (height, width) of each without
    padding; ``theta`` float32[n, 2, 3]: px of the crop of ``size`` x ``size`` -> px of the picture (see `train.warp`;
    not applied yet: `pictures` does). Of bags of m tiles: the same for each tile, and ``bag`` int64[m]: the item
    (0 to n - 1) that a tile belongs to, ascending. Of bags of features: ``vectors`` float32[m, D] and ``bag``.
    ``targets``: task -> `Task.target` of the n items, stacked, unknown where nothing is known of an item.
    ``failed``: "key: why" of items that were left out. ``sizes`` and ``theta`` stay on the CPU.
    """

    feed: str
    keys: tuple[str, ...]
    pixels: Tensor | None = None
    theta: Tensor | None = None
    sizes: Tensor | None = None
    vectors: Tensor | None = None
    bag: Tensor | None = None
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    size: int = 0
    failed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> TrainBatch:
        """The same on ``device``; from pinned memory the copy may still be under way on the current stream."""

        def send(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        targets = {name: target.to(device, non_blocking=True) for name, target in self.targets.items()}
        return replace(self, pixels=send(self.pixels), vectors=send(self.vectors), bag=send(self.bag), targets=targets)
