"""Objects/s and peak memory of the GeoJSON writer, plain and gzip.

    python tests/benchmarks/bench_geojson.py [--objects 1000000] [--corners 32] [--check]

Each mode runs in a process of its own, so its peak memory is its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from wsi_mmm.outputs.geojson import GeoJSONWriter
from wsi_mmm.types import Objects, TaskInfo

TASK = TaskInfo("nuclei", "instances", ("nucleus", "lymphocyte"), ((60, 120, 220), (220, 60, 60)))


def batch(count: int, corners: int, seed: int) -> Objects:
    """``count`` wobbly ellipses somewhere on a slide of 100,000 x 100,000 px."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    radius = rng.uniform(5, 15, (count, 1)) * (1 + 0.1 * rng.standard_normal((count, corners)))
    centre = rng.uniform(60, 99_900, (count, 1, 2))
    coords = (centre + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)).reshape(-1, 2)
    offsets = np.arange(count + 1, dtype=np.int64)
    anchor = centre[:, 0, ::-1].astype(np.int64)
    measurements = {name: rng.uniform(0, 300, count) for name in ("area_um2", "probability", "circularity")}
    class_index = rng.integers(0, 2, count, dtype=np.int32)
    return Objects("nuclei", coords, offsets * corners, offsets, class_index, anchor, measurements)


def measure(path: Path, objects: int, corners: int) -> None:
    """Write, print the rate. Making the synthetic objects is not counted."""
    spent, busy, size = 0.0, 0.0, min(50_000, objects)
    begin, worked = time.perf_counter(), time.process_time()
    writer = GeoJSONWriter(path, "bench", [TASK], gzip=path.suffix == ".gz")
    for seed in range(objects // size):
        made, made_cpu = time.perf_counter(), time.process_time()
        some = batch(size, corners, seed)
        spent += time.perf_counter() - made
        busy += time.process_time() - made_cpu
        writer.write(some)
    count = writer.close()
    seconds = time.perf_counter() - begin - spent
    cpu = (time.process_time() - worked - busy) / count * 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{path.suffix:9} {count:,} objects, {count / seconds:,.0f} objects/s, {cpu:.0f} µs CPU each (all threads), "
        f"peak {peak:,.0f} MB, file {path.stat().st_size / 1e6:,.0f} MB, "
        f"repaired {writer.repaired}, dropped {writer.dropped}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--corners", type=int, default=32)
    parser.add_argument("--check", action="store_true", help="check every QuPath rule on what was written")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        measure(given.write, given.objects, given.corners)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plain.geojson", "packed.geojson.gz"):
            path = Path(folder) / name
            options = ["--objects", str(given.objects), "--corners", str(given.corners), "--write", str(path)]
            subprocess.run([sys.executable, __file__, *options], check=True)
            if given.check:
                check(path)


def check(path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from helpers.qupath import check_qupath

    begin = time.perf_counter()
    print(f"          {check_qupath(path)} in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
