"""A whole picture averaged at once."""

from __future__ import annotations

import numpy as np

from wsi_mmm.slides.resample.weights import Taps, Weights
from wsi_mmm.types import U8


def resample(source: U8, y: Taps, x: Taps) -> U8:
    """Return uint8[len(y), len(x), 3] of ``source`` uint8[h, w, 3], whose pixel (0, 0) is (y.first, x.first)."""
    out = np.empty((len(y.offsets) - 1, len(x.offsets) - 1, 3), np.uint8)
    Weights(y, x).average(source, y.first, 0, len(out), out)
    return out
