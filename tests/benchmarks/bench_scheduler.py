"""A slide through the whole street: tiles/s, share of wall time the model was busy, peak memory of the process tree.

    python tests/benchmarks/bench_scheduler.py SLIDE [--workers 0] [--runs 3] [-- any option of `wsi-mmm run`]

Every run is a process of its own with an empty output folder; memory is sampled over the process and its children, as
PSS (pages that processes share are counted once). Figures are the medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

SAMPLE = 0.1  # seconds


def tree_mb(process: psutil.Process) -> float:
    """Proportional memory of a process and everything below it, MB; processes that just ended count as nothing."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak MB of the process tree of ``command``, which must succeed."""
    peak, begin = 0.0, time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        process = psutil.Process(running.pid)
        while not ended.wait(SAMPLE):
            try:
                peak = max(peak, tree_mb(process))
            except psutil.Error:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = running.wait()
    seconds = time.perf_counter() - begin
    ended.set()
    watcher.join()
    if code:
        sys.exit(f"error: {' '.join(command)} ended with exit code {code}")
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3)
    given, options = parser.parse_known_args()
    rows = []
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory() as output:
            run = [sys.executable, "-m", "wsi_mmm", "run", str(given.slide), "-o", output]
            seconds, peak = measure([*run, "--workers", str(given.workers), *(o for o in options if o != "--")])
            [slide] = json.loads((Path(output) / "report.json").read_text())["slides"]
        rows.append(slide | {"wall": seconds, "peak_tree_mb": peak})
        print(
            f"{slide['id']}: {slide['tiles']:,} tiles, {slide['objects']:,} objects, {slide['seconds']:.1f} s "
            f"({seconds:.1f} s with start-up), {slide['tiles_per_s']:.2f} tiles/s, busy {slide['busy_share']:.3f}, "
            f"peak {peak:,.0f} MB",
            flush=True,
        )
    names = ("wall", "seconds", "tiles_per_s", "busy_share", "peak_tree_mb")
    print("median: " + ", ".join(f"{name} {statistics.median(row[name] for row in rows):,.3f}" for name in names))


if __name__ == "__main__":
    main()
