"""One training per kind of task on the slides of `helpers.learnable`, by the road that users take, and its scores.

``python tests/helpers/learning.py [kind ..] [--seeds 3]`` prints the rows of the table in docs/training.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as the tests see it
    sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.learnable import TILE, Known, learnable_slides

FIRST, BAGS = 24, 36
"""Slides that tiles are learnt from, and slides that are bags."""

LOOKED = [{"label": "use", "pattern": "looked at"}, {"label": "ignore", "pattern": "unclear"}]
TABLE = {
    "bag-label": {"columns": ["label"]}, "bag-value": {"columns": ["value"]},
    "bag-cox": {"columns": ["time", "event"]}, "bag-steps": {"columns": ["time", "event"]},
}  # fmt: skip


MODEL = {
    "mpp": 1.0, "tile_size": TILE, "overlap": 16,
    "encoder": {"name": "resnet18", "args": {"channels": [16, 24, 32, 48]}},
    "decoder": {"bottleneck": 32, "widths": [16, 16, 24, 32]}, "neck": {"width": 24},
    "bag": {"kind": "gated", "width": 32, "hidden": 16},
}  # fmt: skip


def named(*pairs: str) -> list[dict[str, str]]:
    """Rules "class of the file=label"."""
    return [dict(zip(("pattern", "label"), pair.split("="), strict=True)) for pair in pairs]


@dataclass(frozen=True)
class AnnotationTarget:
    """What is learnt: the task, its data, and how long; ``metric`` of the held-out slides must be ``score`` or better,
    and better than before the first step by ``gain``."""

    task: Mapping[str, Any]
    data: Mapping[str, Any]
    metric: str
    score: float
    gain: float
    steps: int = 200
    rate: float = 4e-3

    @property
    def name(self) -> str:
        return str(self.task["name"])


def tiles(name: str, *rules: dict[str, str], batch: int = 16, **shapes: Any) -> dict[str, Any]:
    """Tiles of annotated slides; what no rule names is left out."""
    meaning = {"buckets": [*LOOKED, *rules], "unmatched": "drop", **shapes}
    return {"kind": "slides", "task": name, "batch": batch, "stride": TILE // 2, "shapes": {name: meaning}}


def round_objects(name: str, *rules: dict[str, str]) -> dict[str, Any]:
    """Tiles round objects: a tile of the grid holds one or two."""
    return {**tiles(name, *rules, batch=8), "stride": 0, "by": "objects", "per_slide": 24}


def bag(name: str, **task: Any) -> dict[str, Any]:
    return {"name": name, "scope": "bag", **task}


def of_table(name: str, kind: str = "bags", **data: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "slides": {"table": "{folder}/slides.csv", "uri": "file", "truth": {name: TABLE[name]}},
        **data,
    }


TEXTURES = named("striped=striped", "dotted=dotted")
CELLS = named("round=cell", "long=cell")
LESSONS: dict[str, AnnotationTarget] = {
    spec.name: spec
    for spec in (
        AnnotationTarget(
            {"name": "classify", "kind": "classify", "classes": ["plain", "striped", "dotted"]},
            tiles("classify", *TEXTURES, background="plain", min_share=0.8),
            "balanced_accuracy", 0.9, 0.3,
        ),
        AnnotationTarget(
            {"name": "multilabel", "kind": "multilabel", "classes": ["striped", "dotted"]},
            tiles("multilabel", *TEXTURES, min_share=0.25),
            "ap", 0.9, 0.3,
        ),
        AnnotationTarget(
            {"name": "regress", "kind": "regress", "classes": ["period"], "params": {"centre": 9.5, "spread": 2.6}},
            tiles("regress", *named("striped=period"), values=["period"], min_share=0.8),
            "r2", 0.7, 0.7,
        ),
        AnnotationTarget(
            {"name": "segment", "kind": "segment", "classes": ["plain", "striped", "dotted"]},
            tiles("segment", *TEXTURES, background="plain", batch=8),
            "mean_iou", 0.75, 0.4, steps=300, rate=3e-3,
        ),
        AnnotationTarget(
            {"name": "multisegment", "kind": "multisegment", "classes": ["striped", "cell"]},
            tiles("multisegment", *named("striped=striped"), *CELLS, batch=8),
            "mean_iou", 0.7, 0.4,
        ),
        AnnotationTarget(
            {"name": "instances", "kind": "instances", "classes": ["cell"]},
            round_objects("instances", *CELLS),
            "f1", 0.8, 0.6, rate=8e-3,
        ),
        AnnotationTarget(
            {"name": "detect", "kind": "detect", "classes": ["cell"]},
            round_objects("detect", *CELLS),
            "ap50", 0.9, 0.6, steps=150, rate=8e-3,
        ),
        AnnotationTarget(
            {"name": "detect-two", "kind": "detect", "classes": ["round", "long"]},
            round_objects("detect-two", *named("round=round", "long=long")),
            "ap50", 0.85, 0.6, steps=150, rate=8e-3,
        ),
        AnnotationTarget(
            bag("bag-label", kind="classify", classes=["low", "high"]),
            of_table("bag-label", features="{features}/{slide}/features.zarr", batch=8),
            "balanced_accuracy", 0.75, 0.2, steps=100, rate=6e-3,
        ),
        AnnotationTarget(
            bag("bag-value", kind="regress", classes=["amount"], params={"centre": 0.1, "spread": 0.1}),
            of_table("bag-value", "tile-bags", stride=TILE, most=40, batch=4),
            "r2", 0.5, 0.25, steps=150,
        ),
        AnnotationTarget(
            bag("bag-cox", kind="survive", classes=["event"]),
            of_table("bag-cox", features="{features}/{slide}/features.zarr", batch=16),
            "concordance", 0.8, 0.02, steps=100, rate=6e-3,
        ),
        AnnotationTarget(
            bag("bag-steps", kind="survive", classes=["event"], params={"bins": 5, "horizon": 11.0}),
            of_table("bag-steps", features="{features}/{slide}/features.zarr", batch=16),
            "concordance", 0.8, 0.02, steps=100, rate=6e-3,
        ),
        AnnotationTarget(
            {"name": "reconstruct", "kind": "reconstruct", "classes": ["px"], "params": {"patch": 8, "share": 0.3}},
            {"kind": "slides", "task": "reconstruct", "annotations": None, "batch": 8},
            "psnr", 23.0, 5.0, steps=150,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """``slides`` to learn tiles from; ``bags``: other slides, in ``folder`` with their table; ``model``: one that tells
    textures apart, ``features``: what it says of the tiles of those other slides."""

    folder: Path
    slides: Sequence[Known]
    bags: Sequence[Known]
    model: str
    features: Path

    def filled(self, value: Any) -> Any:
        """``value`` with its places filled in."""
        if isinstance(value, str):
            return value.replace("{folder}", str(self.folder)).replace("{features}", str(self.features))
        if isinstance(value, Mapping):
            return {key: self.filled(one) for key, one in value.items()}
        return [self.filled(one) for one in value] if isinstance(value, list) else value


def make_ground(folder: Path, seed: int = 0) -> tuple[Ground, Score]:
    """The slides, and how the model of the features learnt to `classify`."""
    from wsi_mmm import api

    for name in ("first", "bags"):
        (folder / name).mkdir(parents=True)
    slides = learnable_slides(folder / "first", FIRST, seed)
    bags = learnable_slides(folder / "bags", BAGS, seed + 1)
    begun = Ground(folder / "bags", slides, bags, "", folder / "features")
    score = learn(begun, [LESSONS["classify"]], folder / "classify", seed)
    words = [str(one.path) for one in bags]
    options = {"mpp": 1.0, "tile_size": TILE, "overlap": 0, "tissue": "none", "device": "cpu"}
    report = api.embed(words, score.model, output=begun.features, **options)
    assert report.exit_code == 0, [row.error for row in report.slides]
    return replace(begun, model=score.model), score


def configuration(ground: Ground, specs: Sequence[AnnotationTarget], out: Path, seed: int = 0) -> dict[str, Any]:
    """What a user would write into a file."""
    data, model = [], dict(MODEL)
    for spec in specs:
        one = {"name": f"data-{spec.name}", **ground.filled(spec.data)}
        if one["kind"] == "slides":
            one["slides"] = [str(known.path) for known in ground.slides]
        else:
            one["slides"]["root"] = str(ground.folder)
            model |= {"start": ground.model, "overlap": 0}  # as the vectors were made
        data.append(one)
    return {
        "out": str(out), "seed": seed, "steps": max(spec.steps for spec in specs), "device": "cpu", "threads": 1,
        "model": model, "task": [dict(spec.task) for spec in specs], "data": data,
        "split": {"val": 0.0, "test": 0.3, "seed": 0}, "sampling": {"class_balance": True},
        "validation": {"items": 128},
        "optim": {"rate": specs[0].rate, "warmup": 5}, "checkpoint": {"every": 0}, "tracking": {"tensorboard": False},
    }  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Figures of held-out slides by task, before the first step and after the last; ``model``: the folder; ``held``:
    the names of those slides."""

    before: Mapping[str, Mapping[str, float]]
    after: Mapping[str, Mapping[str, float]]
    seconds: float
    model: str
    held: tuple[str, ...]


def learn(ground: Ground, specs: Sequence[AnnotationTarget], out: Path, seed: int = 0) -> Score:
    """Train from one configuration, and judge what there was before."""
    from wsi_mmm import api
    from wsi_mmm.training.forward import figures
    from wsi_mmm.training.job import held_out

    raw = configuration(ground, specs, out, seed)
    begun = api.prepare_training(raw)
    before = figures(begun.model.eval(), begun.tasks, held_out(begun, "test"))
    start = time.process_time()
    done = api.train(raw)
    groups = {str(one.feed.source.index.groups[n]) for one in begun.data for n in one.split.test.tolist()}
    return Score(before, done.test, time.process_time() - start, done.model, tuple(sorted(groups)))


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ground, classified = make_ground(Path(folder))
        for name in given.kinds or LESSONS:
            for seed in range(given.seeds):
                known = name == "classify" and seed == 0
                score = classified if known else learn(ground, [LESSONS[name]], Path(folder) / f"{name}-{seed}", seed)
                metric = LESSONS[name].metric
                before, after = (figures[name].get(metric, 0.0) for figures in (score.before, score.after))
                print(f"| {name} | {seed} | {metric} | {before:.3f} | {after:.3f} | {score.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
