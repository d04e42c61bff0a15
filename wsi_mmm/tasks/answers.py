"""What the kinds that answer per tile or per bag share: bytes or floats, truths as one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_mmm.tasks.base import Answer, Scope
from wsi_mmm.types import F32

if TYPE_CHECKING:
    from torch import Tensor


def as_answer(chance: Tensor, scope: Scope) -> Tensor:
    """Probabilities in [0, 1] as 0..255 for tiles, of which there are many; as they are for bags."""
    import torch

    return chance if scope == "bag" else (chance * 255.0).round().to(torch.uint8)


def shares(values: Answer) -> F32:
    """The probabilities that `as_answer` was given, to within 1/510 of those of tiles."""
    return values.astype(np.float32) / np.float32(255.0) if values.dtype == np.uint8 else values.astype(np.float32)


def vectors_of(truths: Sequence[Any], count: int) -> F32:
    """Numbers, or arrays of ``count``, as one float32[n, count]."""
    return np.stack([np.array(truth, np.float32).reshape(count) for truth in truths])
