"""Points with classes, as cells are often annotated: a table or annotation file per picture, and what they teach.

Of a cell that is a point the class is known round it, and its outline is not. So a task `instances` with several
classes learns the class within ``inner`` px of a point, nothing of outlines within ``outer`` px, and, where all cells
were marked, that there is none farther away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from scipy import ndimage

from wsi_mmm.annotations import parse_shapes, read_annotation_file
from wsi_mmm.errors import InputError
from wsi_mmm.storage import store
from wsi_mmm.tasks.instance_targets import FIRST_POINT
from wsi_mmm.tasks.targets import Boxes, Target
from wsi_mmm.training.data.base import ItemIndex
from wsi_mmm.training.data.images import ImageItems, Origin, below, pictures_below, read_image
from wsi_mmm.training.data.tables import read_table
from wsi_mmm.types import F64, I32

TABLES = (".csv", ".tsv", ".parquet")
ENDINGS = (*TABLES, ".geojson", ".json", ".xml", ".annotations")
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class PointMeaning:
    """Meaning of points for a task of ``kind`` with ``labels`` classes. ``inner``: px of a picture within which the
    class is a point's; ``outer``: within which its outline may be. ``complete``: every cell was marked. ``background``:
    the class of all else, for `segment` (-1: unknown)."""

    kind: str
    labels: int
    inner: float
    outer: float
    complete: bool = True
    background: int = UNKNOWN


@dataclass(frozen=True, slots=True)
class Points:
    """``xy`` float64[n, 2] (px edges are integers) and ``classes`` int32[n] (-1: unknown)."""

    xy: F64
    classes: I32


def image_points(
    origin: Origin,
    images: str,
    points: str,
    *,
    task: str,
    meaning: PointMeaning,
    columns: tuple[str, str, str],
    numbers: Mapping[str, int],
) -> ImageItems:
    """Pictures below ``images`` and the points of each, in a file of the same relative path and stem below ``points``:
    a table with ``columns`` (x, y, class), or an annotation file. ``numbers``: name of a class -> class index, -1: a
    cell of unknown class.

    InputError names a picture without points' file, a class that is none, and a point off its picture (when it is
    read).
    """
    files = {str(PurePosixPath(below(points, uri)).with_suffix("")): uri for uri in _point_files(points)}
    uris, found = pictures_below(images), []
    keys = [below(images, uri) for uri in uris]
    for key in keys:
        stem = str(PurePosixPath(key).with_suffix(""))
        if stem not in files:
            raise InputError(
                f"data '{origin.name}': no points {stem}.csv (or .tsv, .parquet, .geojson) below {store.redact(points)}"
            )
        found.append(_read_points(files[stem], columns, numbers, origin.name))
    labels = np.array([_most_common(one.classes) for one in found], np.int32)

    def targets(n: int, shape: tuple[int, int]) -> Mapping[str, Target]:
        try:
            return {task: point_target(found[n], shape, meaning)}
        except InputError as error:
            raise InputError(f"{store.redact(uris[n])}: {error}") from error

    index = ItemIndex(keys, origin.groups(keys), labels)
    return ImageItems(origin.name, (task,), index, lambda n: read_image(uris[n]), targets, origin.factor)


def point_target(points: Points, shape: tuple[int, int], meaning: PointMeaning) -> Target:
    """The target of a picture of ``shape`` (h, w). InputError for a point off it."""
    height, width = shape
    off = np.flatnonzero(((points.xy < 0) | (points.xy > (width, height))).any(axis=1))
    if len(off):
        x, y = points.xy[off[0]].tolist()
        raise InputError(f"the point ({x:g}, {y:g}) lies off the picture of {width} x {height} px: give px of it")
    if meaning.kind == "detect":
        return _point_boxes(points, shape, meaning)
    labels = np.full(shape, 0 if meaning.complete else UNKNOWN, np.int32)
    classes = np.full(shape, UNKNOWN, np.int32)
    if meaning.kind == "segment":
        mark_points(labels, classes, points, meaning.inner, meaning.inner)
        rest = np.int32(meaning.background if meaning.complete else UNKNOWN)
        return np.where(labels <= FIRST_POINT, classes, rest)
    if meaning.labels == 1:
        mark_points(labels, classes, points, meaning.inner, meaning.inner)
        return np.where(labels <= FIRST_POINT, FIRST_POINT + 1 - labels, labels)
    mark_points(labels, classes, points, meaning.inner, meaning.outer)
    return np.stack([labels, classes])


def mark_points(labels: I32, classes: I32, points: Points, inner: float, outer: float) -> None:
    """Write points into ``labels`` and ``classes`` int32[h, w] (see `wsi_mmm.tasks.targets`, `instances`).

    A px belongs to the nearest point within ``outer`` px: its label is `FIRST_POINT` less the number of the point,
    its class the point's within ``inner`` px. A point in an outlined object (label above 0) gives that object its
    class instead.
    """
    if not len(points.xy):
        return
    height, width = labels.shape
    column, row = np.minimum(points.xy.astype(np.int64), (width - 1, height - 1)).T
    held = labels[row, column] > 0
    if held.any():
        table = np.full(int(labels.max()) + 1, -2, np.int32)
        table[labels[row, column][held]] = points.classes[held]
        said = np.where(labels > 0, table[np.maximum(labels, 0)], -2)
        np.copyto(classes, said, where=said > -2)
    if held.all():
        return
    seeds = np.zeros(labels.shape, np.int32)
    number = np.flatnonzero(~held)
    seeds[row[number], column[number]] = number + 1
    away, (y, x) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    nearest = seeds[y, x] - 1
    free = labels <= 0
    around, middle = free & (away <= outer), free & (away <= inner)
    labels[around] = FIRST_POINT - nearest[around]
    classes[around] = UNKNOWN
    classes[middle] = points.classes[nearest[middle]]


def _point_boxes(points: Points, shape: tuple[int, int], meaning: PointMeaning) -> Boxes:
    height, width = shape
    boxes = np.concatenate([points.xy - meaning.inner, points.xy + meaning.inner], axis=1)
    boxes, labels = np.clip(boxes, 0, (width, height) * 2), points.classes
    if not meaning.complete:
        boxes = np.concatenate([boxes, [[0, 0, width, height]]])
        labels = np.append(labels, np.int32(UNKNOWN))
    return Boxes(boxes.astype(np.float32), labels.astype(np.int32), height, width)


def _point_files(root: str) -> list[str]:
    found = [uri for uri in store.list_uris(root) if uri.lower().endswith(ENDINGS)]
    return sorted(uri for uri in found if not uri.rpartition("/")[2].startswith("."))


def _read_points(uri: str, columns: tuple[str, str, str], numbers: Mapping[str, int], data: str) -> Points:
    """InputError, ManifestError or AnnotationError naming what is wrong with the file."""
    if uri.lower().endswith(TABLES):
        x, y, names = _table_points(uri, columns)
    else:
        dots = parse_shapes(read_annotation_file(uri), store.redact(uri)).dots
        x, y = [dot.x for dot in dots], [dot.y for dot in dots]
        names = [dot.class_name or "" for dot in dots]
    unknown = next((name for name in names if name not in numbers), None)
    if unknown is not None:
        known = ", ".join(name or '""' for name in numbers)
        raise InputError(
            f"data '{data}': {store.redact(uri)} has the class {unknown!r}, known are {known}: "
            'map it with values = {...}, to "" where the class is not known'
        )
    classes = np.array([numbers[name] for name in names], np.int32)
    return Points(np.array([x, y], np.float64).T.reshape(-1, 2), classes)


def _table_points(uri: str, columns: tuple[str, str, str]) -> tuple[list[float], list[float], Sequence[str]]:
    table = read_table(uri)
    cells = [table.column(name) for name in columns]
    places: list[list[float]] = [[], []]
    for row, both in enumerate(zip(*cells[:2], strict=True)):
        for place, cell in zip(places, both, strict=True):
            try:
                place.append(float(cell))
            except ValueError as error:
                raise table.wrong(row, f"{cell!r} is no coordinate: give px") from error
            if not np.isfinite(place[-1]):
                raise table.wrong(row, f"{cell!r} is no coordinate: give px")
    return places[0], places[1], cells[2]


def _most_common(classes: I32) -> int:
    known = classes[classes >= 0]
    return int(np.bincount(known).argmax()) if len(known) else UNKNOWN
