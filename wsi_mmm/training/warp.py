"""Geometric change as one affine per picture, the same for its pixels and its target.

``theta`` float32[2, 3] takes crop px to sample px: (x, y) = theta[:, :2] @ (u, v) + theta[:, 2]; px edges are integers,
so the middle of px k is k + 0.5. Turns by right angles, flips and whole shifts copy pixels and labels exactly. Beyond
the sample there is white, and nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from wsi_mmm.errors import ConfigError
from wsi_mmm.tasks.targets import Boxes, Survival, Target
from wsi_mmm.types import F32, F64, I64, U8, Mask

VISIBLE = 0.35
"""Least share of a box that must lie in the crop; what shows less of itself is marked unknown."""

_BAND = 4  # px rows that an unknown area beyond a turned sample is cut into


@dataclass(frozen=True, slots=True)
class Change:
    """Geometric augmentation of images in training.

    ``flips``: left and right; ``quarters``: turns by right angles; ``angle``: degrees that it is turned further at
    most; ``scale``: objects get up to 1 + scale times as large or small; ``shift``: sizes of a crop that it may lie
    beside the middle of a sample cut out for it (whole images: any place in them, and this much beyond). ``place``:
    False puts every crop in the middle. Boxes turned by free angles get loose: a box turns as a rectangle.
    """

    flips: bool = True
    quarters: bool = True
    angle: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    place: bool = True

    def __post_init__(self) -> None:
        if not (0.0 <= self.angle <= 180.0 and 0.0 <= self.scale <= 7.0 and 0.0 <= self.shift <= 1.0):
            raise ConfigError(
                f"change: angle {self.angle}, scale {self.scale}, shift {self.shift}: "
                "give an angle up to 180 degrees, a scale up to 7 and a shift up to 1"
            )


NO_CHANGE = Change(flips=False, quarters=False, place=False)


def reach(change: Change, size: int, margin: int = 0) -> int:
    """Side in px that a sample needs so that no crop of ``size`` px, and ``margin`` px round it, reaches beyond it."""
    turned = math.radians(min(change.angle, 45.0))
    side = (size + 2 * margin) * (1.0 + change.scale) * (math.cos(turned) + math.sin(turned))
    side += 2.0 * change.shift * size
    return size + 2 * math.ceil(max(0.0, side - size - 1e-6) / 2)


def draw_thetas(change: Change, shapes: Sequence[tuple[int, int]], *, size: int, read: int, seed: int) -> F32:
    """float32[n, 2, 3] of crops of ``size`` px out of samples of ``shapes`` (height, width).

    Samples of ``read`` x ``read`` px were cut out round their item, others are whole images. Sample i gets the same
    numbers whatever the others are.
    """
    drawn = np.random.default_rng(seed).random((len(shapes), 6))
    thetas = [
        _make_theta(change, shape, size=size, whole=shape != (read, read), drawn=row)
        for shape, row in zip(shapes, drawn, strict=True)
    ]
    return np.stack(thetas).astype(np.float32) if thetas else np.zeros((0, 2, 3), np.float32)


def _make_theta(change: Change, shape: tuple[int, int], *, size: int, whole: bool, drawn: F64) -> F64:
    linear = _linear_part(change, drawn)
    half = np.abs(linear).sum(1) * size / 2
    middle = np.array([shape[1], shape[0]]) / 2
    slack = np.abs(middle - half) if whole and change.place else np.zeros(2)
    slack = slack + change.shift * size
    centre = middle + (2.0 * drawn[4:6] - 1.0) * slack
    offset = centre - linear.sum(1) * size / 2
    if _right_angled(linear):
        offset = np.round(offset)  # whole px are copied as they are
    return np.concatenate([linear, offset[:, None]], axis=1)


def _linear_part(change: Change, drawn: F64) -> F64:
    """The 2 x 2 part: a flip, a turn and a scale; exact for right angles."""
    flip = -1.0 if change.flips and drawn[0] < 0.5 else 1.0
    quarter = int(drawn[1] * 4) if change.quarters else 0
    turn = math.radians(change.angle) * (2.0 * drawn[2] - 1.0)
    step = (1.0 + change.scale) ** (1.0 - 2.0 * drawn[3])
    cos, sin = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[quarter]
    right = np.array([[cos * flip, -sin], [sin * flip, cos]])
    free = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    linear: F64 = step * (free @ right) if change.angle or change.scale else right
    return linear


def _right_angled(linear: F64) -> bool:
    return bool(np.isin(linear, (-1.0, 0.0, 1.0)).all() and (np.abs(linear).sum(0) == 1).all())


def widened(theta: F32, margin: int) -> F32:
    """The same warp of a crop with ``margin`` more px on every side; ``theta`` float32[2, 3]."""
    out = theta.copy()
    out[:, 2] -= theta[:, :2].sum(1) * np.float32(margin)
    return out


def cut(pixels: U8, theta: F32, size: int) -> tuple[U8, F32]:
    """The part of ``pixels`` uint8[h, w, 3] (a view) that the crop needs, and its warp from there. Nothing else of the
    picture goes to the device; at least one px."""
    scale = float(np.abs(theta[:, :2]).max())
    rim = 0 if _is_exact(theta) else math.ceil(2.0 * scale) + 1
    corners = _crop_corners(theta, size)
    shape = np.array(pixels.shape[1::-1])
    low = np.clip(np.floor(corners.min(0)).astype(np.int64) - rim, 0, shape - 1)
    high = np.clip(np.ceil(corners.max(0)).astype(np.int64) + rim, low + 1, shape)
    moved = theta.copy()
    moved[:, 2] -= low.astype(np.float32)
    return pixels[low[1] : high[1], low[0] : high[0]], moved


def padded(pictures: Sequence[U8]) -> U8:
    """Pictures uint8[h, w, 3] of any sizes as one uint8[n, H, W, 3], white beside the smaller ones."""
    height, width = np.array([picture.shape[:2] for picture in pictures]).max(0)
    out = np.full((len(pictures), height, width, 3), 255, np.uint8)
    for place, picture in zip(out, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return out


# ---------------------------------------------------------------- pixels, on the device


def warp_pixels(pixels: Tensor, theta: Tensor, size: int) -> Tensor:
    """uint8[n, H, W, 3] (white beside smaller pictures) -> float32[n, 3, size, size] in [0, 1], channels_last.

    ``theta`` float32[n, 2, 3] on the CPU: the way to sample is chosen there, without waiting for the device.
    Warps that copy are copied; the others are bilinear, of averages of 2 ** k px where they show less.
    """
    if len(theta) != len(pixels) or theta.device.type != "cpu":
        raise ValueError("theta must be on the CPU, with one warp for each picture")
    levels = [_sampling_level(one) for one in theta.numpy()]
    if len(set(levels)) == 1:
        return _warp_alike(pixels, theta, size=size, level=levels[0])
    out = torch.empty((len(pixels), size, size, 3), device=pixels.device).permute(0, 3, 1, 2)
    for level in sorted(set(levels)):
        which = torch.tensor([i for i, one in enumerate(levels) if one == level])
        there = which.to(pixels.device)
        out[there] = _warp_alike(pixels[there], theta[which], size=size, level=level)
    return out


def _sampling_level(theta: F32) -> int:
    """-1: px are copied; k >= 0: sampled from averages of 2 ** k px, of which a crop px spans 1.5 at most (k <= 6)."""
    span = float(np.linalg.norm(theta[:, :2].astype(np.float64), axis=0).max())
    return -1 if _is_exact(theta) else min(6, max(0, math.ceil(math.log2(max(span, 1e-6) / 1.5))))


def _warp_alike(pixels: Tensor, theta: Tensor, *, size: int, level: int) -> Tensor:
    """Warp pictures of one `_sampling_level`."""
    if level < 0:
        return _copy_pixels(pixels, theta, size)
    t = torch.arange(size, device=pixels.device, dtype=torch.float32) + 0.5
    a, b, c = (theta.to(pixels.device, non_blocking=True)[:, :, k, None, None] for k in range(3))
    both = a * t + b * t[:, None] + c  # sample px (x, y) of the middles of crop px
    return _sample_pixels(pixels, both[:, 0], both[:, 1], level=level)


def _copy_pixels(pixels: Tensor, theta: Tensor, size: int) -> Tensor:
    """Right angles: which px is taken is a number of its row plus one of its column, each a line found on the CPU."""
    n, height, width, _ = pixels.shape
    t = torch.arange(size, dtype=torch.float32) + 0.5
    along, across = ((theta[:, :, k, None] * t).floor().long() for k in (0, 1))  # [n, 2 (x, y), size]
    upright = (theta[:, 0, 0] != 0)[:, None]
    offset = theta[:, :, 2].long()
    # Either x goes with the columns and y with the rows, or the other way round.
    x = torch.where(upright, along[:, 0], across[:, 0]) + offset[:, :1]
    y = torch.where(upright, across[:, 1], along[:, 1]) + offset[:, 1:]
    x_in, y_in = (x >= 0) & (x < width), (y >= 0) & (y < height)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1) * width
    first = torch.arange(n)[:, None] * (height * width)
    rows, columns = torch.where(upright, y, x) + first, torch.where(upright, x, y)
    index = rows.to(pixels.device)[:, :, None] + columns.to(pixels.device)[:, None, :]
    found = pixels.reshape(-1, 3).index_select(0, index.flatten()).view(n, size, size, 3)
    if not (x_in.all() and y_in.all()):
        row_in, column_in = torch.where(upright, y_in, x_in), torch.where(upright, x_in, y_in)
        inside = row_in.to(pixels.device)[:, :, None, None] & column_in.to(pixels.device)[:, None, :, None]
        found = torch.where(inside, found, 255)
    return found.float().div_(255.0).permute(0, 3, 1, 2)


def _sample_pixels(pixels: Tensor, x: Tensor, y: Tensor, *, level: int) -> Tensor:
    # Darkness instead of light: beyond the picture, where grid_sample and the padding give 0, it is white.
    dark = (255 - pixels).permute(0, 3, 1, 2).float()
    step = 1 << level
    if level:
        height, width = dark.shape[-2:]
        dark = functional.avg_pool2d(functional.pad(dark, (0, -width % step, 0, -height % step)), step)
    height, width = dark.shape[-2:]
    grid = torch.stack([x * (2.0 / (step * width)) - 1.0, y * (2.0 / (step * height)) - 1.0], dim=-1)
    found = functional.grid_sample(dark, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    light = 1.0 - found / 255.0
    return light.clamp_(0.0, 1.0).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- target, in numpy


def warp_target(kind: str, target: Target, theta: F32, size: int, *, visible: float = VISIBLE) -> Target:
    """The target of the crop: label maps and masks by nearest px, unknown beyond the sample; boxes moved and clipped,
    unknown where less than ``visible`` of one shows; what is no picture stays as it is. ``theta`` float32[2, 3]."""
    if kind in ("segment", "instances", "multisegment"):
        return _warp_labels(np.asarray(target), theta, size)
    if isinstance(target, Boxes):
        return _warp_boxes(target, theta, size=size, visible=visible)
    return target


def unknown_target(kind: str, classes: int, size: int) -> Target:
    """Nothing is known of a crop: a target of the right shape that is not learnt from."""
    if kind == "instances" and classes > 1:
        return np.full((2, size, size), -1, np.int32)
    if kind in ("segment", "instances"):
        return np.full((size, size), -1, np.int32)
    if kind == "multisegment":
        return np.full((classes, size, size), -1, np.int8)
    if kind == "detect":
        return Boxes(np.array([[0, 0, size, size]], np.float32), np.array([-1], np.int32), size, size)
    if kind in ("multilabel", "regress"):
        return np.full(classes, np.nan, np.float32)
    if kind == "survive":
        return Survival(math.nan, False)
    return None if kind == "reconstruct" else -1


def places(theta: F32, size: int) -> tuple[I64, I64]:
    """Sample px (x, y) of crop px, each of a shape that broadcasts to (size, size): a line where turns are right."""
    t: F64 = np.arange(size, dtype=np.float64) + 0.5
    (a, b, c), (d, e, f) = theta.astype(np.float64).tolist()
    return _index_line(a, b, c, t), _index_line(d, e, f, t)


def _index_line(along: float, across: float, offset: float, t: F64) -> I64:
    if across == 0.0:
        value = (along * t + offset)[None, :]
    elif along == 0.0:
        value = (across * t + offset)[:, None]
    else:
        value = along * t[None, :] + across * t[:, None] + offset
    return np.floor(value).astype(np.int64)


def _inside_mask(x: I64, y: I64, shape: Sequence[int]) -> Mask:
    inside: Mask = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    return inside


def _warp_labels(labels: np.ndarray[tuple[int, ...], np.dtype[np.generic]], theta: F32, size: int) -> Target:
    """[..., h, w] -> [..., size, size] of the same type, -1 beyond."""
    x, y = places(theta, size)
    height, width = labels.shape[-2:]
    inside = _inside_mask(x, y, (height, width))
    found = _pick_labels(labels, np.clip(x, 0, width - 1), np.clip(y, 0, height - 1))
    return found if inside.all() else np.where(inside, found, -1).astype(labels.dtype)


def _pick_labels(labels: np.ndarray[tuple[int, ...], np.dtype[Any]], x: I64, y: I64) -> np.ndarray[Any, np.dtype[Any]]:
    """``labels[..., y, x]``; rows and columns by themselves where turns are right, which is several times faster."""
    picked: np.ndarray[Any, np.dtype[Any]]
    if x.shape[0] == 1 and y.shape[1] == 1:
        picked = labels.take(y[:, 0], axis=-2).take(x[0], axis=-1)
    elif x.shape[1] == 1 and y.shape[0] == 1:
        picked = np.ascontiguousarray(labels.take(y[0], axis=-2).take(x[:, 0], axis=-1).swapaxes(-1, -2))
    else:
        picked = labels[..., y, x]
    return picked


def _warp_boxes(boxes: Boxes, theta: F32, *, size: int, visible: float) -> Boxes:
    moved = _move_boxes(boxes.xyxy.astype(np.float64), theta)
    clipped = np.clip(moved, 0.0, size)
    shown = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    share = box_areas(clipped) / np.maximum(box_areas(moved), 1e-9)
    labels = np.where(share < visible, -1, boxes.labels)[shown]
    beyond = _outside_boxes(theta, (boxes.height, boxes.width), size)
    xyxy = np.concatenate([clipped[shown], beyond]).astype(np.float32)
    return Boxes(xyxy, np.concatenate([labels, np.full(len(beyond), -1)]).astype(np.int32), size, size)


def _move_boxes(xyxy: F64, theta: F32) -> F64:
    """Bounds in the crop of boxes float64[n, 4] in the sample."""
    matrix = theta.astype(np.float64)
    corners = xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    there = (corners - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
    return np.concatenate([there.min(1), there.max(1)], axis=1)


def box_areas(xyxy: F64) -> F64:
    """Areas float64[n] of boxes float64[n, 4] (x0, y0, x1, y1)."""
    area: F64 = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1])
    return area


def _outside_boxes(theta: F32, shape: tuple[int, int], size: int) -> F64:
    """Boxes float64[k, 4] that cover the crop's px beyond the sample; of turned samples, in bands of `_BAND` rows, as
    much as covers nothing of the sample."""
    corners = _crop_corners(theta, size)
    if (corners >= 0).all() and (corners <= np.array(shape[::-1])).all():
        return np.zeros((0, 4))
    x, y = places(theta, size)
    outside: Mask = ~np.broadcast_to(_inside_mask(x, y, shape), (size, size))
    band = 1 if 1 in x.shape else _BAND
    bands = np.logical_and.reduceat(outside, np.arange(0, size, band), axis=0)
    found: F64 = np.minimum(rectangles(bands) * np.array([1, band, 1, band]), size)
    return found


def rectangles(mask: Mask) -> F64:
    """The True cells of bool[h, w] as disjoint rectangles float64[k, 4] (x0, y0, x1, y1): runs of a row, joined with
    the same run of the rows below."""
    done: list[tuple[int, int, int, int]] = []
    growing: dict[tuple[int, int], int] = {}  # run -> row it begins in
    for row in range(len(mask) + 1):
        line = np.concatenate([[False], mask[row], [False]]) if row < len(mask) else np.zeros(2, bool)
        edges = np.flatnonzero(line[1:] != line[:-1]).reshape(-1, 2)
        runs = {(int(x0), int(x1)) for x0, x1 in edges}
        done += [(x0, top, x1, row) for (x0, x1), top in growing.items() if (x0, x1) not in runs]
        growing = {run: growing.get(run, row) for run in sorted(runs)}
    return np.array(done, np.float64).reshape(-1, 4)


def _crop_corners(theta: F32, size: int) -> F64:
    """float64[4, 2]: sample px of the crop's corners."""
    corners_of_crop = np.array([[0, 0], [size, 0], [0, size], [size, size]], np.float64)
    corners: F64 = corners_of_crop @ theta[:, :2].astype(np.float64).T + theta[:, 2]
    return corners


def _is_exact(theta: F32) -> bool:
    """Return whether px are copied as they are: right angles, flips and whole shifts."""
    return _right_angled(theta[:, :2].astype(np.float64)) and bool((theta[:, 2] == np.round(theta[:, 2])).all())
