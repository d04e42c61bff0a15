"""Features of published encoders against the networks alone: one encoder, and two in one pass over the pixels.

    make bench-embed ARGS="SLIDE"       python tests/benchmarks/bench_embed.py SLIDE [--tiles 240] [--rounds 2]

Random weights, one process, everything in turns. First several sizes of batches and numbers of threads are tried on
resident batches: normalised floats that are in memory, nothing but the network. Then, in each round, for each encoder
  resident   its best choice again, tiles per second
  alone      ``embed``: tiles over the feature stage, from the first tile asked for to the last vector stored
and at last both encoders in one pass, whose stage is compared with the sum of their model times (the time in which the
model computed in each pass alone, as reports tell it) and, more strictly, with tiles over the resident rate of each.
Networks stay loaded from the first pass of an encoder on, which is a short one and not counted: its line says what
loading adds. Ratios are of one round, so that a busy host counts on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_run import plan, region

from wsi_mmm import embed, embed_encoders
from wsi_mmm.host_tuning import cpu_count, tune_process
from wsi_mmm.model.checkpoint import load_encoder
from wsi_mmm.model.fold import fold_norms, seeded_noise
from wsi_mmm.model.multitask import MultiTaskModel

SUM, STRICT = "pass / sum of their model times", "pass / sum of tiles over resident rates"
CHOICES = ((8, 1), (16, 1), (32, 1), (32, 0), (64, 0))  # tiles in a batch, intra-op threads (0: all cores)


def resident_rate(model: MultiTaskModel, side: int, batch: int, intra: int, seconds: float) -> float:
    """Tiles per second of the network on batches that are ready, as many threads as cores / ``intra``."""
    intra = intra or cpu_count()
    threads = max(1, cpu_count() // intra)
    ready = threading.Barrier(threads)
    times = [0.0] * threads
    rounds = [0]

    def compute(number: int) -> None:
        torch.set_num_threads(intra)
        pixels = model.prepare(seeded_noise(batch, side, side))
        with torch.inference_mode():
            begin = time.perf_counter()
            model.features(pixels)  # warms up, and says how many fit into the time
            if number == 0:
                rounds[0] = max(1, round(seconds / (time.perf_counter() - begin)))
            ready.wait()
            begin = time.perf_counter()
            for _ in range(rounds[0]):
                model.features(pixels)
            times[number] = time.perf_counter() - begin

    workers = [threading.Thread(target=compute, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return threads * batch * rounds[0] / statistics.mean(times)


class PassTimes(NamedTuple):
    """Seconds of a pass: from the first tile asked for to the last vector stored, and those in which a model ran."""

    stage: float
    model: float


class Bench:
    """The slide, its tiles and the options of all passes."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.passes = given, folder, 0
        boxes = plan(given.slide, given.mpp, given.size, given.tiles)
        self.tissue = region(boxes, folder / "tiles.geojson")
        self.few = region(boxes[: 8 * cpu_count()], folder / "few.geojson")
        self.tiles = len(boxes)

    def options(self, tissue: str) -> dict[str, Any]:
        """Keyword arguments of a pass."""
        return {"tissue": tissue, "mpp": self.given.mpp, "tile_size": self.given.size, "weights": "random"}

    def run_pass(self, encoders: Sequence[str], tissue: str) -> PassTimes:
        """The times of one pass."""
        self.passes += 1
        output = self.folder / str(self.passes)
        if len(encoders) == 1:
            report = embed(self.given.slide, encoders[0], output=output, **self.options(tissue))
        else:
            reports = embed_encoders(self.given.slide, encoders, output=output, **self.options(tissue))
            assert all(one.exit_code == 0 for one in reports.values()), reports
            report = reports[encoders[0]]
        assert report.exit_code == 0, report
        [slide] = report.slides
        return PassTimes(float(slide.extra["features_s"]), slide.busy_share * slide.seconds)


