"""Measurements of objects in physical units, from their outlines as they are published.

Areas, perimeters and moments of a polygon are sums over its edges (shoelace formulas), holes taken out: exact, without
pixels, and so the same however the slide was cut into blocks. Names are those that QuPath uses where it has one.
"""

from __future__ import annotations

import numpy as np

from wsi_mmm.outputs.polygons import following_points
from wsi_mmm.types import F64, I64, Objects

AREA, PERIMETER, CIRCULARITY = "Area µm^2", "Length µm", "Circularity"
ECCENTRICITY, MAJOR_AXIS, MINOR_AXIS = "Eccentricity", "Major axis µm", "Minor axis µm"

DECIMALS = 4
"""Measurements are rounded to so many decimals: finer than any of them is known."""


def measure_shapes(objects: Objects, mpp_x: float, mpp_y: float) -> dict[str, F64]:
    """Area and perimeter (of holes, too) of each object, circularity (4 π area / perimeter²), and the eccentricity and
    axes of the ellipse with the same second moments, as of scikit-image's ``regionprops``; float64[n] each.

    Objects without area, and slivers whose moments are no ellipse's, have NaN in place of what is not defined.
    """
    moments = _outline_moments(objects, mpp_x, mpp_y)
    with np.errstate(divide="ignore", invalid="ignore"):
        area, length = moments["area"], moments["length"]
        x, y = moments["x"] / area, moments["y"] / area
        xx, yy, xy = (moments[name] / area - shift for name, shift in (("xx", x * x), ("yy", y * y), ("xy", x * y)))
        half, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
        large, small = half + spread, np.maximum(half - spread, 0.0)
        found = {
            AREA: area, PERIMETER: length, CIRCULARITY: 4 * np.pi * area / (length * length),
            ECCENTRICITY: np.sqrt(1 - small / large), MAJOR_AXIS: 4 * np.sqrt(large), MINOR_AXIS: 4 * np.sqrt(small),
        }  # fmt: skip
    return {name: np.round(values, DECIMALS) for name, values in found.items()}


def centroids_um(objects: Objects, mpp_x: float, mpp_y: float) -> F64:
    """float64[n, 2]: centroids (x, y) in µm from the corner of the slide."""
    moments = _outline_moments(objects, mpp_x, mpp_y)
    first = objects.coords[_point_offsets(objects)[:-1]] * (mpp_x, mpp_y)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(first + np.stack([moments["x"], moments["y"]], axis=1) / moments["area"][:, None], np.float64)


def _point_offsets(objects: Objects) -> I64:
    """int64[n + 1]: the points of each object."""
    return objects.ring_offsets[objects.object_offsets]


def _outline_moments(objects: Objects, mpp_x: float, mpp_y: float) -> dict[str, F64]:
    """Area, perimeter and the integrals of x, y, xx, xy and yy over each object, in µm from its first point."""
    offsets, count = _point_offsets(objects), len(objects)
    owner = np.repeat(np.arange(count), np.diff(offsets))
    following = following_points(objects)
    (x0, y0), (x1, y1) = ((objects.coords[at] - objects.coords[offsets[owner]]).T for at in (slice(None), following))
    x0, x1, y0, y1 = x0 * mpp_x, x1 * mpp_x, y0 * mpp_y, y1 * mpp_y
    cross = x0 * y1 - x1 * y0
    sums = {
        "area": cross / 2, "length": np.hypot(x1 - x0, y1 - y0),
        "x": cross * (x0 + x1) / 6, "y": cross * (y0 + y1) / 6,
        "xx": cross * (x0 * x0 + x0 * x1 + x1 * x1) / 12, "yy": cross * (y0 * y0 + y0 * y1 + y1 * y1) / 12,
        "xy": cross * (x0 * y1 + 2 * x0 * y0 + 2 * x1 * y1 + x1 * y0) / 24,
    }  # fmt: skip
    return {
        name: np.asarray(np.bincount(owner, weights=values, minlength=count), np.float64)
        for name, values in sums.items()
    }
