"""Few-shot heads: classifiers on frozen features, trained in seconds from what `wsi-mmm embed` wrote.

Three kinds, all by well-kept libraries: ``linear`` (logistic regression), ``knn`` (cosine neighbours) and ``gbm``
(gradient boosting, an extra). A linear head is also a task of a model: it can be put behind its encoder, and the
folder that comes of it runs on slides like any other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.special import softmax

from wsi_mmm.errors import InputError, ModelError, OptionError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.model.checkpoint import assemble_model, pack_tensors, save_model, unpack_tensors
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.plugins import import_package
from wsi_mmm.storage import store
from wsi_mmm.types import F32, F64, I32

KINDS = ("linear", "knn", "gbm")
FACTS, TENSORS, TREES = "head.json", "head.safetensors", "trees.txt"
EPS = 1e-5  # of the layer norm before a linear head, as in VectorHead
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
NEIGHBOURS = (1, 5, 15)
_LIGHTGBM = ("lightgbm", "gradient boosting needs LightGBM: pip install 'wsi-mmm[fewshot]'")
_PALETTE = ((215, 48, 39), (69, 117, 180), (26, 152, 80), (254, 196, 79), (152, 78, 163), (166, 86, 40), (90, 90, 90))


@dataclass(frozen=True, slots=True)
class Labelled:
    """n labelled vectors: float32[n, D], class index int32[n], and the group (slide, patient, region) of each."""

    vectors: F32
    labels: I32
    groups: Sequence[str]
    classes: tuple[str, ...]

    def part(self, chosen: Any) -> Labelled:
        """The rows selected by indices or a mask."""
        rows = np.arange(len(self.labels))[chosen]
        return Labelled(self.vectors[rows], self.labels[rows], [self.groups[i] for i in rows], self.classes)


class Head(Protocol):
    """A fitted head."""

    def probabilities(self, vectors: F32) -> F64:
        """float32[n, D] -> float64[n, K], rows add up to 1."""


@dataclass(frozen=True, slots=True)
class Linear:
    """Softmax of ``weight`` float32[K, D] . layer_norm(vector) + ``bias`` float32[K]."""

    weight: F32
    bias: F32

    def probabilities(self, vectors: F32) -> F64:
        """See `Head`."""
        found: F64 = softmax(layer_norm(vectors) @ self.weight.T.astype(np.float64) + self.bias, axis=1)
        return found


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Share of each class among the ``k`` stored vectors of the greatest cosine."""

    vectors: F32
    labels: I32
    k: int
    classes: int

    def probabilities(self, vectors: F32) -> F64:
        """See `Head`."""
        from sklearn.neighbors import KNeighborsClassifier

        found = KNeighborsClassifier(min(self.k, len(self.labels)), metric="cosine").fit(self.vectors, self.labels)
        out = np.zeros((len(vectors), self.classes))
        out[:, found.classes_] = found.predict_proba(vectors)
        return out


@dataclass(frozen=True, slots=True)
class Trees:
    """A LightGBM model, as its own text."""

    text: str
    classes: int

    def probabilities(self, vectors: F32) -> F64:
        """See `Head`."""
        found = np.asarray(import_package(*_LIGHTGBM).Booster(model_str=self.text).predict(vectors), np.float64)
        return found if found.ndim == 2 else np.stack([1.0 - found, found], axis=1)


def layer_norm(vectors: F32) -> F64:
    """Each vector with mean 0 and variance 1 over its values (Ba et al. 2016), as the model's vector heads do."""
    x = vectors.astype(np.float64)
    x -= x.mean(axis=1, keepdims=True)
    normal: F64 = x / np.sqrt(x.var(axis=1, keepdims=True) + EPS)
    return normal


# ---------------------------------------------------------------- fitting


