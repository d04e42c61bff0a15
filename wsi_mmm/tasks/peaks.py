"""From maps of centres and sides to boxes: the integer core of the `detect` task (numpy and scipy only).

Every step looks no further than `HALO` map px, and ties are broken by absolute position, so any two windows that both
hold that much context round a px agree on it to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from wsi_mmm.types import F64, I32, I64, U8, Mask

STRIDE = 4  # target px per map px
PEAK = 1  # a centre is the best of its (2 * PEAK + 1)^2 neighbourhood
REACH = 32  # map px between two centres, one of which may still suppress the other
HALO = REACH + PEAK + 1  # map px
LEAST = 0.5  # target px from a centre to a side that byte 0 stands for
OCTAVE = 25  # bytes per doubling of a distance: steps of 2.8 %, up to 588 target px
_CHUNK = 2000  # candidates compared at a time: bounds memory where a map is all peaks

SIDES: F64 = LEAST * 2.0 ** (np.arange(256) / OCTAVE)
"""Target px that each byte of a distance stands for."""


@dataclass(frozen=True, slots=True)
class FoundBoxes:
    """k boxes, sorted by (y, x) of their centre: ``anchor`` int64[k, 2] (y, x) target px of the middle of the centre's
    map px, ``xyxy`` float64[k, 4] target px, ``score`` and ``kind`` (class) int32[k]."""

    anchor: I64
    xyxy: F64
    score: I32
    kind: I32

    def where(self, keep: Mask | I64) -> FoundBoxes:
        """The chosen boxes."""
        return FoundBoxes(self.anchor[keep], self.xyxy[keep], self.score[keep], self.kind[keep])


def boxes_of(maps: U8, corner: tuple[int, int], *, threshold: int, overlap: float) -> FoundBoxes:
    """Boxes of a window of maps uint8[K + 4, h, w] (centres per class; left, top, right, bottom).

    ``corner``: absolute map px (row, column) of the window's first px. Centres have at least ``threshold``; of two
    boxes of any classes whose intersection over union is above ``overlap`` the one with the better centre stays, even
    if a third suppresses that: a rule that looks no further than `REACH`.
    """
    found = _find_peaks(maps, corner, threshold)
    lost = np.zeros(len(found.score), np.bool_)
    for first, second in _near_pairs(found):
        worse = np.where(_first_is_better(found, first, second), second, first)
        lost[worse[iou(found.xyxy[first], found.xyxy[second]) > overlap]] = True
    return found.where(~lost)


def _find_peaks(maps: U8, corner: tuple[int, int], threshold: int) -> FoundBoxes:
    """Px that beat their neighbours; of equals the upper, then the left one wins."""
    heat = maps[:-4]
    score = heat.max(axis=0).astype(np.int64)
    rows, columns = (np.arange(n) + c for n, c in zip(score.shape, corner, strict=True))
    key = (score << 44) - (rows[:, None] << 22) - columns[None, :]
    best = ndimage.maximum_filter(key, size=2 * PEAK + 1, mode="constant", cval=np.iinfo(np.int64).min)
    y, x = np.nonzero((key == best) & (score >= max(threshold, 1)))
    anchor = np.stack([rows[y], columns[x]], axis=1) * STRIDE + STRIDE // 2
    left, top, right, bottom = (SIDES[maps[c - 4, y, x]] for c in range(4))
    xyxy = np.stack([anchor[:, 1] - left, anchor[:, 0] - top, anchor[:, 1] + right, anchor[:, 0] + bottom], axis=1)
    return FoundBoxes(anchor, xyxy, score[y, x].astype(np.int32), np.argmax(heat[:, y, x], axis=0).astype(np.int32))


def _near_pairs(found: FoundBoxes) -> Iterator[tuple[I64, I64]]:
    """Pairs of numbers of boxes that may overlap, each pair once, in chunks of bounded size.

    A box holds its centre, so centres of overlapping boxes are no farther apart than the two's longest sides: small
    boxes are compared with close ones only.
    """
    middle = found.anchor[:, [1, 0, 1, 0]]
    octave = np.ceil(np.log2(np.maximum(np.abs(found.xyxy - middle).max(axis=1, initial=LEAST), 1.0))).astype(np.int64)
    groups = {int(k): np.flatnonzero(octave == k) for k in np.unique(octave)}
    trees = {k: cKDTree(found.anchor[members]) for k, members in groups.items()}
    for large, members in groups.items():
        for start in range(0, len(members), _CHUNK):
            some = members[start : start + _CHUNK]
            tree = cKDTree(found.anchor[some])
            for small, others in groups.items():
                if small <= large:
                    reach = min(REACH * STRIDE, 2**large + 2**small)
                    near = tree.sparse_distance_matrix(trees[small], reach, p=np.inf, output_type="ndarray")
                    first, second = some[near["i"]], others[near["j"]]
                    once = first < second if small == large else np.ones(len(first), np.bool_)
                    yield first[once], second[once]


def _first_is_better(found: FoundBoxes, first: I64, second: I64) -> Mask:
    """Whether the first of each pair has the better centre; of equals the one that comes first by (y, x)."""
    a, b = found.score[first], found.score[second]
    better: Mask = (a > b) | ((a == b) & (first < second))
    return better


def iou(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> F64:
    """Intersection over union of boxes [..., 4] (x0, y0, x1, y1), broadcast; 0 for two boxes of no area."""
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    common = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    union = area(a) + area(b) - common
    share: F64 = np.where(union > 0, common / np.where(union > 0, union, 1.0), 0.0)
    return share


def area(boxes: npt.NDArray[np.floating]) -> F64:
    """Areas of boxes [..., 4]."""
    size: F64 = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return size
