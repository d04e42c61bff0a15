"""Many runs of a small slide in one long-lived cluster: does anything grow that should not?

    make bench-soak ARGS="--runs 200"

By turns a run that connects by itself (`wsi_mmm.run(scheduler=...)`) and a job that lives on the cluster
(`wsi_mmm.submit`), each into a new folder. After every run, of the client, the scheduler, the nannies and the workers:
memory (resident), open file handles, sockets and threads. The first quarter begins when the cluster is warm.

Bars, last quarter against first: no more handles, sockets or threads (``--slack`` 2, for connections that come and go),
memory at most 5 % and 10 MB more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import wsi_mmm
from helpers.cluster import PlainCluster

FIGURES = ("MB", "handles", "sockets", "threads")
OPTIONS = {"block_tiles": 2}
QUIET = {"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"}
"""Dask's profiler keeps an hour of samples: for the first hour a worker grows by some 0.2 MB a run for it alone."""


@dataclass
class Soak:
    """Samples: by process ("worker 1"), then by figure, one a run."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, processes: dict[str, psutil.Process]) -> None:
        """Take in how all processes stand."""
        for name, process in processes.items():
            kept = self.samples.setdefault(name, {figure: [] for figure in FIGURES})
            for figure, value in zip(FIGURES, stand(process), strict=True):
                kept[figure].append(value)

    def quarters(self, name: str, figure: str) -> tuple[float, float]:
        """Means of the first quarter and of the last one."""
        values = self.samples[name][figure]
        warm = values[warm_up(len(values)) :]
        part = max(1, len(warm) // 4)
        return statistics.fmean(warm[:part]), statistics.fmean(warm[-part:])

    def growing(self, slack: float) -> list[str]:
        """What has grown by more than the bars allow."""
        found = []
        for name in self.samples:
            for figure in FIGURES:
                first, last = self.quarters(name, figure)
                if last > (1.05 * first + 10 if figure == "MB" else first + slack):
                    found.append(f"{name}: {figure} from {first:,.1f} to {last:,.1f}")
        return found


def warm_up(runs: int) -> int:
    """Runs that are not counted."""
    return min(runs - 1, max(2, runs // 20))


def stand(process: psutil.Process) -> tuple[float, float, float, float]:
    """Memory, handles, sockets, threads of a process now."""
    with process.oneshot():
        sockets = len(process.net_connections(kind="all"))
        return process.memory_info().rss / 1e6, process.num_fds(), sockets, process.num_threads()


def processes_of(cluster: PlainCluster) -> dict[str, psutil.Process]:
    """All that live as long as the cluster does, this one included."""
    found = {"client": psutil.Process(), "scheduler": psutil.Process(cluster.scheduler.pid)}
    for number, process in enumerate(cluster.processes[1:], 1):
        found[f"nanny {number}"] = psutil.Process(process.pid)
    for number, pid in enumerate(sorted(cluster.pids().values()), 1):
        found[f"worker {number}"] = psutil.Process(pid)
    return found


def soak(slide: Path, runs: int, workers: int, folder: Path, *, shown: bool = False) -> Soak:
    """So many runs, one after another."""
    found, begun = Soak(), time.monotonic()
    with PlainCluster(folder, workers, env=QUIET) as cluster, cluster.client() as client:
        processes = processes_of(cluster)
        for number in range(runs):
            output = folder / f"out-{number}"
            if number % 2:
                report = wsi_mmm.submit(client, slide, output=output, **OPTIONS).result(600)
            else:
                report = wsi_mmm.run(slide, output=output, scheduler=cluster.address, **OPTIONS)
            found.failed += [f"run {number}: {row.error}" for row in report.slides if row.status != "done"]
            shutil.rmtree(output)
            found.add(processes)
            if shown and number % max(1, runs // 10) == 0:
                print(f"run {number}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    found.seconds = time.monotonic() - begun
    return found


def table(found: Soak) -> str:
    """First quarter and last quarter of everything."""
    lines = ["| process | " + " | ".join(f"{figure}, first and last quarter" for figure in FIGURES) + " |"]
    lines.append("|---" + "|--:" * len(FIGURES) + "|")
    for name in found.samples:
        cells = []
        for figure in FIGURES:
            first, last = found.quarters(name, figure)
            cells.append(f"{first:,.1f}, {last:,.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a small slide (a made-up one)")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slack", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="file for all samples")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        slide = given.slide or made_up(folder)
        found = soak(slide, given.runs, given.workers, folder, shown=True)
    if given.json:
        given.json.write_text(json.dumps(found.samples))
    print(f"{given.runs} runs, {found.seconds:,.0f} s\n\n{table(found)}")
    if wrong := found.failed[:5] + found.growing(given.slack):
        sys.exit("\n".join(f"bar: {reason}" for reason in wrong))


def made_up(folder: Path) -> Path:
    """A slide of one tile or a few."""
    from wsi_mmm.slides.fake import synthetic_slide

    path = folder / "small.tiff"
    synthetic_slide(path, width=640, height=512, nuclei=30)
    return path


if __name__ == "__main__":
    main()
