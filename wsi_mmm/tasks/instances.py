"""`instances`: separate every object (nuclei), touching ones too; of several classes, tell the class of each.

The head says four things per map px: is it foreground, how deep inside its object, and in which direction (dx, dy) the
object's centre lies, with the distance while it is short. Foreground px walk to centres, which parts touching objects;
`group_pixels` turns the bytes into labels. With several classes the head also says the class of a px, as `segment`
does; an object is of the class that is likeliest over its px. Outlines and classes may come from different data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import label as connected

from wsi_mmm.outputs.polygons import Frame, to_objects, trace
from wsi_mmm.tasks import metrics
from wsi_mmm.tasks.base import (
    AnyTarget,
    Params,
    Quantised,
    Scope,
    check_names,
    class_weights,
    has_no_table,
    head_of_scope,
    number_within,
)
from wsi_mmm.tasks.class_metrics import match_classes, no_matches
from wsi_mmm.tasks.facts import parameter_names
from wsi_mmm.tasks.instance_targets import known_labels, make_target, split_target
from wsi_mmm.tasks.window import View, check_view
from wsi_mmm.types import F64, I32, I64, U8, Mask, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor

UNIT = 4.0  # target px per unit of the head's offset logits: keeps them near 1

ZERO = 128  # the byte that says "offset 0"
STEPS = 16  # offset bytes per map px
SPAN = 24  # map px that a vote strays at most
REACH = 8  # map px between a vote and the centre that may still win it
PEAK = 3  # a centre is the best of its (2 * PEAK + 1)^2 neighbourhood
SMOOTH = 2  # binomial smoothings of the votes, one px of reach each
HALO = 2 * REACH + PEAK + SMOOTH + 2 * SPAN + 1  # map px; see `group_pixels`


@dataclass(frozen=True, slots=True)
class Rules:
    """Thresholds: ``foreground`` byte, ``votes`` for a centre (a vote weighs a quarter of the depth it exceeds ``core``
    by, times 256 by smoothing), ``area`` target px at least, ``hops`` of a vote, ``core`` depth byte of a voter.

    Only px deep inside vote: near the rim, where objects touch, offsets point between the two centres.
    """

    foreground: int = 150
    votes: int = 1000
    area: int = 24
    hops: int = 12
    core: int = 136


DEFAULT = Rules()
SHAPES = 4  # channels before those of the classes
CLASS_SHARE = 0.5  # of the cross entropy of classes in the loss


@dataclass(frozen=True, slots=True)
class Instances:
    """The `instances` task; maps have ``stride`` 2. Logits float[n, channels, h, w]: foreground, depth, dx, dy (offsets
    in units of `UNIT` target px), then one per class where there are several.

    Objects whose likeliest class has a probability below ``sure`` are of the class ``other`` (-1: there is none).
    ``weights`` of classes: see `pixel_classes_loss`.
    """

    info: TaskInfo
    rules: Rules = DEFAULT
    scope: Scope = "pixel"
    stride: int = 2
    channels: int = SHAPES
    other: int = -1
    sure: float = 0.5
    weights: tuple[float, ...] | None = None
    halo: int = 2 * HALO

    heads: ClassVar[Mapping[Scope, str]] = {"pixel": "map"}
    head = head_of_scope
    table = has_no_table

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        count = len(info.classes)
        check_names(params, parameter_names("instances", info.classes))
        most = {"foreground": 256, "core": 256, "hops": 256, "votes": 1 << 30, "area": 1 << 30}
        values = {
            name: int(number_within(info, params, name, getattr(DEFAULT, name), (0, end))) for name, end in most.items()
        }
        return cls(
            info,
            Rules(**values),
            channels=SHAPES + (count if count > 1 else 0),
            other=int(number_within(info, params, "other", -1, (-1, count - 1))),
            sure=number_within(info, params, "sure", 0.5, (0.0, 1.0)),
            weights=class_weights(info, params),
        )

    @property
    def classed(self) -> bool:
        """True when objects are of several classes."""
        return self.channels > SHAPES

    def target(self, value: AnyTarget) -> Tensor:
        """int32[h, w] labels -> float32[5, h / 2, w / 2]: soft foreground, depth, dx, dy (target px), weight of offsets
        (8 / radius of the object: what counts is the error relative to its size).

        Negative labels mean unknown: there, and where an object borders on them (how far it goes on is unknown, too),
        the foreground is NaN, and `loss` leaves these px out. Of a task with several classes int32[2, h, w], labels
        and classes (-1: unknown) -> float32[6, h / 2, w / 2], the class (the lower right px of each 2 x 2) last.
        """
        import torch

        labels, classes = split_target(np.asarray(value, np.int32))
        shapes = make_target(labels)
        if self.classed:
            shapes = np.concatenate([shapes, np.maximum(classes[None, 1::2, 1::2], -1).astype(np.float32)])
        return torch.from_numpy(shapes)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy and Dice of the foreground, depth, and smooth L1 of the offsets inside objects; with several
        classes also `CLASS_SHARE` of the cross entropy of the class, where it is known."""
        from wsi_mmm.tasks.losses_dense import instances_loss, pixel_classes_loss

        shapes = instances_loss(logits[:, :SHAPES], target[:, :5], unit=UNIT)
        if not self.classed:
            return shapes
        return shapes + CLASS_SHARE * pixel_classes_loss(logits[:, SHAPES:], target[:, 5].long(), weights=self.weights)

    def quantise(self, logits: Tensor) -> Tensor:
        """Probabilities as 0..255; offsets in 1 / `STEPS` map px round 128."""
        import torch

        chance = torch.sigmoid(logits[:, :2].float()) * 255.0
        offset = logits[:, 2:SHAPES].float() * (UNIT / self.stride * STEPS) + ZERO
        parts = [chance, offset]
        if self.classed:
            parts.append(logits[:, SHAPES:].float().softmax(1) * 255.0)
        return torch.cat(parts, dim=1).round().clamp(0.0, 255.0).byte()

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """F1 and the like at IoU 0.5, over all objects of all pictures; found ones in unknown areas do not count.

        With several classes also what `ClassMatches.quality` gives; pictures with points and no outlines count for
        that alone.
        """
        count = len(self.info.classes)
        shapes, classes = metrics.Matches(), no_matches(count)
        for value, maps in pairs:
            labels, wanted = split_target(np.asarray(value, np.int32))
            found = self.labels(maps)
            if not self.classed or (labels > 0).any() or not (wanted >= 0).any():
                shapes += metrics.match(*known_labels(labels, found))
            if self.classed:
                found_classes, _ = self._classes_of(found, maps, int(found.max()))
                classes += match_classes(labels, wanted, found, found_classes, count)
        return shapes.quality() | (classes.quality() if self.classed else {})

    def labels(self, maps: U8) -> I32:
        """uint8[channels, h, w] of one whole picture -> labels int32[2h, 2w]."""
        height, width = maps.shape[1:]
        return group_pixels(maps, MapWindow(0, 0, height, width), self.rules)[0]

    def interpret(self, window: U8, view: View) -> Objects:
        """Objects whose centre px lies in the core, cut at the slide's edge, with their mean ``probability``; with
        several classes, also that of their class (``class_probability``)."""
        check_view(window, view, self.stride)
        rows, columns = -(-view.height // self.stride), -(-view.width // self.stride)
        position = MapWindow(view.y0 // self.stride, view.x0 // self.stride, rows, columns)
        labels, centres = group_pixels(window, position, self.rules)
        labels[max(0, view.height - view.y0) :] = 0
        labels[:, max(0, view.width - view.x0) :] = 0
        anchors = centres * self.stride
        y0, x0, y1, x1 = view.core
        owned = (anchors[:, 0] >= y0) & (anchors[:, 0] < y1) & (anchors[:, 1] >= x0) & (anchors[:, 1] < x1)
        labels = np.append(False, owned)[labels] * labels
        rings = trace(labels)
        number = rings.labels.astype(np.int64) - 1
        measurements = {"probability": _mean_probabilities(labels, double(window[0]), rings.labels)}
        class_index = np.zeros(len(number), np.int32)
        if self.classed:
            classes, chances = self._classes_of(labels, window, len(centres))
            class_index, measurements["class_probability"] = classes[number], chances[number]
        return to_objects(
            rings,
            Frame(view.x0, view.y0, 1.0, view.scale_x, view.scale_y),
            task=self.info.name,
            class_index=class_index,
            anchor=anchors[number],
            measurements=measurements,
        )

    def _classes_of(self, labels: I32, maps: U8, count: int) -> tuple[I32, F64]:
        """Class int32[count] of the objects 1..count of ``labels`` int32[2h, 2w], and its mean probability over their
        px: sums of bytes, so that any window gives the same."""
        row, column = np.nonzero(labels)
        number, at = labels[row, column] - 1, (row >> 1) * maps.shape[2] + (column >> 1)
        sums = np.stack(
            [np.bincount(number, weights=one.ravel()[at], minlength=count) for one in maps[SHAPES:]]
        )  # exact in float64
        likeliest = sums.argmax(axis=0).astype(np.int32)
        chance: F64 = sums.max(axis=0) / (np.maximum(np.bincount(number, minlength=count), 1) * 255.0)
        if self.other >= 0:
            likeliest[chance < self.sure] = self.other
        return likeliest, chance


def _mean_probabilities(labels: I32, doubled: npt.NDArray[np.uint16], which: I32) -> F64:
    """Mean foreground probability of each label in ``which``: sums of integers, divided once."""
    drawn = labels > 0
    number, size = labels[drawn], int(which.max()) + 1 if len(which) else 1
    sums = np.bincount(number, weights=doubled[drawn], minlength=size)
    counts = np.bincount(number, minlength=size)
    means: F64 = sums[which] / (counts[which] * (16.0 * 255.0))
    return means


# ---------------------------------------------------------------- from votes to objects
#
# Integers only. Every step looks no further than a fixed number of map px, so any two windows that both hold that much
# context round a pixel agree on it to the bit. Map px are addressed relative to the window; ties are broken by absolute
# position.


@dataclass(frozen=True, slots=True)
class MapWindow:
    """Absolute map px of the window's first px, and size of the slide in map px (rounded up)."""

    row: int
    column: int
    rows: int
    columns: int


def cast_votes(maps: U8, mask: Mask, window: MapWindow, hops: int) -> tuple[npt.NDArray[np.intp], Mask]:
    """The centre that each px of ``mask`` votes for: flat window index int[k], and which of them lie in the window.

    A vote follows the offsets ``hops`` times, asking again where it lands on an object, but never strays more than
    `SPAN` px from where it began: offsets of long and large objects fall short, and repeating makes up for that.
    Votes beyond the slide are moved to its nearest px (an object cut by the slide's edge keeps its centre inside).
    """
    ys, xs = np.nonzero(mask)
    dy, dx = (maps[c].astype(np.int32) - ZERO for c in (3, 2))
    low_y, high_y = -window.row * STEPS, (window.rows - 1 - window.row) * STEPS
    low_x, high_x = -window.column * STEPS, (window.columns - 1 - window.column) * STEPS
    y, x = ys * STEPS, xs * STEPS
    first_y, first_x = y, x
    row, column, seen = ys, xs, np.ones(len(ys), np.bool_)
    for _ in range(hops):
        on = seen & mask[row, column]
        y = np.clip(np.where(on, y + dy[row, column], y), first_y - SPAN * STEPS, first_y + SPAN * STEPS)
        x = np.clip(np.where(on, x + dx[row, column], x), first_x - SPAN * STEPS, first_x + SPAN * STEPS)
        y, x = np.clip(y, low_y, high_y), np.clip(x, low_x, high_x)
        row, column = (y + STEPS // 2) // STEPS, (x + STEPS // 2) // STEPS
        seen &= (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
        row, column = np.where(seen, row, 0), np.where(seen, column, 0)
    return row * mask.shape[1] + column, seen


def smooth(votes: I32) -> I32:
    """`SMOOTH` binomial (1, 2, 1) x (1, 2, 1) passes without dividing: one vote weighs 16 ** SMOOTH in all."""
    s = np.pad(votes, SMOOTH)
    for _ in range(SMOOTH):
        s = s[:-2] + 2 * s[1:-1] + s[2:]
        s = s[:, :-2] + 2 * s[:, 1:-1] + s[:, 2:]
        s = np.pad(s, 1)
    inner: I32 = s[SMOOTH:-SMOOTH, SMOOTH:-SMOOTH]
    return inner


def find_centres(score: I32, threshold: int, window: MapWindow) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows and columns of px of at least ``threshold`` that beat every other px of their neighbourhood.

    Among equal scores the px with the smaller absolute (row mod 16, column mod 16) wins.
    """
    height, width = score.shape
    rows = 15 - ((np.arange(height) + window.row) & 15)
    columns = 15 - ((np.arange(width) + window.column) & 15)
    key = score.astype(np.int64) * 256 + (rows[:, None] * 16 + columns[None, :])
    best = ndimage.maximum_filter(key, size=2 * PEAK + 1, mode="constant", cval=0)
    y, x = np.nonzero((key == best) & (score >= threshold))
    return y, x


_SIDE = range(-REACH, REACH + 1)
_DISC = sorted(((y * y + x * x, y, x) for y in _SIDE for x in _SIDE if y * y + x * x <= REACH * REACH), reverse=True)
"""(Squared length, dy, dx) of all steps within `REACH` px, farthest first; equal distances in a fixed order."""


def nearest_centre(rows: I64, columns: I64, shape: tuple[int, int]) -> I32:
    """int32[shape]: 1 + number of the nearest centre within `REACH` px, 0 where there is none.

    Centres write themselves onto a disc from its rim inwards, so that the nearest writes last.
    """
    out = np.zeros((shape[0] + 2 * REACH, shape[1] + 2 * REACH), np.int32)
    number = np.arange(1, len(rows) + 1, dtype=np.int32)
    y, x = rows + REACH, columns + REACH
    for _, dy, dx in _DISC:
        out[y + dy, x + dx] = number
    return out[REACH:-REACH, REACH:-REACH]


def double(values: U8) -> npt.NDArray[np.uint16]:
    """Bilinear doubling in integers: uint8[h, w] -> uint16[2h, 2w], 16 times the value."""
    v = np.pad(values, 1, mode="edge").astype(np.uint16)
    rows = np.empty((2 * values.shape[0], v.shape[1]), np.uint16)
    rows[0::2] = 3 * v[1:-1] + v[:-2]
    rows[1::2] = 3 * v[1:-1] + v[2:]
    out = np.empty((rows.shape[0], 2 * values.shape[1]), np.uint16)
    out[:, 0::2] = 3 * rows[:, 1:-1] + rows[:, :-2]
    out[:, 1::2] = 3 * rows[:, 1:-1] + rows[:, 2:]
    return out


def double_labels(labels: I32, inside: Mask) -> I32:
    """Labels on target px: that of the own map px, else of the map px beside, above/below, diagonal (in this order).

    ``inside`` bool[2h, 2w]: the px that get a label at all.
    """
    v = np.pad(labels, 1)
    out = np.zeros(inside.shape, np.int32)
    here = v[1:-1, 1:-1]
    for a in (0, 1):
        for b in (0, 1):
            up, side = slice(2 * a, 2 * a - 2 or None), slice(2 * b, 2 * b - 2 or None)
            near = np.where(v[up, 1:-1] > 0, v[up, 1:-1], v[up, side])
            near = np.where(v[1:-1, side] > 0, v[1:-1, side], near)
            out[a::2, b::2] = np.where(here > 0, here, near)
    out[~inside] = 0
    return out


def largest_parts(labels: I32, least: int) -> I32:
    """Keep of each label its largest 4-connected part (the first of equals) if it has ``least`` px; else nothing."""
    parts: I32 = connected(labels, background=0, connectivity=1)  # type: ignore[no-untyped-call]
    count = int(parts.max()) + 1
    flat = parts.ravel()
    area = np.bincount(flat, minlength=count)
    owner = np.zeros(count, np.int64)
    owner[flat] = labels.ravel()
    number = np.arange(1, count)
    ranking = number[np.lexsort((number, -area[1:], owner[1:]))]
    first = np.ones(len(ranking), np.bool_)
    first[1:] = owner[ranking][1:] != owner[ranking][:-1]
    chosen = ranking[first & (area[ranking] >= least)]
    table = np.zeros(count, np.int32)
    table[chosen] = owner[chosen]
    kept: I32 = table[parts]
    return kept


def group_pixels(maps: U8, window: MapWindow, rules: Rules) -> tuple[I32, I64]:
    """Objects of a window of maps uint8[4 or more, h, w] (foreground, depth, dx, dy).

    Returns labels int32[2h, 2w] on target px (0: none; label k belongs to centre k - 1, small objects are left out) and
    the centres int64[k, 2] (row, column) in absolute map px. What is said of a centre, and of its object, depends on
    maps within `HALO` map px of it: rival centres lie within 2 `REACH`; each is a peak of votes that land within
    `PEAK` + `SMOOTH` of it; they come from `SPAN` away at most, along ways that keep within `SPAN` of their beginning.
    """
    mask = maps[0] >= rules.foreground
    mask[max(0, window.rows - window.row) :] = False
    mask[:, max(0, window.columns - window.column) :] = False
    votes, seen = cast_votes(maps, mask, window, rules.hops)
    weights = np.maximum(maps[1][mask][seen].astype(np.int32) - rules.core, 0) >> 2  # at most 63: sums stay far below
    counts = np.bincount(votes[seen], weights=weights, minlength=mask.size)  # 2**31 (and are exact in float64)
    score = smooth(counts.reshape(mask.shape).astype(np.int32))
    rows, columns = find_centres(score, rules.votes, window)
    near = nearest_centre(rows, columns, mask.shape)
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.where(seen, near.ravel()[votes], 0)
    inside = double(maps[0]) >= 16 * rules.foreground
    fine = largest_parts(double_labels(labels, inside), rules.area)
    return fine, np.stack([rows + window.row, columns + window.column], axis=1).astype(np.int64)