def best_choice(model: MultiTaskModel, side: int, given: argparse.Namespace) -> tuple[int, int]:
    """The size of batch and the intra-op threads that are fastest on resident batches."""
    rates = {(b, n): resident_rate(model, side, b, n, given.seconds / 2) for b, n in CHOICES}
    for (batch, intra), rate in rates.items():
        print(f"  batch {batch:3d}, {intra or cpu_count()} intra-op: {rate:.1f} tiles/s", flush=True)
    return max(rates, key=lambda choice: rates[choice])


def spread(values: Sequence[float], digits: int) -> str:
    """Minimum, median and maximum."""
    return " / ".join(f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))


def table(found: dict[str, list[float]], encoders: Sequence[str]) -> str:
    """Everything as Markdown, for docs/performance.md."""
    lines = ["| tiles/s, ratios | min / median / max |", "|---|--:|"]
    for name in encoders:
        lines.append(f"| `{name}`, resident batch | {spread(found[f'{name} resident'], 1)} |")
        lines.append(f"| `{name}`, `embed`, feature stage | {spread(found[f'{name} stage'], 1)} |")
        lines.append(f"| `{name}`, stage / resident | {spread(found[f'{name} ratio'], 3)} |")
    lines.append(f"| both in one pass, tiles/s | {spread(found['two'], 1)} |")
    lines += [f"| both in one {key} | {spread(found[key], 3)} |" for key in (SUM, STRICT)]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--encoder", action="append", help="two of them; the first is judged alone")
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--tiles", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a resident measurement")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    encoders = given.encoder or ["lunit-s16", "lunit-resnet50-bt"]
    tune_process()
    torch.set_num_threads(cpu_count())
    found: dict[str, list[float]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(given, Path(name))
        models, choices = {}, {}
        for encoder in encoders:
            model = fold_norms(load_encoder(encoder, "random"))[0]
            side = model.card.encoder.input_px or given.size
            print(f"{encoder}, resident batches:", flush=True)
            models[encoder], choices[encoder] = (model, side), best_choice(model, side, given)
        for encoder in encoders:
            first = bench.run_pass([encoder], bench.few).stage
            print(f"{encoder}: first pass, loading, {8 * cpu_count()} tiles: {first:.1f} s", flush=True)
        for number in range(given.rounds):
            model_times, resident_times = 0.0, 0.0
            for encoder in encoders:
                rate = resident_rate(*models[encoder], *choices[encoder], given.seconds)
                one = bench.run_pass([encoder], bench.tissue)
                model_times, resident_times = model_times + one.model, resident_times + bench.tiles / rate
                found.setdefault(f"{encoder} resident", []).append(rate)
                found.setdefault(f"{encoder} stage", []).append(bench.tiles / one.stage)
                found.setdefault(f"{encoder} ratio", []).append(bench.tiles / one.stage / rate)
            both = bench.run_pass(encoders, bench.tissue)
            found.setdefault("two", []).append(bench.tiles / both.stage)
            found.setdefault(SUM, []).append(both.stage / model_times)
            found.setdefault(STRICT, []).append(both.stage / resident_times)
            last = ", ".join(f"{key} {values[-1]:.3f}" for key, values in found.items())
            print(f"round {number + 1}: {last}", flush=True)
    print(f"\n{bench.tiles} tiles of {given.size} px at {given.mpp:g} mpp, {cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}, {time.perf_counter() - began:.0f} s\n")  # fmt: skip
    print(table(found, encoders))
    alone, two = (statistics.median(found[key]) for key in (f"{encoders[0]} ratio", SUM))
    print(f"\n{encoders[0]}: stage / resident {alone:.3f} (bar: at least 0.90)")
    print(f"two in one {SUM} {two:.3f} (bar: at most 1.05)")
    print(json.dumps({"encoders": encoders, "choices": choices, **found}))


if __name__ == "__main__":
    main()
