"""Does learning other tasks first help? The experiment of docs/transfer.md, in one command.

python pipelines/transfer/run.py --data data --out runs/transfer

``--data`` holds ``nuclei/dsb2018_stained_nuclei.zip`` and ``slides/`` with the files that slides.csv names.
Each target is trained from several beginnings, with the encoder fine-tuned or frozen, on shares of its training items,
with each seed; the held-out part is always the same. Run again to go on: what is done is kept. Writes ``transfer.csv``
(every figure), ``transfer.md`` (the tables) and ``transfer.png`` into ``--out``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import wsi_mmm
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.training.config import parse
from wsi_mmm.training.plot import Panel, draw_panels

HERE = Path(__file__).resolve().parent
PICTURES = 12  # of a step of the tasks learnt first, however many these are
MODES = {"fine-tuned": 0, "frozen": 5}  # depths that do not learn: none, or the encoder's stem and four stages
TISSUE = 0.01  # least share of tissue of a tile
HELD = 5  # of so many images one is held out
LEARNT, JUDGED, SIDE = 100, 50, 96  # tiles of a slide, and their side in px


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted in the end, the metric that judges it, and by way the tasks that are learnt first."""

    name: str
    metric: str
    ways: Mapping[str, tuple[str, ...]]


TARGETS = (
    Target("nuclei", "f1", {"scratch": (), "cells": ("cells",), "joint": ("cells", "stain")}),
    Target("slide", "balanced_accuracy", {"scratch": (), "nuclei": ("nuclei",), "joint": ("nuclei", "cells")}),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A training of a target: ``items`` are ``percent`` of its training items, ``value`` is of the held-out part."""

    target: str
    way: str
    mode: str
    percent: float
    seed: int
    items: int
    value: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the data are, where all goes, and what is on top of the configurations: ``times`` their steps."""

    data: Path
    out: Path
    percents: tuple[float, ...]
    seeds: int
    settings: tuple[str, ...] = ()
    times: int = 1


# ---------------------------------------------------------------- the data


def prepare(plan: Plan, synthetic: int) -> None:
    """Everything that the configurations read below ``<out>/data``; nothing when it is there."""
    done = plan.out / "data" / "done.json"
    if done.exists():
        return
    facts = {"nuclei": unpack(plan), "tiles": cut(plan), "cells": invent(plan, synthetic)}
    done.write_text(json.dumps(facts, indent=1) + "\n")


def unpack(plan: Plan) -> dict[str, int]:
    """Images and labels below train and test; every fifth by name is held out, and names are hashes."""
    counts = {"train": 0, "test": 0}
    with zipfile.ZipFile(plan.data / "nuclei" / "dsb2018_stained_nuclei.zip") as held:
        names = sorted(name for name in held.namelist() if name.startswith("images/") and name.endswith(".png"))
        for number, name in enumerate(names):
            part = "train" if number % HELD else "test"
            counts[part] += 1
            label = name.replace("images/", "labels/")
            image = Image.open(io.BytesIO(held.read(name))).convert("RGB")
            numbers = np.asarray(Image.open(io.BytesIO(held.read(label)))).astype(np.int32)
            image.save(placed(plan, f"nuclei/images/{part}/{Path(name).stem}.bmp"))  # quicker to read than PNG
            np.save(placed(plan, f"nuclei/labels/{part}/{Path(name).stem}.npy"), numbers)
    return counts


def cut(plan: Plan) -> dict[str, int]:
    """Tiles with tissue of each slide: learnt from the upper 60 %, judged in the lowest 30 %, nothing between."""
    counts = {}
    with (HERE / "slides.csv").open() as file:
        slides = list(csv.DictReader(file))
    for row in slides:
        with wsi_mmm.open_slide(
            str(plan.data / "slides" / row["file"]), float(row["mpp"]) if row["mpp"] else None
        ) as slide:
            found = [
                pair
                for some in wsi_mmm.stream_tiles(slide, 0.5, SIDE, min_tissue=TISSUE)
                for pair in zip(some.xy, some.pixels, strict=True)
            ]
        found.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][0])))
        ends = round(len(found) * 0.6), round(len(found) * 0.7)
        for part, some, most in (("train", found[: ends[0]], LEARNT), ("test", found[ends[1] :], JUDGED)):
            for number in np.unique(np.linspace(0, len(some) - 1, most).round().astype(int)).tolist():
                (x, y), pixels = some[number]
                Image.fromarray(pixels).save(placed(plan, f"tiles/{row['slide']}/{part}/{x}_{y}.bmp"))
        counts[row["slide"]] = len(found)
    return counts


