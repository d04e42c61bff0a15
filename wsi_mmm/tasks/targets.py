"""Targets as data sets hold them, by kind of task: a task's ``target`` makes tensors of them. No torch here.

=================  ==================================================================  =======================
kind               target of one image (or of one bag)                                 unknown
=================  ==================================================================  =======================
classify           int class index                                                     negative
multilabel         float32[K], 0 or 1 (or a probability)                               NaN
regress            float32[K]                                                          NaN
survive            `Survival`                                                          time NaN
segment            int32[h, w] class index                                             negative
multisegment       int8[K, h, w], 1 or 0                                               -1
instances          int32[h, w], 0 background, every object a number of its own; with   negative
                   several classes int32[2, h, w], numbers and class indices, where
                   numbers below -1 are areas of points, one each
detect             `Boxes`                                                             boxes labelled -1
reconstruct        None: the image itself                                              -
=================  ==================================================================  =======================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from wsi_mmm.types import F32, I32


@dataclass(frozen=True, slots=True)
class Survival:
    """``time`` to the event or to the last visit (any unit, one per data set; NaN: unknown); ``event``: it happened."""

    time: float
    event: bool


@dataclass(frozen=True, slots=True)
class Boxes:
    """Objects of a picture of ``height`` x ``width`` px: ``xyxy`` float32[n, 4] px (x0, y0, x1, y1; px edges are
    integers), ``labels`` int32[n] class indices; -1 marks an area in which nothing is known (not learnt from)."""

    xyxy: F32
    labels: I32
    height: int
    width: int


Target: TypeAlias = int | float | npt.NDArray[np.generic] | Survival | Boxes | None
