"""Few-shot heads from files to files: labelled vectors, fitting, prediction.

Vectors are what `wsi-mmm embed` wrote; tiles are labelled by annotated regions, slides by a table.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from wsi_mmm.annotations import Shapes, parse_shapes, read_annotation_file, shape_at
from wsi_mmm.errors import InputError, ManifestError
from wsi_mmm.model.checkpoint import load_model, open_encoder
from wsi_mmm.model.identity import is_model
from wsi_mmm.outputs.exports import SlideFeatures, read_features
from wsi_mmm.outputs.tables import tiles_table
from wsi_mmm.storage import store
from wsi_mmm.training import fewshot
from wsi_mmm.training.data.bags import without_failed
from wsi_mmm.training.data.embedding import (
    ATTRIBUTES,
    FEATURES,
    common_embedding,
    embedding_of,
    source_encoder,
    source_identity,
)
from wsi_mmm.training.data.tables import read_table
from wsi_mmm.training.fewshot import KINDS, Labelled, Linear
from wsi_mmm.types import F64, I64

MODEL = "model"
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


def _common_attributes(features: Sequence[SlideFeatures], named: Sequence[tuple[str, str]]) -> dict[str, object]:
    """How all ``features`` of ``named`` slides (id, URI) were made. InputError naming two that differ."""
    made = [(*pair, embedding_of(found.attributes)) for pair, found in zip(named, features, strict=True)]
    return {**dict.fromkeys(ATTRIBUTES), **common_embedding(made).to_json()}


def tiles_by_regions(
    source: str, annotations: str, *, classes: Sequence[str] | None = None
) -> tuple[Labelled, dict[str, object]]:
    """Tiles whose centre lies in an annotated region, or that hold points of one class, and how they were embedded.

    ``annotations``: a folder with ``<slide>.geojson`` (``.json``, ``.xml``, zipped too) per embedded slide.
    ``classes``: those to learn, in order (None: all, sorted). Groups are slides when each class has two or more, else
    regions of slides; ``judged_on`` of the second says which.
    """
    slides = [(slide, uri, file) for slide, uri in embedded(source) if (file := _annotation_file(annotations, slide))]
    if not slides:
        raise InputError(f"{annotations} holds no <slide>.geojson for any slide below {store.redact(source)}")
    read = [without_failed(read_features(uri), uri) for _, uri, _ in slides]
    facts = _common_attributes(read, [(slide, uri) for slide, uri, _ in slides])
    named: list[str | None] = []
    for (_, _, file), features in zip(slides, read, strict=True):
        shapes = parse_shapes(read_annotation_file(file), store.redact(file))
        side = level0_side(features)
        middle: F64 = features.coords + np.float64(side / 2.0)
        found = [shapes.items[n].class_name if n >= 0 else None for n in shape_at(shapes, middle)]
        for tile, names in _pointed_tiles(shapes, features.coords, side).items():
            if found[tile] is None and len(names) == 1:  # a tile with points of several classes is of none
                found[tile] = names.pop()
        named += found
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


def level0_side(features: SlideFeatures) -> float:
    """Side of the tiles in level-0 px. InputError when the features do not say it."""
    side = float(features.attributes.get("patch_size_level0") or 0)
    if side <= 0:
        raise InputError("the features do not say how large their tiles are; embed the slides again")
    return side


def _pointed_tiles(shapes: Shapes, corners: I64, side: float) -> dict[int, set[str]]:
    """Tile -> the classes of the annotated points in it."""
    dots = [dot for dot in shapes.dots if dot.class_name is not None]
    if not dots or not len(corners):
        return {}
    near = cKDTree(corners + side / 2.0).query_ball_point([(dot.x, dot.y) for dot in dots], side / 2.0, p=np.inf)
    found: dict[int, set[str]] = defaultdict(set)
    for dot, tiles in zip(dots, near, strict=True):
        for tile in tiles:
            found[int(tile)].add(str(dot.class_name))
    return found


def _annotation_file(folder: str, slide: str) -> str | None:
    files = (
        store.join(folder, slide + ending)
        for ending in (".geojson", ".geojson.gz", ".json", ".xml", ".annotations", ".zip")
    )
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
    read = [without_failed(read_features(uri), uri) for uri in (present[names[row]] for row in rows)]
    facts = _common_attributes(read, [(names[row], present[names[row]]) for row in rows])
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
    if "linear" in kinds and not of_slides:
        _check_tiles(facts)
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


def _check_tiles(made: Mapping[str, Any]) -> None:
    """InputError for tiles that a model, which `run` takes, cannot have."""
    side, overlap = made["patch_size"], made["overlap"] or 0
    if side is None or made["mpp"] is None:
        raise InputError("the features do not say the mpp and the size of their tiles: embed the slides again")
    if side % 32 or side < 64 or overlap % 8 or 2 * overlap > side:
        raise InputError(
            f"no model takes tiles of {side} px that share {overlap} px: embed with a --tile-size that is a "
            "multiple of 32, from 64, and an --overlap that is a multiple of 8, up to half of it; or choose --head knn"
        )


def _save_model(head: Linear, folder: Path, about: dict[str, Any], weights: str | None) -> None:
    """Write the encoder with the head behind it, which a run applies to tiles as the head learnt them: of the same
    size, overlap and mpp. InputError unless it is the encoder that the features are of."""
    name, task = str(about["encoder"]), str(about["task"])
    if about["model_hash"] not in (None, source_identity(name, weights, about.get("network"))):
        raise InputError(f"the features are of other weights of '{name}'; pass those with --weights")
    model = load_model(name) if is_model(name) else open_encoder(source_encoder(name, weights, about.get("network")))
    model.card = model.card.model_copy(update={
        "name": task, "mpp": about["mpp"], "tile_size": about["patch_size"], "overlap": about["overlap"] or 0,
        "metrics": {task: about["figures"]}, "data": {**model.card.data, FEATURES: embedding_of(about).to_json()},
    })  # fmt: skip
    fewshot.save_with_head(model, head, folder, name=task, classes=about["classes"])


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
        made = embedding_of(read.attributes)
        learnt = embedding_of({**made.to_json(), **{name: about[name] for name in ATTRIBUTES if name in about}})
        if difference := made.first_difference(learnt):
            name, mine, theirs = difference
            text = f"{slide} was embedded with {name} {mine}, the head with {theirs}"
            raise InputError(f"{text} ({store.redact(uri)}, {Path(head) / fewshot.FACTS}): embed it alike")
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
    n, side = len(features.vectors), int(level0_side(features))
    task = str(about["task"])
    columns = {task: found.argmax(axis=1).astype(np.int32)}
    columns |= {f"{task}:{name}": found[:, k].astype(np.float32) for k, name in enumerate(about["classes"])}
    return tiles_table(
        index=features.coords[:, ::-1] // side, xy=features.coords, size=(side, side),
        failed=np.zeros(n, np.bool_), tissue=np.ones(n, np.float32),
        columns=columns, classes={task: about["classes"]},
    )  # fmt: skip
