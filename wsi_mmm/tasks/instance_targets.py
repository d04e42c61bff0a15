"""Targets of the `instances` task: what each px of a picture's label image teaches, as numpy arrays."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from wsi_mmm.types import F32, F64, I32, I64, Mask

FIRST_POINT = -2
"""Labels from this downwards are the areas of points, each with a number of its own: outlines are unknown there."""

STRIDE_MAX = 8.0  # target px that one offset reaches at most; farther centres are reached in several hops


def split_target(value: I32) -> tuple[I32, I32]:
    """Labels and classes int32[h, w] of a target: int32[2, h, w], or int32[h, w] labels of which no class is known."""
    return (value[0], value[1]) if value.ndim == 3 else (value, np.full_like(value, -1))


def make_target(labels: I32) -> F32:
    """int32[h, w] labels -> float32[5, h / 2, w / 2]; see `Instances.target`."""
    height, width = labels.shape[0] // 2, labels.shape[1] // 2
    out = np.zeros((5, height, width), np.float32)
    if labels.size and int(labels.max()) < 0:
        out[:] = np.nan
        return out
    labels = _mask_cut_objects(labels)
    ids, index = _number_labels(np.maximum(labels, 0))
    hidden = int(ids[0] == 0)
    centre_y, centre_x, radius = _centroids_and_radii(index, len(ids), hidden=hidden)
    quarters = [index[y::2, x::2] for y in (0, 1) for x in (0, 1)]
    drawn = (index >= hidden).view(np.uint8)
    rows = drawn[::2] + drawn[1::2]
    out[0] = rows[:, ::2] + rows[:, 1::2]
    out[0] *= 0.25
    own = np.maximum(np.maximum(quarters[0], quarters[1]), np.maximum(quarters[2], quarters[3]))
    inside = own >= hidden
    out[1] = _relative_depth(own, inside, len(ids))
    row, column = np.nonzero(inside)
    mine = own[inside]
    to_x = centre_x.astype(np.float32)[mine] - (2 * column + 1).astype(np.float32)
    to_y = centre_y.astype(np.float32)[mine] - (2 * row + 1).astype(np.float32)
    distance = np.maximum(np.sqrt(to_x * to_x + to_y * to_y), np.float32(1e-6))
    short = STRIDE_MAX * (1.0 - np.exp(distance * np.float32(-1.0 / STRIDE_MAX))) / distance
    out[2, inside], out[3, inside] = to_x * short, to_y * short
    out[4, inside] = (8.0 / np.maximum(radius, 4.0)).astype(np.float32)[mine]
    if int(labels.min()) < 0:
        unknown = (labels < 0).reshape(height, 2, width, 2).any(axis=(1, 3))
        out[0, unknown], out[4, unknown] = np.nan, 0.0
    return out


def _number_labels(labels: I32) -> tuple[I64, I32]:
    """Labels (0 or more) that occur, ascending, and for each px which of them it has; by a table, which is ten times
    faster than sorting, as long as labels are small."""
    most = int(labels.max(initial=0))
    if most > 1 << 22:
        ids, flat = np.unique(labels, return_inverse=True)
        return ids.astype(np.int64), flat.reshape(labels.shape).astype(np.int32)
    seen = np.bincount(labels.ravel(), minlength=most + 1) > 0
    return np.flatnonzero(seen), np.take(np.cumsum(seen, dtype=np.int32) - np.int32(1), labels)


def _mask_cut_objects(labels: I32) -> I32:
    """Unknown px, and all px of objects that touch them, are -1."""
    unknown = labels < 0
    if not unknown.any():
        return labels
    cut = np.unique(labels[ndimage.binary_dilation(unknown)])
    found: I32 = np.where(unknown | np.isin(labels, cut[cut > 0]), -1, labels).astype(np.int32)
    return found


def known_labels(value: I32, found: I32) -> tuple[I32, I32]:
    """Labels of both, less unknown px and found objects that lie in them with half their px or more."""
    value = _mask_cut_objects(value)
    unknown = value < 0
    if not unknown.any():
        return value, found
    size = int(found.max(initial=0)) + 1
    hidden = 2 * np.bincount(found[unknown], minlength=size) >= np.bincount(found.ravel(), minlength=size)
    return np.maximum(value, 0), np.where(unknown | hidden[found], 0, found)


def _relative_depth(own: I32, inside: Mask, count: int) -> F64:
    """How deep inside its object a px lies: near 0 at the rim (touching ones too), 1 in the middle."""
    padded = np.pad(own, 1, mode="edge")
    beside = (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1])
    rim = np.logical_or.reduce([other != own for other in beside])
    depth = (ndimage.distance_transform_edt(np.pad(~rim, 1, mode="edge"))[1:-1, 1:-1] + 0.5) * inside
    deepest = np.zeros(count)
    np.maximum.at(deepest, own[inside], depth[inside])
    share: F64 = depth / np.maximum(deepest[own], 0.5)
    return share


def _centroids_and_radii(index: I32, count: int, hidden: int) -> tuple[F64, F64, F64]:
    """Centroid (y, x; px edges are integers) and radius of the disc of equal area, per label; those below ``hidden``
    (the background) are not looked at."""
    flat = index.ravel()
    where = np.flatnonzero(flat >= hidden)
    number, (y, x) = flat[where], np.divmod(where, index.shape[1])
    area = np.bincount(number, minlength=count)
    some = np.maximum(area, 1)
    mean_y = np.bincount(number, weights=y, minlength=count) / some + 0.5
    mean_x = np.bincount(number, weights=x, minlength=count) / some + 0.5
    return mean_y, mean_x, np.sqrt(area / np.pi)
