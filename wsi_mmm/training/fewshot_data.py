"""Labelled vectors for few-shot heads: tiles by annotated regions, slides by a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.annotations import parse_shapes, shape_at
from wsi_mmm.errors import InputError, ManifestError
from wsi_mmm.outputs.exports import SlideFeatures, read_features
from wsi_mmm.storage import store
from wsi_mmm.training.fewshot import Labelled
from wsi_mmm.types import F64

REGION = 2048
"""Level-0 px: tiles of one square of this side are learnt from or judged together, so that a neighbour that shows the
same gland does not count as unseen."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A slide's features: its id and where they lie."""

    id: str
    uri: str

    def read(self) -> SlideFeatures:
        """The features. StorageError when they cannot be read."""
        return read_features(self.uri)


def embedded(source: str) -> list[Embedded]:
    """Every ``<slide>/features.zarr`` at or below ``source``, sorted. InputError when there is none."""
    mark = "/features.zarr/zarr.json"
    found = sorted(uri for uri in store.list_uris(source) if uri.endswith(mark))
    if not found:
        raise InputError(f"no features.zarr below {store.redact(source)}; wsi-mmm embed makes them")
    return [Embedded(uri.removesuffix(mark).rpartition("/")[2], uri.removesuffix("/zarr.json")) for uri in found]


def check_alike(features: Sequence[SlideFeatures], ids: Sequence[str]) -> Mapping[str, object]:
    """Check and return the settings that all were made with (encoder, model_hash, mpp, patch_size). InputError naming
    two that differ."""
    names = ("encoder", "model_hash", "mpp", "patch_size")
    first = {name: features[0].attributes.get(name) for name in names}
    for found, slide in zip(features, ids, strict=True):
        for name in names:
            if found.attributes.get(name) != first[name]:
                raise InputError(
                    f"{slide} was embedded with {name} {found.attributes.get(name)}, {ids[0]} with {first[name]}: "
                    "embed them alike"
                )
    return first


def tiles_by_regions(
    source: str, annotations: str, *, classes: Sequence[str] | None = None
) -> tuple[Labelled, dict[str, object]]:
    """Tiles whose centre lies in an annotated region, and what they were embedded with.

    ``annotations``: a folder with ``<slide>.geojson`` (``.json``, ``.xml``, zipped too) per embedded slide.
    ``classes``: those to learn, in order (None: all, sorted). Groups are slides when each class has two or more, else
    regions of slides; ``judged_on`` of the second says which.
    """
    slides = [(slide, uri) for slide in embedded(source) if (uri := _sibling_store(annotations, slide.id))]
    if not slides:
        raise InputError(f"{annotations} holds no <slide>.geojson for any slide below {store.redact(source)}")
    read = [slide.read() for slide, _ in slides]
    facts = dict(check_alike(read, [slide.id for slide, _ in slides]))
    named: list[list[str | None]] = []
    for (_, uri), features in zip(slides, read, strict=True):
        shapes = parse_shapes(store.read_bytes(uri), store.redact(uri))
        middle: F64 = features.coords + np.float64(features.attributes.get("patch_size_level0", 0)) / 2.0
        named.append([shapes.items[n].class_name if n >= 0 else None for n in shape_at(shapes, middle)])
    chosen = list(classes or sorted({name for names in named for name in names if name is not None}))
    labels = np.array([chosen.index(n) if n in chosen else -1 for names in named for n in names], np.int32)
    vectors = np.concatenate([features.vectors for features in read])
    slide_of = [slide.id for (slide, _), names in zip(slides, named, strict=True) for _ in names]
    whole = Labelled(vectors, labels, slide_of, tuple(chosen)).part(labels >= 0)
    if min(len({g for g, n in zip(whole.groups, whole.labels, strict=True) if n == c}) for c in range(len(chosen))) > 1:
        return whole, {**facts, "judged_on": "slides not learnt from"}
    corners = np.concatenate([features.coords for features in read]) // REGION
    regions = [f"{slide} {x} {y}" for slide, (x, y) in zip(slide_of, corners.tolist(), strict=True)]
    whole = Labelled(vectors, labels, regions, tuple(chosen)).part(labels >= 0)
    return whole, {**facts, "judged_on": "other regions of the same slides"}


def slides_by_table(
    source: str, table: str, *, column: str = "label", classes: Sequence[str] | None = None
) -> tuple[Labelled, dict[str, object]]:
    """Mean vectors of slides labelled by a CSV with the columns ``slide``, ``column`` and, if wanted, ``patient``.

    Slides without a row, and rows with an empty label, are left out; a row whose slide was not embedded is an error.
    """
    rows = _labelled_rows(table, column)
    present = {slide.id: slide for slide in embedded(source)}
    chosen = list(classes or sorted({label for _, label, _ in rows}))
    for number, (slide, label, _) in enumerate(rows):
        if slide not in present:
            raise ManifestError(f"{table}, row {number + 2}: no slide '{slide}' below {store.redact(source)}")
        if label not in chosen:
            raise ManifestError(f"{table}, row {number + 2}: unknown label '{label}'; known: {', '.join(chosen)}")
    read = [present[slide].read() for slide, _, _ in rows]
    facts = dict(check_alike(read, [slide for slide, _, _ in rows]))
    for features, (slide, _, _) in zip(read, rows, strict=True):
        if not len(features.vectors):
            raise InputError(f"slide {slide} has no tile; take it out of {table}")
    vectors = np.stack([features.vectors.mean(axis=0, dtype=np.float64) for features in read]).astype(np.float32)
    labels = np.array([chosen.index(label) for _, label, _ in rows], np.int32)
    groups = [group for _, _, group in rows]
    return Labelled(vectors, labels, groups, tuple(chosen)), {**facts, "judged_on": "patients not learnt from"}


def _labelled_rows(table: str, column: str) -> list[tuple[str, str, str]]:
    """(slide, label, group) of the rows that have a label."""
    reader = csv.DictReader(io.StringIO(store.read_bytes(table).decode("utf-8-sig")))
    for name in ("slide", column):
        if name not in (reader.fieldnames or ()):
            raise ManifestError(f"{table} has no column '{name}'; it has: {', '.join(reader.fieldnames or ())}")
    rows = [(row["slide"], row[column], row.get("patient") or row["slide"]) for row in reader if row[column]]
    if not rows:
        raise ManifestError(f"{table} has no row with a '{column}'")
    return rows


def _sibling_store(folder: str, slide: str) -> str | None:
    for ending in (".geojson", ".geojson.gz", ".json", ".xml", ".zip"):
        uri = store.join(folder, slide + ending)
        if store.exists(uri):
            return uri
    return None