def fit(kind: str, data: Labelled, *, seed: int = 0) -> tuple[Head, dict[str, Any]]:
    """A head fitted to all of ``data``, its strength chosen by grouped cross-validation, and what that said.

    The second: ``balanced_accuracy``, ``auroc`` (one class against the rest, mean) of held-out groups, ``folds`` and
    ``setting``. InputError when a class has no example. OptionError for an unknown kind.
    """
    if kind not in KINDS:
        raise OptionError(f"there is no few-shot head '{kind}'; choose one of: {', '.join(KINDS)}")
    counts = np.bincount(data.labels, minlength=len(data.classes))
    if len(data.classes) < 2 or not counts.all():
        bare = [name for name, count in zip(data.classes, counts, strict=True) if not count]
        raise InputError(f"few-shot needs two classes with examples; without any: {', '.join(bare) or 'all but one'}")
    folds = _group_folds(data, seed)
    settings: Sequence[float] = {"linear": STRENGTHS, "knn": NEIGHBOURS, "gbm": (0.1,)}[kind]
    if not folds:  # nothing can be held out: a middling setting, and figures that say that they are unknown
        settings = settings[len(settings) // 2 :][:1]
    judged = [(_cross_validate(kind, data, folds, setting=s, seed=seed), s) for s in settings]
    best, setting = max(judged, key=lambda pair: pair[0]["balanced_accuracy"])
    return _fit_head(kind, data, setting, seed), {
        **best,
        "folds": len(folds),
        "setting": setting,
        "examples": len(data.labels),
    }


def _fit_head(kind: str, data: Labelled, setting: float, seed: int) -> Head:
    if kind == "linear":
        return _fit_linear(data, setting, seed)
    if kind == "knn":
        return Neighbours(data.vectors, data.labels, int(setting), len(data.classes))
    return _fit_trees(data, setting, seed)


def _fit_linear(data: Labelled, strength: float, seed: int) -> Linear:
    """Balanced multinomial logistic regression on standardised normed vectors; the scale is folded into the weights."""
    from sklearn.linear_model import LogisticRegression

    x = layer_norm(data.vectors)
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    found = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced", random_state=seed)
    found.fit((x - mean) / scale, data.labels)
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # two classes come as one row of log odds
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    return Linear(weight.astype(np.float32), (bias - weight @ mean).astype(np.float32))


def _fit_trees(data: Labelled, rate: float, seed: int) -> Trees:
    lightgbm = import_package(*_LIGHTGBM)
    many = len(data.classes) > 2
    parameters = {
        "objective": "multiclass" if many else "binary", "learning_rate": rate, "min_data_in_leaf": 3, "verbose": -1,
        "seed": seed, "deterministic": True, "num_threads": 1,
    } | ({"num_class": len(data.classes)} if many else {})  # fmt: skip
    weight = (len(data.labels) / np.maximum(np.bincount(data.labels), 1))[data.labels]
    found = lightgbm.train(parameters, lightgbm.Dataset(data.vectors, data.labels, weight=weight), num_boost_round=100)
    return Trees(found.model_to_string(), len(data.classes))


# ---------------------------------------------------------------- judging


def _group_folds(data: Labelled, seed: int) -> list[tuple[Any, Any]]:
    """(learn, judge) rows, up to five folds that never divide a group; none when the groups do not suffice."""
    from sklearn.model_selection import StratifiedGroupKFold

    per_class = [
        len({g for g, label in zip(data.groups, data.labels, strict=True) if label == c})
        for c in range(len(data.classes))
    ]
    count = min(5, *per_class)
    if count < 2:
        return []
    made = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    pairs = made.split(data.vectors, data.labels, data.groups)
    return [(learn, judge) for learn, judge in pairs if len(set(data.labels[learn])) == len(data.classes)]


def _cross_validate(kind: str, data: Labelled, folds: Sequence[Any], *, setting: float, seed: int) -> dict[str, float]:
    """Figures over all held-out rows; NaN when there is nothing to hold out."""
    if not folds:
        return {"balanced_accuracy": float("nan"), "auroc": float("nan")}
    rows = np.concatenate([judge for _, judge in folds])
    chance = [
        _fit_head(kind, data.part(learn), setting, seed).probabilities(data.vectors[judge]) for learn, judge in folds
    ]
    return figures(data.labels[rows], np.concatenate(chance))


def figures(labels: I32, probabilities: F64) -> dict[str, float]:
    """Balanced accuracy, and area under the ROC curve (one class against the rest, mean of those that occur)."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    seen = [c for c in range(probabilities.shape[1]) if 0 < (labels == c).sum() < len(labels)]
    auroc = [roc_auc_score(labels == c, probabilities[:, c]) for c in seen]
    return {
        "balanced_accuracy": float(balanced_accuracy_score(labels, probabilities.argmax(axis=1))),
        "auroc": float(np.mean(auroc)) if auroc else float("nan"),
    }


# ---------------------------------------------------------------- files


def save(folder: str | Path, head: Head, facts: dict[str, Any]) -> None:
    """``head.json`` and the head's numbers. ``facts``: what it is for (``classes`` and whatever else is known)."""
    place = Path(folder)
    kind = {Linear: "linear", Neighbours: "knn", Trees: "gbm"}[type(head)]
    if isinstance(head, Trees):
        store.write_bytes(str(place / TREES), head.text.encode())
    else:
        arrays = {k: torch.from_numpy(v) for k, v in asdict(head).items() if isinstance(v, np.ndarray)}  # type: ignore[call-overload]
        store.write_bytes(str(place / TENSORS), pack_tensors(arrays, {}))
    more = {"k": head.k} if isinstance(head, Neighbours) else {}
    text = json.dumps({**facts, "kind": kind, **more}, indent=2)
    store.write_bytes(str(place / FACTS), (text + "\n").encode())


def load(folder: str | Path) -> tuple[Head, dict[str, Any]]:
    """Load what `save` wrote. ModelError when it is not there or not that."""
    place = Path(folder)
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
        kind, classes = facts["kind"], len(facts["classes"])
        if kind == "gbm":
            return Trees((place / TREES).read_text(encoding="utf-8"), classes), facts
        tensors, _ = unpack_tensors((place / TENSORS).read_bytes(), str(place / TENSORS))
        arrays = {name: value.numpy() for name, value in tensors.items()}
        broken = next((name for name, value in arrays.items() if not np.isfinite(value).all()), None)
        if broken is not None:
            raise ModelError(f"the head {place / TENSORS} holds NaN or infinity in '{broken}'; fit it again")
        if kind == "linear":
            return Linear(arrays["weight"], arrays["bias"]), facts
        return Neighbours(arrays["vectors"], arrays["labels"], int(facts["k"]), classes), facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place} holds no few-shot head; wsi-mmm fewshot fit makes them ({error})") from error


