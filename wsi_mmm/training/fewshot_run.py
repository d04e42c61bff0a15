"""Few-shot heads from files to files: labelled vectors, fitting, prediction.

Vectors are what `wsi-mmm embed` wrote; tiles are labelled by annotated regions, slides by a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.annotations import parse_shapes, shape_at
from wsi_mmm.errors import InputError, ManifestError
from wsi_mmm.model.checkpoint import load_model, open_encoder
from wsi_mmm.model.choose import ChosenEncoder, choose_encoder, hash_encoder, locate_weights, unread_encoder
from wsi_mmm.model.identity import is_model, model_identity
from wsi_mmm.model.recipe import parse_recipe
from wsi_mmm.outputs.exports import SlideFeatures, read_features
from wsi_mmm.outputs.tables import tiles_table
from wsi_mmm.storage import store
from wsi_mmm.training import fewshot
from wsi_mmm.training.data.tables import read_table
from wsi_mmm.training.fewshot import KINDS, Labelled, Linear
from wsi_mmm.types import F64

MODEL = "model"
MADE_WITH = ("encoder", "model_hash", "network", "mpp", "patch_size")
"""Attributes of features that must agree where they are used together."""

REGION = 2048
"""Level-0 px: tiles of one square of this side are learnt from or judged together, so that a neighbour that shows the
same gland does not count as unseen."""


# ---------------------------------------------------------------- labelled vectors


def embedded(source: str) -> list[tuple[str, str]]:
    """Id and URI of every ``<slide>/features.zarr`` at or below ``source``, sorted. InputError when there is none."""
    mark = "/features.zarr/zarr.json"
    found = sorted(uri for uri in store.list_uris(source) if uri.endswith(mark))
    if not found:
        raise InputError(f"no features.zarr below {store.redact(source)}; wsi-mmm embed makes them")
    return [(uri.removesuffix(mark).rpartition("/")[2], uri.removesuffix("/zarr.json")) for uri in found]


def _common_attributes(features: Sequence[SlideFeatures], ids: Sequence[str]) -> dict[str, object]:
    """The attributes MADE_WITH that all ``features`` share. InputError naming two slides that differ."""
    first = {name: features[0].attributes.get(name) for name in MADE_WITH}
    for found, slide in zip(features, ids, strict=True):
        for name in MADE_WITH:
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
    slides = [(slide, uri, file) for slide, uri in embedded(source) if (file := _annotation_file(annotations, slide))]
    if not slides:
        raise InputError(f"{annotations} holds no <slide>.geojson for any slide below {store.redact(source)}")
    read = [read_features(uri) for _, uri, _ in slides]
    facts = _common_attributes(read, [slide for slide, _, _ in slides])
    named: list[str | None] = []
    for (_, _, file), features in zip(slides, read, strict=True):
        shapes = parse_shapes(store.read_bytes(file), store.redact(file))
        middle: F64 = features.coords + np.float64(features.attributes.get("patch_size_level0", 0)) / 2.0
        named += [shapes.items[n].class_name if n >= 0 else None for n in shape_at(shapes, middle)]
    chosen = list(classes or sorted({name for name in named if name is not None}))
    labels = np.array([chosen.index(name) if name in chosen else -1 for name in named], np.int32)
    vectors = np.concatenate([features.vectors for features in read])
    slide_of = [slide for (slide, _, _), features in zip(slides, read, strict=True) for _ in features.vectors]
    whole = Labelled(vectors, labels, slide_of, tuple(chosen)).part(labels >= 0)
    if min(len({g for g, n in zip(whole.groups, whole.labels, strict=True) if n == c}) for c in range(len(chosen))) > 1:
        return whole, {**facts, "judged_on": "slides not learnt from"}
    corners = np.concatenate([features.coords for features in read]) // REGION
    regions = [f"{slide} {x} {y}" for slide, (x, y) in zip(slide_of, corners.tolist(), strict=True)]
    whole = Labelled(vectors, labels, regions, tuple(chosen)).part(labels >= 0)
    return whole, {**facts, "judged_on": "other regions of the same slides"}


def _annotation_file(folder: str, slide: str) -> str | None:
    files = (store.join(folder, slide + ending) for ending in (".geojson", ".geojson.gz", ".json", ".xml", ".zip"))
    return next((uri for uri in files if store.exists(uri)), None)


def slides_by_table(
    source: str, table: str, *, column: str = "label", classes: Sequence[str] | None = None
) -> tuple[Labelled, dict[str, object]]:
    """Mean vectors of slides labelled by a CSV with the columns ``slide``, ``column`` and, if wanted, ``patient``.

    Slides without a row, and rows with an empty label, are left out; a row whose slide was not embedded is an error.
    """
    cells = read_table(table)
    names, labels = cells.column("slide"), cells.column(column)
    patients = cells.columns.get("patient", names)
    rows = [row for row, label in enumerate(labels) if label]
    if not rows:
        raise ManifestError(f"{table} has no row with a '{column}'")
    present = dict(embedded(source))
    chosen = list(classes or sorted({labels[row] for row in rows}))
    for row in rows:
        if names[row] not in present:
            raise cells.wrong(row, f"no slide '{names[row]}' below {store.redact(source)}")
        if labels[row] not in chosen:
            raise cells.wrong(row, f"unknown label '{labels[row]}'; known: {', '.join(chosen)}")
    read = [read_features(present[names[row]]) for row in rows]
    facts = _common_attributes(read, [names[row] for row in rows])
    for features, row in zip(read, rows, strict=True):
        if not len(features.vectors):
            raise InputError(f"slide {names[row]} has no tile; take it out of {table}")
    vectors = np.stack([features.vectors.mean(axis=0, dtype=np.float64) for features in read]).astype(np.float32)
    numbers = np.array([chosen.index(labels[row]) for row in rows], np.int32)
    groups = [patients[row] or names[row] for row in rows]
    return Labelled(vectors, numbers, groups, tuple(chosen)), {**facts, "judged_on": "patients not learnt from"}


# ---------------------------------------------------------------- fitting


@dataclass(frozen=True, slots=True)
class Fitted:
    """A head that was fitted: its kind, its metrics in cross-validation, whether it is the one that was kept."""

    kind: str
    figures: dict[str, Any]
    kept: bool = False


def learn(  # noqa: PLR0913  (a public function: one keyword per option a user can set)
    features: str,
    labels: str,
    output: str | Path,
    *,
    head: str = "linear",
    classes: Sequence[str] | None = None,
    column: str = "label",
    task: str = "fewshot",
    weights: str | None = None,
    seed: int = 0,
) -> list[Fitted]:
    """Fit a head, or all kinds and keep the best; write it to ``output``, and a linear one of tiles as a model too.

    ``labels``: a folder of annotations (tiles) or a CSV (slides); ``weights``: the encoder's file, for the model of a
    bare encoder. Metrics are of held-out groups; they are NaN when there are too few groups to hold any out.
    """
    of_slides = labels.lower().endswith((".csv", ".csv.gz"))
    if of_slides:
        data, facts = slides_by_table(features, labels, column=column, classes=classes)
    else:
        data, facts = tiles_by_regions(features, labels, classes=classes)
    kinds = list(KINDS) if head == "all" else [head]
    judged = {"judged_on": facts.pop("judged_on")}
    fits = [(kind, *fewshot.fit(kind, data, seed=seed)) for kind in kinds]
    found = [(kind, fit, {**metrics, **judged}) for kind, fit, metrics in fits]
    kind, best, figures = max(found, key=lambda f: -1 if math.isnan(x := f[2]["balanced_accuracy"]) else x)
    level = "slide" if of_slides else "tile"
    about = {**facts, "classes": list(data.classes), "level": level, "task": task, "figures": figures, "seed": seed}
    counts = np.bincount(data.labels, minlength=len(data.classes)).tolist()
    fewshot.save(output, best, {**about, "examples_per_class": dict(zip(data.classes, counts, strict=True))})
    if isinstance(best, Linear) and not of_slides:
        _save_model(best, Path(output) / MODEL, about, weights)
    return [Fitted(k, metrics, k == kind) for k, _, metrics in found]


def _save_model(head: Linear, folder: Path, about: dict[str, Any], weights: str | None) -> None:
    """Write the encoder with the head behind it. InputError unless it is the encoder that the features are of."""
    name = str(about["encoder"])
    other = f"the features are of other weights of '{name}'; pass those with --weights"
    if is_model(name):
        model = load_model(name)
        if about["model_hash"] not in (None, model_identity(name, model.card)):
            raise InputError(other)
    else:
        chosen = _same_encoder(name, about.get("network"), weights)
        if about["model_hash"] not in (None, chosen.identity):
            raise InputError(other)
        model = open_encoder(chosen)
    sized = {} if model.card.tasks else {"mpp": about["mpp"], "tile_size": about["patch_size"], "overlap": 0}
    facts = {"name": str(about["task"]), **sized, "metrics": {about["task"]: about["figures"]}}
    model.card = model.card.model_copy(update=facts)
    fewshot.save_with_head(model, head, folder, name=str(about["task"]), classes=about["classes"])


def _same_encoder(name: str, network: str | None, weights: str | None) -> ChosenEncoder:
    """The bare encoder that the features name; those of earlier versions do not say how it pooled."""
    if network is None:
        return choose_encoder(name, weights)
    recipe = parse_recipe(network, "the encoder of the features")
    return hash_encoder(unread_encoder(recipe, locate_weights(recipe, weights), weights))


# ---------------------------------------------------------------- prediction


@dataclass(frozen=True, slots=True)
class Said:
    """The prediction of a head for a slide: the likeliest class, its probability, where the table is ("" for slide
    heads)."""

    slide: str
    answer: str
    probability: float
    table: str


def predict(features: str, head: str | Path, output: str) -> list[Said]:
    """Apply a head to every slide below ``features``; tile heads write ``<output>/<slide>.parquet``.

    InputError when the features are not those that the head was fitted on.
    """
    fitted, about = fewshot.load(head)
    found = []
    for slide, uri in embedded(features):
        read = read_features(uri)
        for name in MADE_WITH:
            if read.attributes.get(name) != about.get(name):
                raise InputError(
                    f"{slide} was embedded with {name} {read.attributes.get(name)}, the head with {about.get(name)}"
                )
        found.append(_predict_slide(slide, read, fitted=fitted, about=about, output=output))
    return found


def _predict_slide(
    slide: str, features: SlideFeatures, *, fitted: fewshot.Head, about: dict[str, Any], output: str
) -> Said:
    vectors, uri = features.vectors, ""
    if not len(vectors):
        return Said(slide, "", float("nan"), uri)
    if about["level"] == "slide":
        mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)[None]
        share = fitted.probabilities(mean)[0]
    else:
        found = fitted.probabilities(vectors)
        uri = store.join(output, f"{slide}.parquet")
        store.write_bytes(uri, _prediction_table(features, found, about))
        share = found.mean(axis=0)
    return Said(slide, about["classes"][int(share.argmax())], float(share.max()), uri)


def _prediction_table(features: SlideFeatures, found: F64, about: dict[str, Any]) -> bytes:
    n, side = len(features.vectors), int(features.attributes.get("patch_size_level0", 0))
    if side <= 0:
        raise InputError("the features do not say how large their tiles are; embed the slides again")
    task = str(about["task"])
    columns = {task: found.argmax(axis=1).astype(np.int32)}
    columns |= {f"{task}:{name}": found[:, k].astype(np.float32) for k, name in enumerate(about["classes"])}
    return tiles_table(
        index=features.coords[:, ::-1] // side, xy=features.coords, size=(side, side),
        failed=np.zeros(n, np.bool_), tissue=np.ones(n, np.float32),
        columns=columns, classes={task: about["classes"]},
    )  # fmt: skip
