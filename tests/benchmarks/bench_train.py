"""The training loop fed from slides against the same loop on batches that are in memory: steps/s of both, their ratio.

    make bench-train          make bench-train ARGS="SLIDE SLIDE ... --size 256 --batch 16 --threads 2 --device cuda"

Without slides: two synthetic ones with their nuclei as annotations. Tasks: `instances` where there are annotations,
and `classify` (which slide it is), both of tiles at --mpp, drawn at random all over the slides; flips, turns by right
angles (--angle, --scale: free ones) and augmentation of colour on the device, which both ways pay alike. Everything
else is `training.fit` as users run it. The ways take turns within one process, ``--rounds`` times ``--steps`` steps
each after two that are not counted; medians of the rounds are compared. ``alone``: what making one micro-batch costs
when nothing else runs, on one thread. On a CPU that the model fills, the ratio is at best that of the CPU seconds,
which other programs on the machine disturb less than the wall's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from wsi_mmm.model.card import DecoderCard, EncoderCard, ModelCard, TaskCard
from wsi_mmm.model.checkpoint import build_model
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.tasks import Task, make_task
from wsi_mmm.training import fit as fitting
from wsi_mmm.training.augment import Augment
from wsi_mmm.training.data.annotation_targets import AnnotationTarget
from wsi_mmm.training.data.buckets import same_names
from wsi_mmm.training.data.slides import SlideItem, TileSampling, slide_tiles
from wsi_mmm.training.fit import FitPlan, TrainingListener
from wsi_mmm.training.loader import DataFeed, LoadPlan, TrainBatch, batches, make_batch, make_preprocess
from wsi_mmm.training.optim import OptimPlan
from wsi_mmm.training.policy import plan_step
from wsi_mmm.training.ranks import Ranks
from wsi_mmm.training.warp import Change

UNCOUNTED = 2
Steps = Iterable[tuple[TrainBatch, ...]]


def options() -> argparse.Namespace:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("slides", nargs="*", help="whole-slide images; none: synthetic ones")
    given.add_argument("--mpp", type=float, default=0.5)
    given.add_argument("--size", type=int, default=256)
    given.add_argument("--batch", type=int, default=16)
    given.add_argument("--encoder", default="resnet18")
    given.add_argument("--steps", type=int, default=6)
    given.add_argument("--rounds", type=int, default=3)
    given.add_argument("--threads", type=int, default=2, help="that make batches")
    given.add_argument("--cores", type=int, default=os.cpu_count(), help="that the model computes on")
    given.add_argument("--angle", type=float, default=0.0)
    given.add_argument("--scale", type=float, default=0.0)
    given.add_argument("--device", default="cpu")
    given.add_argument("--precision", choices=["full", "bf16", "fp16"], default="full")
    return given.parse_args()


def annotated_slides(folder: Path) -> list[SlideItem]:
    """Two synthetic slides of 4096 x 4096 px with their nuclei as GeoJSON."""
    items = []
    for seed in (1, 2):
        target = synthetic_slide(folder / f"{seed}.tiff", seed, width=4096, height=4096, nuclei=6000)
        features = [
            {"type": "Feature", "properties": {"classification": {"name": "nucleus"}}, "geometry": ring(outline)}
            for outline in target.polygons.tolist()
        ]
        (folder / f"{seed}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        items.append(
            SlideItem(f"s{seed}", str(folder / f"{seed}.tiff"), annotations=str(folder / f"{seed}.geojson"),
                      targets={"which": seed % 2})
        )  # fmt: skip
    return items


def ring(outline: list[list[float]]) -> dict[str, object]:
    """An outline (points x, y) as a GeoJSON polygon."""
    return {"type": "Polygon", "coordinates": [[*outline, outline[0]]]}


def model_of(given: argparse.Namespace, classes: int, annotated: bool) -> tuple[ModelCard, dict[str, Task]]:
    names, grey = tuple(f"c{i}" for i in range(classes)), ((128, 128, 128),)
    cards = [
        TaskCard(name="which", kind="classify", head="vector", outputs=classes, classes=names, colors=grey * classes),
        TaskCard(name="nuclei", kind="instances", head="map", outputs=4, classes=("nucleus",), colors=grey),
    ][: 1 + annotated]  # fmt: skip
    card = ModelCard(
        name="bench", encoder=EncoderCard(name=given.encoder), decoder=DecoderCard(), mpp=given.mpp,
        tile_size=given.size, overlap=0, mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2), tasks=tuple(cards),
    )  # fmt: skip
    return card, {one.name: make_task(one) for one in cards}


def paces(run: Callable[[Steps, int, Callable[[object], None]], None], steps: Steps, count: int) -> tuple[float, float]:
    """Steps/s of ``count`` steps after those that are not counted, and the process's CPU seconds for each."""
    stamps: list[tuple[float, float]] = []

    def stamp(_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stamps.append((time.perf_counter(), time.process_time()))

    run(steps, count + UNCOUNTED, stamp)
    (wall, cpu), (wall_end, cpu_end) = stamps[UNCOUNTED - 1], stamps[-1]
    return count / (wall_end - wall), (cpu_end - cpu) / count


def main() -> None:
    given = options()
    torch.set_num_threads(given.cores)  # `make` sets one for tests; here the model takes all there are
    with tempfile.TemporaryDirectory() as folder:
        items = (
            [SlideItem(f"s{i}", path, targets={"which": i}) for i, path in enumerate(given.slides)]
            or annotated_slides(Path(folder))
        )  # fmt: skip
        annotated = not given.slides
        specs = [AnnotationTarget("nuclei", "instances", same_names(("nucleus",)), complete=True)] if annotated else []
        source = slide_tiles("tiles", items, TileSampling(given.mpp, tile=given.size), specs)
        card, tasks = model_of(given, len(items), annotated)
        feed = DataFeed(source, given.batch)
        plan = LoadPlan(given.size, threads=given.threads, change=Change(angle=given.angle, scale=given.scale))
        model, ranks = build_model(card), Ranks(device=torch.device(given.device))

        def run(steps: Steps, count: int, stamp: Callable[[object], None]) -> None:
            fit_plan = FitPlan(count, optim=OptimPlan(precision=given.precision))
            made = fitting.TrainingFeed(lambda _: steps, make_preprocess(Augment()))
            fitting.fit(model, tasks, made, plan=fit_plan, callbacks=TrainingListener(on_step=stamp), ranks=ranks)
            model.train()

        begin = time.perf_counter()
        draws = [d for step in range(3) for d in plan_step([feed.measure], policy="cyclic", seed=1, step=step)]
        for draw in draws:
            make_batch(feed, tasks, draw=draw, plan=plan)
        alone = (time.perf_counter() - begin) / len(draws)
        found: dict[str, list[tuple[float, float]]] = {"memory": [], "slides": []}
        for number in range(given.rounds):
            first, count = 1000 * number, given.steps + UNCOUNTED
            # The very batches of the stream: both ways compute the same. It goes on, so that it does not run dry.
            held = list(batches([feed], tasks, plan=plan, steps=range(first, first + count), device=ranks.device))
            stream = batches([feed], tasks, plan=plan, steps=range(first, first + count + 99), device=ranks.device)
            ways: dict[str, Steps] = {"memory": held, "slides": stream}
            for way in sorted(ways, reverse=number % 2 == 1):  # each is first every other round
                found[way].append(paces(run, ways[way], given.steps))
        report(given, found, alone)


def report(given: argparse.Namespace, found: dict[str, list[tuple[float, float]]], alone: float) -> None:
    device = torch.cuda.get_device_name() if given.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    print(f"{device}, {given.encoder}, {given.batch} x {given.size} px, {given.precision}")
    print(f"the model on {given.cores} threads, batches by {given.threads}")
    print(f"a micro-batch alone: {alone * 1000:.0f} ms on one thread")
    middle = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()}
    for way, rows in found.items():
        wall, cpu = middle[way]
        shown = ", ".join(f"{value:.3f}" for value, _ in rows)
        print(
            f"{way:7} {wall:.3f} steps/s ({wall * given.batch:.1f} images/s), CPU {cpu:.2f} s a step; rounds: {shown}"
        )
    wall, cpu = middle["slides"][0] / middle["memory"][0], middle["memory"][1] / middle["slides"][1]
    print(f"ratio   {wall:.3f}; by CPU seconds {cpu:.3f}")


if __name__ == "__main__":
    main()