def with_head(model: MultiTaskModel, head: Linear, name: str, classes: Sequence[str]) -> MultiTaskModel:
    """``model`` with one more `classify` task of that head, which alone a run answers unless others are named.
    ModelError when the name is taken or sizes do not fit."""
    if head.weight.shape[1] != model.vector_width:
        raise ModelError(f"the head is for vectors of {head.weight.shape[1]}, the encoder gives {model.vector_width}")
    colors = tuple(_PALETTE[i % len(_PALETTE)] for i in range(len(classes)))
    task = TaskCard(
        name=name, kind="classify", head="vector", outputs=len(classes), classes=tuple(classes), colors=colors
    )
    if name in model.tasks:
        raise ModelError(f"the model has a task '{name}' already; choose another --task name")
    tasks = {"tasks": (*model.card.tasks, task), "default_tasks": (name,)}
    made = assemble_model(model.card.model_copy(update={**tasks, "weights_sha256": ""}), model.encoder)
    made.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        made.get_parameter(f"heads.{name}.out.weight").copy_(torch.from_numpy(head.weight))
        made.get_parameter(f"heads.{name}.out.bias").copy_(torch.from_numpy(head.bias))
    return made.eval()


def save_with_head(
    model: MultiTaskModel, head: Linear, folder: str | Path, *, name: str, classes: Sequence[str]
) -> None:
    """The model folder that `run` loads (float32: the head's small differences matter)."""
    save_model(with_head(model, head, name, classes), folder, half=False)