def invent(plan: Plan, count: int) -> int:
    """Made-up slides with an outline of every nucleus; how many of these there are."""
    total = 0
    for seed in range(count):
        path = placed(plan, f"synthetic/s{seed}.tiff")
        target = synthetic_slide(path, seed, width=1024, height=1024, nuclei=500)
        total += len(target.polygons)
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
                "properties": {"objectType": "detection", "classification": {"name": "cell"}},
            }
            for ring in target.polygons.round(2).tolist()
        ]
        path.with_suffix(".geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return total


def placed(plan: Plan, name: str) -> Path:
    """A file below ``<out>/data``, in a folder that is there."""
    path = plan.out / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---------------------------------------------------------------- the trainings


def recipe(plan: Plan, name: str) -> dict[str, Any]:
    """A configuration of this folder, its places being those of ``plan``."""
    roots = {"runs/transfer": plan.out, "data/slides": plan.data / "slides", "pipelines/transfer": HERE}

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(one) for key, one in value.items()}
        if isinstance(value, list):
            return [moved(one) for one in value]
        for root, place in roots.items():
            if isinstance(value, str) and value.startswith(f"{root}/"):
                return f"{place}{value.removeprefix(root)}"
        return value

    found: dict[str, Any] = moved(tomllib.loads((HERE / f"{name}.toml").read_text()))
    return {**found, "steps": found["steps"] * plan.times}


def begun(plan: Plan, tasks: Sequence[str], seed: int) -> str:
    """The folder of a model that has learnt ``tasks``: as many pictures, whatever their number."""
    raw = recipe(plan, "source")
    raw["task"] = [task for task in raw["task"] if task["name"] in tasks]
    raw["data"] = [data for data in raw["data"] if not taught(data).isdisjoint(tasks)]
    for data in raw["data"]:
        data["batch"] = PICTURES // len(tasks)
    raw["out"] = f"{plan.out}/source/{'-'.join(tasks)}-seed-{seed}"
    settings = [*plan.settings, f"seed={seed}"]
    card = Path(raw["out"]) / "model" / "card.json"
    if card.exists() and parse(json.loads(card.read_text())["data"]["configuration"]) == parse(raw, settings):
        return str(card.parent)  # also where options have come since then
    return wsi_mmm.train(raw, settings=settings).model


def taught(data: Mapping[str, Any]) -> set[str]:
    """The tasks of a data set of the recipe."""
    return {data["task"]} if "task" in data else set(data["slides"]["truth"])


def trained(plan: Plan, target: Target, way: str, seed: int) -> Iterator[Row]:
    """A target from one beginning: all shares, fine-tuned and frozen."""
    start = begun(plan, target.ways[way], seed) if target.ways[way] else None
    for mode, depths in MODES.items():
        settings = [*plan.settings, f"seed={seed}", f"optim.frozen={depths}"]
        settings.append(f"out={plan.out}/{target.name}/{way}-{mode}")
        settings += [f"model.start={start}"] if start else []
        raw = recipe(plan, target.name)
        curve = wsi_mmm.train_fractions(
            raw, percents=plan.percents, seeds=1, metric=f"target.{target.metric}", settings=settings
        )
        for row in curve.rows():
            yield Row(target.name, way, mode, row.percent, seed, row.items, row.mean)


# ---------------------------------------------------------------- tables and plot


