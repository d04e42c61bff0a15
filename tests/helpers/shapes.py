"""Objects that tests of outputs share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import shapely

from wsi_mmm.outputs.polygons import Frame, offsets_of, shapes, to_objects, trace
from wsi_mmm.types import Objects, TaskInfo

NUCLEI = TaskInfo("nuclei", "instances", ("nucleus", 'Ärger "%d"'), ((60, 120, 220), (220, 60, 60)))


def areas(objects: Objects) -> npt.NDArray[np.float64]:
    """float64[n]: area of each object, holes taken out."""
    return shapely.area(shapes(objects))


def centroids(objects: Objects) -> npt.NDArray[np.float64]:
    """float64[n, 2]: centroid (x, y) of each object."""
    return shapely.get_coordinates(shapely.centroid(shapes(objects)))


def regions(labels: npt.ArrayLike, x0: int = 0, y0: int = 0) -> Objects:
    """Exact regions of a label image (class = label - 1) whose top-left pixel is (y0, x0), with their pixel counts."""
    rings = trace(np.asarray(labels, np.int32), "exact")
    anchor = np.zeros((len(rings), 2), np.int64)
    found = to_objects(rings, Frame(x0, y0), task="tissue", class_index=rings.labels - 1, anchor=anchor)
    return replace(found, measurements={"pixels": areas(found)})


def polygons(*rings: npt.ArrayLike, **measurements: npt.ArrayLike) -> Objects:
    """One object of class 0 per ring of (x, y)."""
    arrays = [np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings]
    n = len(arrays)
    return Objects(
        "nuclei",
        np.concatenate([*arrays, np.empty((0, 2))]),
        offsets_of(np.array([len(a) for a in arrays], np.int64)),
        np.arange(n + 1),
        np.zeros(n, np.int32),
        np.stack([np.arange(n), np.arange(n)], axis=1),
        {name: np.asarray(values, np.float64) for name, values in measurements.items()},
    )


def ellipses(count: int, seed: int = 0, corners: int = 24) -> Objects:
    """Wobbly ellipses with two measurements, classes 0 and 1."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    radius = rng.uniform(5, 15, (count, 1)) * (1 + 0.1 * rng.standard_normal((count, corners)))
    centre = rng.uniform(60, 9_900, (count, 1, 2))
    coords = (centre + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)).reshape(-1, 2)
    offsets = np.arange(count + 1, dtype=np.int64)
    measured = {"area": rng.uniform(0, 300, count), "probability": rng.uniform(0, 1, count)}
    classes = rng.integers(0, 2, count, dtype=np.int32)
    return Objects("nuclei", coords, offsets * corners, offsets, classes, centre[:, 0, ::-1].astype(np.int64), measured)
