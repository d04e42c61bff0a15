"""A whole picture averaged at once."""

from __future__ import annotations

import numpy as np

from wsi_mmm.slides.resample.weights import Taps, average_rows
from wsi_mmm.types import U8


def resample(source: U8, y: Taps, x: Taps) -> U8:
    """Return uint8[len(y), len(x), 3] of ``source`` uint8[h, w, 3], whose pixel (0, 0) is (y.first, x.first)."""
    out = np.empty((len(y.begin), len(x.begin), 3), np.uint8)
    average_rows(source, y.first, (y, x), (0, len(out)), out)
    return out
