"""Drawing the regions of a core: what `segment` and `multisegment` share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsi_mmm.outputs.polygons import Frame, to_objects, trace
from wsi_mmm.tasks.base import View
from wsi_mmm.types import I32, I64, U8, Objects


def core_part(window: U8, view: View, stride: int) -> U8:
    """The map px of uint8[C, h, w] that lie in the core and on the slide."""
    y0, x0, y1, x1 = (v // stride for v in view.core)
    top, left = view.y0 // stride, view.x0 // stride
    y1, x1 = min(y1, -(-view.height // stride)), min(x1, -(-view.width // stride))
    return window[:, max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)]


def draw_regions(labels: I32, view: View, stride: int, task: str) -> Objects:
    """One object per connected region of ``labels`` (class + 1 per map px of the core, 0: none), cut at the slide's
    edge; anchor: its first px."""
    y, x = max(view.core[0], view.y0), max(view.core[1], view.x0)
    rings = trace(labels, "exact")
    first = rings.ring_offsets[rings.object_offsets[:-1]]
    objects = to_objects(
        rings,
        Frame(x, y, stride, view.scale_x, view.scale_y),
        task=task,
        class_index=rings.labels - 1,
        anchor=_first_corners(rings.coords[first], (y, x), stride),
    )
    np.minimum(objects.coords, (view.width * view.scale_x, view.height * view.scale_y), out=objects.coords)
    return objects


def _first_corners(corners: npt.NDArray[np.float64], origin: tuple[int, int], stride: int) -> I64:
    """(y, x) target px of the px at the top-left corner that each exterior begins with."""
    return corners[:, ::-1].astype(np.int64) * stride + np.array(origin, np.int64)
