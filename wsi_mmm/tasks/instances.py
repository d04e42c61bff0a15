"""`instances`: separate every object of one class (nuclei), touching ones too.

The head says four things per map px: is it foreground, how deep inside its object, and in which direction (dx, dy) the
object's centre lies, with the distance while it is short. Foreground px walk to centres, which parts touching objects;
`grouping` turns the bytes into labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsi_mmm.errors import ModelError
from wsi_mmm.outputs.polygons import Frame, to_objects, trace
from wsi_mmm.tasks import grouping, metrics
from wsi_mmm.tasks.base import AnyTarget, Quantised, Scope, View, check_view
from wsi_mmm.tasks.params import Params
from wsi_mmm.types import F64, I32, I64, U8, Mask, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.model.heads import HeadSpec

UNIT = 4.0  # target px per unit of the head's offset logits: keeps them near 1
STRIDE_MAX = 8.0  # target px that one offset reaches at most; farther centres are reached in several hops


DEFAULT = grouping.Rules()


@dataclass(frozen=True, slots=True)
class Instances:
    """The `instances` task; maps have ``stride`` 2."""

    info: TaskInfo
    rules: grouping.Rules = DEFAULT
    scope: Scope = "pixel"
    stride: int = 2
    channels: int = 4
    halo: int = 2 * grouping.HALO

    heads: ClassVar[Mapping[Scope, str]] = {"pixel": "map"}

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        if len(info.classes) != 1:
            raise ModelError(f"task '{info.name}': 'instances' takes exactly one class, not {len(info.classes)}")
        return cls(info, grouping.Rules(**{name: int(value) for name, value in params.items()}))

    def head(self, spec: HeadSpec) -> nn.Module:
        """Logits float[n, 4, h, w]: foreground, depth, dx, dy (offsets in units of `UNIT` target px)."""
        from wsi_mmm.model.heads import build_head

        return build_head("map", spec, 4)

    def target(self, value: AnyTarget) -> Tensor:
        """int32[h, w] labels -> float32[5, h / 2, w / 2]: soft foreground, depth, dx, dy (target px), weight of offsets
        (8 / radius of the object: what counts is the error relative to its size).

        Negative labels mean unknown: there, and where an object borders on them (how far it goes on is unknown, too),
        the foreground is NaN, and `loss` leaves these px out.
        """
        import torch

        return torch.from_numpy(_make_target(np.asarray(value, np.int32)))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy and Dice of the foreground, depth, and smooth L1 of the offsets inside objects."""
        from wsi_mmm.tasks.losses_dense import instances_loss

        return instances_loss(logits, target, unit=UNIT)

    def quantise(self, logits: Tensor) -> Tensor:
        """Probabilities as 0..255; offsets in 1 / `grouping.STEPS` map px round 128."""
        import torch

        chance = torch.sigmoid(logits[:, :2].float()) * 255.0
        offset = logits[:, 2:].float() * (UNIT / self.stride * grouping.STEPS) + grouping.ZERO
        return torch.cat([chance, offset], dim=1).round().clamp(0.0, 255.0).to(torch.uint8)

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """F1 and the like at IoU 0.5, over all objects of all pictures; found ones in unknown areas do not count."""
        known = (_known_labels(np.asarray(value, np.int32), self.labels(maps)) for value, maps in pairs)
        return metrics.total(metrics.match(value, found) for value, found in known).quality()

    def labels(self, maps: U8) -> I32:
        """uint8[4, h, w] of one whole picture -> labels int32[2h, 2w]."""
        height, width = maps.shape[1:]
        return grouping.group(maps, grouping.MapWindow(0, 0, height, width), self.rules)[0]

    def interpret(self, window: U8, view: View) -> Objects:
        """Objects whose centre px lies in the core, cut at the slide's edge, with their mean ``probability``."""
        check_view(window, view, self.stride)
        rows, columns = -(-view.height // self.stride), -(-view.width // self.stride)
        position = grouping.MapWindow(view.y0 // self.stride, view.x0 // self.stride, rows, columns)
        labels, centres = grouping.group(window, position, self.rules)
        labels[max(0, view.height - view.y0) :] = 0
        labels[:, max(0, view.width - view.x0) :] = 0
        anchors = centres * self.stride
        y0, x0, y1, x1 = view.core
        owned = (anchors[:, 0] >= y0) & (anchors[:, 0] < y1) & (anchors[:, 1] >= x0) & (anchors[:, 1] < x1)
        labels = np.append(False, owned)[labels] * labels
        rings = trace(labels)
        number = rings.labels.astype(np.int64) - 1
        return to_objects(
            rings,
            Frame(view.x0, view.y0, 1.0, view.scale_x, view.scale_y),
            task=self.info.name,
            class_index=np.zeros(len(number), np.int32),
            anchor=anchors[number],
            measurements={"probability": _mean_probabilities(labels, grouping.double(window[0]), rings.labels)},
        )

    def table(self, values: Quantised) -> Mapping[str, npt.NDArray[Any]]:
        """Pixel tasks have no tile table."""
        return {}


def _mean_probabilities(labels: I32, doubled: npt.NDArray[np.uint16], which: I32) -> F64:
    """Mean foreground probability of each label in ``which``: sums of integers, divided once."""
    drawn = labels > 0
    number, size = labels[drawn], int(which.max()) + 1 if len(which) else 1
    sums = np.bincount(number, weights=doubled[drawn], minlength=size)
    counts = np.bincount(number, minlength=size)
    means: F64 = sums[which] / (counts[which] * (16.0 * 255.0))
    return means


def _make_target(labels: I32) -> npt.NDArray[np.float32]:
    """See `Instances.target`."""
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


def _known_labels(value: I32, found: I32) -> tuple[I32, I32]:
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
