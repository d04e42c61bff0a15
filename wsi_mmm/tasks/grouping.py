"""From centre votes to objects: the integer core of the `instances` task (numpy and scipy only).

Every step looks no further than a fixed number of map px, so any two windows that both hold that much context round a
pixel agree on it to the bit. Map px are addressed relative to the window; ties are broken by absolute position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import label as connected

from wsi_mmm.types import I32, I64, U8, Mask

ZERO = 128  # the byte that says "offset 0"
STEPS = 16  # offset bytes per map px
SPAN = 24  # map px that a vote strays at most
REACH = 8  # map px between a vote and the centre that may still win it
PEAK = 3  # a centre is the best of its (2 * PEAK + 1)^2 neighbourhood
SMOOTH = 2  # binomial smoothings of the votes, one px of reach each
HALO = 2 * REACH + PEAK + SMOOTH + 2 * SPAN + 1  # map px; see `group`


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


@dataclass(frozen=True, slots=True)
class MapWindow:
    """Absolute map px of the window's first px, and size of the slide in map px (rounded up) and in target px."""

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


def _disc_offsets() -> list[tuple[int, int]]:
    """All (dy, dx) of a disc of `REACH` px, farthest first; equal distances in a fixed order."""
    reach = range(-REACH, REACH + 1)
    ranked = sorted(
        ((y * y + x * x, y, x) for y in reach for x in reach if y * y + x * x <= REACH * REACH), reverse=True
    )
    return [(y, x) for _, y, x in ranked]


_DISC = _disc_offsets()


def nearest_centre(rows: I64, columns: I64, shape: tuple[int, int]) -> I32:
    """int32[shape]: 1 + number of the nearest centre within `REACH` px, 0 where there is none.

    Centres write themselves onto a disc from its rim inwards, so that the nearest writes last.
    """
    out = np.zeros((shape[0] + 2 * REACH, shape[1] + 2 * REACH), np.int32)
    number = np.arange(1, len(rows) + 1, dtype=np.int32)
    y, x = rows + REACH, columns + REACH
    for dy, dx in _DISC:
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


def score_map(maps: U8, mask: Mask, window: MapWindow, rules: Rules) -> tuple[I32, npt.NDArray[np.intp], Mask]:
    """Smoothed votes int32[h, w], each weighing by the depth of the px it comes from, and where every px votes for."""
    votes, seen = cast_votes(maps, mask, window, rules.hops)
    weights = np.maximum(maps[1][mask][seen].astype(np.int32) - rules.core, 0) >> 2  # at most 63: sums stay far below
    counts = np.bincount(votes[seen], weights=weights, minlength=mask.size)  # 2**31 (and are exact in float64)
    return smooth(counts.reshape(mask.shape).astype(np.int32)), votes, seen


def group(maps: U8, window: MapWindow, rules: Rules) -> tuple[I32, I64]:
    """Objects of a window of maps uint8[4, h, w] (foreground, depth, dx, dy).

    Returns labels int32[2h, 2w] on target px (0: none; label k belongs to centre k - 1, small objects are left out) and
    the centres int64[k, 2] (row, column) in absolute map px. What is said of a centre, and of its object, depends on
    maps within `HALO` map px of it: rival centres lie within 2 `REACH`; each is a peak of votes that land within
    `PEAK` + `SMOOTH` of it; they come from `SPAN` away at most, along ways that keep within `SPAN` of their beginning.
    """
    mask = maps[0] >= rules.foreground
    mask[max(0, window.rows - window.row) :] = False
    mask[:, max(0, window.columns - window.column) :] = False
    score, votes, seen = score_map(maps, mask, window, rules)
    rows, columns = find_centres(score, rules.votes, window)
    near = nearest_centre(rows, columns, mask.shape)
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.where(seen, near.ravel()[votes], 0)
    inside = double(maps[0]) >= 16 * rules.foreground
    fine = largest_parts(double_labels(labels, inside), rules.area)
    return fine, np.stack([rows + window.row, columns + window.column], axis=1).astype(np.int64)