def write(plan: Plan, rows: Sequence[Row]) -> None:
    """Tables and plot of what is known so far."""
    with (plan.out / "transfer.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([field.name for field in fields(Row)])
        table.writerows(astuple(row) for row in rows)
    targets = [target for target in TARGETS if any(row.target == target.name for row in rows)]
    (plan.out / "transfer.md").write_text("\n".join(line for target in targets for line in tables(target, rows)))
    panels = [
        Panel(f"{target.name}, {mode}", target.metric, curves(target, mode, rows))
        for target, mode in product(targets, MODES)
    ]
    try:
        draw_panels(plan.out, "transfer", panels, columns=len(MODES))
    except wsi_mmm.WsiError as error:
        print(error)


def values(rows: Sequence[Row], target: str, way: str, mode: str) -> dict[float, dict[int, Row]]:
    """Percent -> seed -> training."""
    mine = [row for row in rows if (row.target, row.way, row.mode) == (target, way, mode)]
    return {p: {row.seed: row for row in mine if row.percent == p} for p in sorted({row.percent for row in mine})}


def curves(target: Target, mode: str, rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """Way -> percent -> the figure of each seed; of those that were run."""
    found = {way: values(rows, target.name, way, mode) for way in target.ways}
    return {
        way: {percent: [row.value for row in some.values()] for percent, some in held.items()}
        for way, held in found.items()
        if held
    }


def tables(target: Target, rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: mean and standard deviation over the seeds; then joint minus the others, pair by pair."""
    items = {row.percent: row.items for row in rows if row.target == target.name}
    head = " | ".join(f"{percent:g} % ({items[percent]})" for percent in sorted(items))
    rule = "|---" * (len(items) + 2) + "|"
    yield from (f"**{target.name}**, {target.metric}", "", f"| start | encoder | {head} |", rule)
    for mode, way in product(MODES, target.ways):
        mine = values(rows, target.name, way, mode)
        if mine:
            yield f"| {way} | {mode} | {' | '.join(told(mine.get(percent, {})) for percent in sorted(items))} |"
    yield from ("", f"| joint minus | encoder | {head} |", rule)
    for mode, way in product(MODES, target.ways):
        joint, other = (values(rows, target.name, one, mode) for one in ("joint", way))
        if joint and other and way != "joint":
            cells = [differing(joint.get(percent, {}), other.get(percent, {})) for percent in sorted(items)]
            yield f"| {way} | {mode} | {' | '.join(cells)} |"
    yield ""


def told(some: Mapping[int, Row]) -> str:
    """ "0.512 ± 0.031" over the seeds."""
    if not some:
        return "-"
    found = [row.value for row in some.values()]
    return f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else f"{found[0]:.3f}"


def differing(some: Mapping[int, Row], other: Mapping[int, Row]) -> str:
    """ "+0.123 (3 of 3)": the mean difference of the same seeds, and of how many it is above 0."""
    found = [some[seed].value - other[seed].value for seed in sorted(some.keys() & other.keys())]
    return f"{np.mean(found):+.3f} ({sum(one > 0 for one in found)} of {len(found)})" if found else "-"


def main() -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with nuclei/ and slides/")
    parser.add_argument("--out", default="runs/transfer", type=Path, help="folder of everything")
    parser.add_argument("--prepare", action="store_true", help="make the data, train nothing")
    parser.add_argument("--only", choices=[target.name for target in TARGETS], help="this target")
    parser.add_argument("--ways", help="these starts, such as scratch,joint")
    parser.add_argument("--percents", default="1,10,50,100", help="shares of the target's training items")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--synthetic", type=int, default=8, help="number of synthetic slides")
    parser.add_argument("--times", type=int, default=1, help="so many times the steps of all trainings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="on top of all configurations")
    args = parser.parse_args()
    percents = tuple(float(part) for part in args.percents.split(","))
    plan = Plan(args.data, args.out, percents, args.seeds, tuple(args.set), args.times)
    chosen = [target for target in TARGETS if args.only in (None, target.name)]
    try:
        prepare(plan, args.synthetic)
        rows: list[Row] = []
        for target, seed in product(chosen if not args.prepare else [], range(plan.seeds)):
            for way in [one for one in target.ways if not args.ways or one in args.ways.split(",")]:
                for row in trained(plan, target, way, seed):
                    rows.append(row)
                    print(
                        f"{row.target} {row.way} {row.mode} {row.percent:g} % seed {seed}: {row.value:.4f}", flush=True
                    )
            write(plan, rows)
    except wsi_mmm.WsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
