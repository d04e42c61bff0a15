"""Fitting few-shot heads from files to files, and letting them speak."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.errors import InputError
from wsi_mmm.model.checkpoint import load_encoder, load_model
from wsi_mmm.model.identity import encoder_identity, is_model, model_identity
from wsi_mmm.outputs.exports import SlideFeatures
from wsi_mmm.outputs.tables import tiles_table
from wsi_mmm.storage import store
from wsi_mmm.training import fewshot
from wsi_mmm.training.fewshot import KINDS, Labelled, Linear
from wsi_mmm.training.fewshot_data import embedded, slides_by_table, tiles_by_regions
from wsi_mmm.types import F64

MODEL = "model"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A head that was fitted: its kind, what cross-validation said, whether it is the one that was kept."""

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
    bare encoder. The figures come from held-out groups; they are NaN when there are too few groups to hold any out.
    """
    of_slides = labels.lower().endswith((".csv", ".csv.gz"))
    if of_slides:
        data, facts = slides_by_table(features, labels, column=column, classes=classes)
    else:
        data, facts = tiles_by_regions(features, labels, classes=classes)
    kinds = list(KINDS) if head == "all" else [head]
    judged = {"judged_on": facts.pop("judged_on")}
    fits = [(kind, *fewshot.fit(kind, data, seed=seed)) for kind in kinds]
    found = [(kind, fit, {**said, **judged}) for kind, fit, said in fits]
    kind, best, figures = max(found, key=lambda f: -1 if math.isnan(x := f[2]["balanced_accuracy"]) else x)
    level = "slide" if of_slides else "tile"
    about = {**facts, "classes": list(data.classes), "level": level, "task": task, "figures": figures, "seed": seed}
    fewshot.save(output, best, {**about, "examples_per_class": _class_counts(data)})
    if isinstance(best, Linear) and not of_slides:
        _save_model(best, Path(output) / MODEL, about, weights)
    return [Fitted(k, said, k == kind) for k, _, said in found]


def _class_counts(data: Labelled) -> dict[str, int]:
    counts = np.bincount(data.labels, minlength=len(data.classes)).tolist()
    return dict(zip(data.classes, counts, strict=True))


def _save_model(head: Linear, folder: Path, about: dict[str, Any], weights: str | None) -> None:
    """The encoder with the head behind it. InputError unless it is the encoder that the features are of."""
    name = str(about["encoder"])
    model = load_model(name) if is_model(name) else load_encoder(name, weights)
    identity = model_identity(name, model.card) if is_model(name) else encoder_identity(name, weights)
    if about["model_hash"] not in (None, identity):
        raise InputError(f"the features are of other weights of '{name}'; pass those with --weights")
    sized = {"mpp": about["mpp"], "tile_size": about["patch_size"], "overlap": 0}
    model.card = model.card.model_copy(
        update={
            "name": str(about["task"]),
            **(sized if not model.card.tasks else {}),
            "metrics": {about["task"]: about["figures"]},
        }
    )
    fewshot.save_with_head(model, head, folder, name=str(about["task"]), classes=about["classes"])


@dataclass(frozen=True, slots=True)
class Said:
    """The prediction of a head for a slide: the likeliest class, its probability, where the table is ("" for slide
    heads)."""

    slide: str
    answer: str
    probability: float
    table: str


def predict(features: str, head: str | Path, output: str) -> list[Said]:
    """Let a head speak of every slide below ``features``; tile heads write ``<output>/<slide>.parquet``.

    InputError when the features are not those that the head was fitted on.
    """
    fitted, about = fewshot.load(head)
    said = []
    for slide in embedded(features):
        read = slide.read()
        for name in ("encoder", "model_hash", "mpp", "patch_size"):
            if read.attributes.get(name) != about.get(name):
                raise InputError(
                    f"{slide.id} was embedded with {name} {read.attributes.get(name)}, the head with {about.get(name)}"
                )
        said.append(_predict_slide(slide.id, read, fitted=fitted, about=about, output=output))
    return said


def _predict_slide(
    slide: str, features: SlideFeatures, *, fitted: fewshot.Head, about: dict[str, Any], output: str
) -> Said:
    classes, vectors = about["classes"], features.vectors
    if not len(vectors):
        return Said(slide, "", float("nan"), "")
    if about["level"] == "slide":
        mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)[None]
        chance = fitted.probabilities(mean)[0]
        return Said(slide, classes[int(chance.argmax())], float(chance.max()), "")
    found = fitted.probabilities(vectors)
    uri = store.join(output, f"{slide}.parquet")
    store.write_bytes(uri, _prediction_table(features, found, about))
    share = found.mean(axis=0)
    return Said(slide, classes[int(share.argmax())], float(share.max()), uri)


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
