"""Outputs of tile and bag tasks as bytes or floats, and their targets as one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_mmm.tasks.base import Quantised, Scope
from wsi_mmm.types import F32

if TYPE_CHECKING:
    from torch import Tensor


def quantise_probabilities(probabilities: Tensor, scope: Scope) -> Tensor:
    """Probabilities in [0, 1] as 0..255 for tiles, of which there are many; as they are for bags."""
    import torch

    return probabilities if scope == "bag" else (probabilities * 255.0).round().to(torch.uint8)


def probabilities_of(values: Quantised) -> F32:
    """The probabilities that `quantise_probabilities` was given, to within 1/510 of those of tiles."""
    return values.astype(np.float32) / np.float32(255.0) if values.dtype == np.uint8 else values.astype(np.float32)


def stack_targets(targets: Sequence[Any], count: int) -> F32:
    """Numbers, or arrays of ``count``, as one float32[n, count]."""
    return np.stack([np.array(target, np.float32).reshape(count) for target in targets])
