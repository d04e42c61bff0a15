"""Targets of a task from the annotations of slides: which classes, what is known, and the target of tiles by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.errors import ConfigError
from wsi_mmm.tasks.targets import Target
from wsi_mmm.training.data import regions
from wsi_mmm.training.data.buckets import Buckets
from wsi_mmm.training.data.raster import PixelGrids, ShapeIndex, encode
from wsi_mmm.training.data.regions import UNKNOWN, SlideAnnotations
from wsi_mmm.types import I32, I64, Mask

TILE_LEVEL_KINDS = ("classify", "multilabel", "regress")
MAP_KINDS = ("segment", "multisegment", "instances", "detect")
_PX = 1 << 20  # drawn together


@dataclass(frozen=True, slots=True)
class AnnotationTarget:
    """``buckets``: its table of class names. ``background``: the label of what is looked at and not annotated (classify
    and segment; None: that is unknown). ``complete``: slides without use-regions were annotated everywhere.

    ``min_share``: of a tile, that a label must cover (tile kinds), that must be known (segment, multisegment) or
    looked at (instances, detect). ``min_visible``: of a box, below which it is not learnt from. ``values``: names of
    the numbers of objects that `regress` learns. Raises ConfigError.
    """

    task: str
    kind: str
    buckets: Buckets
    background: str | None = None
    complete: bool = False
    min_share: float = 0.5
    min_visible: float = 0.3
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"task '{self.task}'"
        if self.kind not in TILE_LEVEL_KINDS + MAP_KINDS:
            known = ", ".join(TILE_LEVEL_KINDS + MAP_KINDS)
            raise ConfigError(f"{where} of kind {self.kind!r} learns from no annotations: give {known}")
        if self.background is not None and self.background not in self.buckets.labels:
            raise ConfigError(f"{where}: background {self.background!r} is no label: {', '.join(self.buckets.labels)}")
        if (self.kind == "regress") != bool(self.values):
            raise ConfigError(f"{where}: name the numbers to learn in values, for kind regress and no other")
        if not (0 < self.min_share <= 1 and 0 <= self.min_visible <= 1):
            raise ConfigError(f"{where}: min_share {self.min_share}, min_visible {self.min_visible}: give shares to 1")


def annotations_for_task(
    spec: AnnotationTarget, index: ShapeIndex, *, scale: tuple[float, float], size: tuple[int, int]
) -> SlideAnnotations:
    """The shapes of a slide of ``size`` (width, height) level-0 px as the task sees them, at ``scale`` level-0 px per
    target px (x, y)."""
    labels = spec.buckets.labels
    background = labels.index(spec.background) if spec.background is not None else UNKNOWN
    (width, height), (x, y) = size, scale
    return SlideAnnotations(
        index, encode(index, spec.buckets), x, y, width / x, height / y, len(labels), background, spec.complete
    )


def tile_targets(spec: AnnotationTarget, annotated: SlideAnnotations, xy: I64, tile: int) -> list[Target]:
    """Of a kind with one target per tile: that of each tile of ``tile`` target px."""
    share = spec.min_share
    if spec.kind == "classify":
        return list(regions.tile_labels(annotated, xy, tile, share).tolist())
    if spec.kind == "multilabel":
        return list(regions.tile_multilabels(annotated, xy, tile, share))
    sheet_values = [list(annotated.index.values).index(name) for name in spec.values]
    return list(np.ascontiguousarray(regions.tile_values(annotated, xy, tile, share)[:, sheet_values]))


def map_targets(spec: AnnotationTarget, annotated: SlideAnnotations, xy: I64, size: int) -> Sequence[Target]:
    """Of a map kind: the target of each square of ``size`` px at target px ``xy``, in its own px."""
    some = max(1, _PX // size**2)  # few enough at a time to stay in the processor's cache: five times faster
    parts = (annotated.grids(xy[start : start + some], size) for start in range(0, len(xy), some))
    return [target for grids in parts for target in _map_targets(spec, annotated, grids)]


def _map_targets(spec: AnnotationTarget, annotated: SlideAnnotations, grids: PixelGrids) -> Sequence[Target]:
    if spec.kind == "segment":
        return list(regions.class_maps(annotated, grids))
    if spec.kind == "multisegment":
        return list(regions.label_maps(annotated, grids))
    if spec.kind == "instances":
        return list(regions.object_maps(annotated, grids))
    return regions.object_boxes(annotated, grids, spec.min_visible)


def choose(spec: AnnotationTarget, annotated: SlideAnnotations, xy: I64, tile: int) -> tuple[Mask, I32]:
    """Return which tiles have a target, bool[n], and the class int32[n] that balancing goes by (-1: none)."""
    if spec.kind in TILE_LEVEL_KINDS:
        return _choose_patches(spec, tile_targets(spec, annotated, xy, tile))
    if spec.kind in ("instances", "detect"):
        keep = regions.covering(annotated, xy, tile, spec.min_share)
        return keep, regions.common_objects(annotated, xy, tile)
    share = regions.label_share if spec.kind == "multisegment" else regions.known_share
    return np.asarray(share(annotated, xy, tile) >= spec.min_share, bool), regions.common_labels(annotated, xy, tile)


def _choose_patches(spec: AnnotationTarget, targets: list[Target]) -> tuple[Mask, I32]:
    if spec.kind == "classify":
        labels = np.array(targets, np.int32)
        return labels >= 0, labels
    table = np.array(targets, np.float32).reshape(len(targets), -1)
    known: Mask = np.asarray(np.isfinite(table).any(axis=1), bool)
    if spec.kind == "regress":
        return known, np.full(len(table), UNKNOWN, np.int32)
    there = table == 1
    return known, np.where(there.any(axis=1), there.argmax(axis=1), UNKNOWN).astype(np.int32)
