"""A stored level as it is, without the choice of the best source."""

from __future__ import annotations

from typing import Any

import numpy as np

from wsi_mmm.slides.resample.scaled import Source, Window
from wsi_mmm.types import I64, U8


def stored(reader: Any, source: Source, window: Window) -> tuple[U8, I64]:
    """Return the pixels of a window of a source of the TIFF reader, and the rectangles that failed."""
    x0, y0, x1, y1 = window
    out = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
    return out, reader._fill_window(source, window, out)
