"""`reconstruct`: self-supervision. The model sees a picture with squares hidden, or in grey, and draws it whole.

The target is the image itself: training calls `hide` on its clean px (after warp and colour changes) to get what the
model is shown and the target. At inference the task draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from wsi_mmm.outputs.polygons import empty
from wsi_mmm.tasks.base import (
    AnyTarget,
    Params,
    Quantised,
    Scope,
    check_names,
    has_no_table,
    head_of_scope,
    number_within,
)
from wsi_mmm.tasks.facts import parameter_names
from wsi_mmm.tasks.window import View
from wsi_mmm.types import U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reconstruct:
    """The `reconstruct` task. ``patch``: side in px of the squares that are hidden, ``share`` of them (0: none is, and
    the picture is shown in grey instead: colours are to be guessed). Drawn px are ``centre`` + ``spread`` times what
    the head says, of RGB in [0, 1]."""

    info: TaskInfo
    side: int = 16
    share: float = 0.5
    centre: float = 0.7
    spread: float = 0.2
    scope: Scope = "pixel"
    stride: int = 1
    channels: int = 3
    halo: int = 0

    heads: ClassVar[Mapping[Scope, str]] = {"pixel": "image"}
    head = head_of_scope
    table = has_no_table

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        check_names(params, parameter_names("reconstruct", info.classes))
        return cls(
            info,
            int(number_within(info, params, "patch", 16, (1, 4096))),
            number_within(info, params, "share", 0.5, (0.0, 1.0)),
            centre=number_within(info, params, "centre", 0.7, (0.0, 1.0)),
            spread=number_within(info, params, "spread", 0.2, (1e-3, 10.0)),
        )

    def hide(self, pixels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Clean RGB in [0, 1] float[n, 3, h, w] -> (what the model is shown, in the same form; the target).

        Hidden squares show their picture's mean colour. Which are hidden follows from ``seed`` alone.
        """
        import torch

        n, _, height, width = pixels.shape
        if self.share == 0:
            grey = pixels.mean(1, keepdim=True).expand_as(pixels)
            return grey, self._normalise_pixels(pixels, torch.ones_like(pixels[:, :1]))
        rows, columns = -(-height // self.side), -(-width // self.side)
        dice = torch.Generator().manual_seed(seed)  # on the CPU: the same squares on any device
        rank = torch.rand(n, rows * columns, generator=dice).argsort(1).argsort(1)
        chosen = (rank < max(1, round(self.share * rows * columns))).view(n, 1, rows, columns)
        fine = chosen.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)[:, :, :height, :width]
        hidden = fine.to(pixels.device)
        shown = torch.where(hidden, pixels.mean((2, 3), keepdim=True), pixels)
        return shown, self._normalise_pixels(pixels, hidden.to(pixels.dtype))

    def _normalise_pixels(self, pixels: Tensor, weight: Tensor) -> Tensor:
        """float[n, 4, h, w]: normalised px, and which of them count."""
        import torch

        return torch.cat([(pixels - self.centre) / self.spread, weight], dim=1)

    def target(self, value: AnyTarget) -> Tensor:
        """None: float32[0], a place holder for what `hide` gives; a picture uint8[h, w, 3]: float32[4, h, w] of it, all
        px counting."""
        import torch

        if value is None:
            return torch.zeros(0)
        pixels = torch.from_numpy(np.asarray(value, np.float32) / np.float32(255)).permute(2, 0, 1)
        return self._normalise_pixels(pixels[None], torch.ones(1, 1, *pixels.shape[1:]))[0]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Squared error of the px that count (hidden ones), 1 for drawing their mean."""
        from wsi_mmm.tasks.losses_dense import pixels_loss
        from wsi_mmm.tasks.losses_tile import zero_loss

        return pixels_loss(logits, target) if target.ndim == 4 else zero_loss(logits)

    def quantise(self, logits: Tensor) -> Tensor:
        """RGB uint8[n, 3, h, w]."""
        return ((logits.float() * self.spread + self.centre) * 255.0).round().clamp(0.0, 255.0).byte()

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """psnr in dB: 10 log10(255^2 / mean squared error), of pictures uint8[h, w, 3] against drawn uint8[3, h, w],
        the mean over those that are given and not drawn exactly."""
        errors = [
            float(np.mean((np.asarray(value, np.float64).transpose(2, 0, 1) - drawn) ** 2))
            for value, drawn in pairs
            if value is not None
        ]
        some = [10.0 * np.log10(255.0**2 / error) for error in errors if error > 0]
        return {"psnr": float(np.mean(some))} if some else {}

    def interpret(self, window: U8, view: View) -> Objects:
        """Nothing."""
        return empty(self.info.name)
