"""Two Dask workers against one, and the placements of reading, on this machine.

    make bench-workers                                    # the shared slides
    make bench-workers ARGS="--slides a.svs b.svs --j2k c.svs --rounds 3"

``workers``: plain `dask worker` processes of one thread each, the model on one thread: a run of ``--slides`` with one
of them and with two, by turns, after a run that loads the model. Beside it the limit of the machine: the same model on
pixels that are in memory, in one process and in two at once. Objects must be the same.
``placement``: a slide whose codec is slow (``--j2k``) by two workers, without a cache: both read and run the model
(beside); one reads, one runs the model (pool). Each begins with an empty cache.
``fair``: a job of all ``--slides``, and another one of them that comes when the first has a tenth of its tiles, on two
workers: the tiles that each got while both were at work, and that both end with the same objects. Bar: neither has less
than two fifths of them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import wsi_mmm
from helpers.cluster import PlainCluster
from wsi_mmm.slides.fake import synthetic_slide

BAR = 1.85
MODEL_ALONE = """
import sys, time, torch
from wsi_mmm.host_tuning import keep_memory
from wsi_mmm.model.checkpoint import load_model
from wsi_mmm.model.fold import fold_norms
keep_memory()
torch.set_num_threads(1)
model = fold_norms(load_model())[0]
pixels = torch.randint(0, 256, (8, model.card.tile_size, model.card.tile_size, 3), dtype=torch.uint8)
pixels = model.prepare(pixels)
with torch.inference_mode():
    model(pixels)
    print("ready", flush=True)
    sys.stdin.readline()
    until, count = time.monotonic() + float(sys.argv[1]), 0
    while time.monotonic() < until:
        model(pixels)
        count += 8
print(count)
"""


def shared_slides() -> Path:
    """The folder of real slides, if there is one."""
    return Path(os.environ.get("WSI_MMM_TEST_DATA") or "../shared/data") / "slides"


def slides_of(given: argparse.Namespace, folder: Path) -> list[Path]:
    """Those that were named, shared ones, or made-up ones."""
    shared = shared_slides()
    if given.slides:
        return [Path(name) for name in given.slides]
    found = [shared / name for name in ("metaplasia_HE.svs", "metaplasia_trypsin_IHC.svs", "cmu-1-small-region.svs")]
    if all(path.exists() for path in found):  # the larger ones twice: the end of a run, when one worker waits, is short
        links = [folder / f"{number}-{path.name}" for number, path in enumerate([*found[:2], *found])]
        for link in links:
            link.symlink_to(shared.absolute() / link.name.partition("-")[2])
        return links
    made = [folder / f"{seed}.tiff" for seed in range(4)]
    for seed, path in enumerate(made):
        synthetic_slide(path, seed=seed, width=6144, height=6144, nuclei=3000)
    return made


def results(output: Path) -> dict[str, str]:
    """Hashes of the objects of every slide."""
    found = sorted(output.glob("*/result.geojson.gz"))
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def timed(slides: Sequence[Path], output: Path, cluster: PlainCluster, **options: object) -> float:
    """Seconds of a run on the cluster; a slide that fails ends the benchmark."""
    begun = time.perf_counter()
    report = wsi_mmm.run(list(slides), output=output, scheduler=cluster.address, threads=1, **options)
    seconds = time.perf_counter() - begun
    if report.exit_code:
        sys.exit(f"error: {[row.error for row in report.slides if row.error]}")
    return seconds


def alone(processes: int, seconds: float = 8.0) -> float:
    """Tiles/s of the model on pixels in memory, in so many processes at once."""
    words = [sys.executable, "-c", MODEL_ALONE, str(seconds)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(processes)
    ]
    for one in started:
        assert one.stdout is not None
        one.stdout.readline()
    for one in started:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    return sum(int(one.communicate()[0]) for one in started) / seconds


def workers(slides: Sequence[Path], rounds: int, folder: Path) -> bool:
    """Two against one; whether the bar holds."""
    took: dict[int, list[float]] = {1: [], 2: []}
    seen: set[tuple[tuple[str, str], ...]] = set()
    for number in range(rounds):
        for count in (1, 2) if number % 2 == 0 else (2, 1):
            place = folder / f"workers-{number}-{count}"
            place.mkdir()
            with PlainCluster(place, workers=count, threads=1) as cluster:
                for other in range(2 * count):  # every worker loads the model
                    timed(slides[-1:], place / f"warm-{other}", cluster, block_tiles=1)
                took[count].append(timed(slides, place / "out", cluster))
            seen.add(tuple(results(place / "out").items()))
            print(f"{count} worker{'s' * (count > 1)}: {took[count][-1]:.1f} s", flush=True)
    limit = [alone(1), alone(2)]
    one, two = (statistics.median(took[count]) for count in (1, 2))
    print(f"one {one:.1f} s, two {two:.1f} s: {one / two:.2f} x (bar {BAR}); objects {'equal' * (len(seen) == 1)}")
    print(f"limit: the model alone {limit[0]:.2f} tiles/s in one process, {limit[1]:.2f} in two: "
          f"{limit[1] / limit[0]:.2f} x; the run has {one / two / (limit[1] / limit[0]):.2f} of it")  # fmt: skip
    return one / two >= BAR and len(seen) == 1


def placements(slide: Path, mpp: float | None, rounds: int, folder: Path) -> bool:
    """Both of them on one slide; whether the objects are the same."""
    ways = {
        "beside": ((), ()), "pool": (("--resources", "GPU=1"), ("--resources", "CPU=1")),
    }  # fmt: skip
    took: dict[str, list[float]] = {way: [] for way in ways}
    seen: set[tuple[tuple[str, str], ...]] = set()
    for number in range(rounds):
        for way, labels in ways.items():
            place = folder / f"{way}-{number}"
            place.mkdir()
            with PlainCluster(place, workers=1, threads=1, options=labels[0]) as cluster:
                cluster.add_worker(*labels[1])
                with cluster.client() as client:
                    client.wait_for_workers(2, timeout=90)
                small = folder / "small.tiff"
                if not small.exists():
                    synthetic_slide(small, width=2048, height=1536)
                timed([small], place / "warm", cluster, block_tiles=1)
                options = {"placement": way, "cache": str(place / "cache"), "mpp_override": mpp}
                took[way].append(timed([slide], place / "out", cluster, **options))
            seen.add(tuple(results(place / "out").items()))
            print(f"{way}: {took[way][-1]:.1f} s", flush=True)
    print(", ".join(f"{way} {statistics.median(values):.1f} s" for way, values in took.items()), end="")
    print(f"; objects {'equal' if len(seen) == 1 else 'DIFFER'}")
    return len(seen) == 1


def fair(slides: Sequence[Path], folder: Path) -> bool:
    """Two jobs at once; whether both get their share."""
    places = [folder / "fair-first", folder / "fair-second"]
    places[0].mkdir()
    with PlainCluster(places[0], workers=2, threads=1) as cluster, cluster.client() as client:
        for number in range(4):
            timed(slides[-1:], folder / f"fair-warm-{number}", cluster, block_tiles=1)
        options = {"block_tiles": 2, "threads": 1}
        jobs = [wsi_mmm.submit(client, list(slides), output=places[0] / "out", **options)]
        while jobs[0].progress.fraction < 0.1 or jobs[0].progress.slides_total == 0:
            time.sleep(0.5)
        jobs.append(wsi_mmm.submit(client, list(slides), output=places[1] / "out", **options))
        while jobs[1].progress.tiles_done == 0:
            time.sleep(0.2)
        before = [job.progress.tiles_done for job in jobs]
        while not any(job.done for job in jobs):
            after = [job.progress.tiles_done for job in jobs]
            time.sleep(0.5)
        reports = [job.result(3600) for job in jobs]
    tiles = [b - a for a, b in zip(before, after, strict=True)]
    share, same = min(tiles) / max(1, sum(tiles)), results(places[0] / "out") == results(places[1] / "out")
    failed = any(report.exit_code for report in reports)
    print(f"two jobs at once: {tiles[0]} and {tiles[1]} tiles while both were at work, the lesser has {share:.2f}; "
          f"objects {'equal' if same else 'DIFFER'}{', slides FAILED' * failed}")  # fmt: skip
    return share >= 0.4 and same and not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", nargs="*", help="the smallest last")
    parser.add_argument("--j2k", type=Path, help="JPEG 2000 slide (a shared one, or one drawn for the purpose)")
    parser.add_argument("--j2k-mpp", type=float, help="its micrometres per pixel, where it does not say")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["workers", "placement", "fair"])
    given = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = slides_of(given, folder)
        if given.only in (None, "workers"):
            good &= workers(slides, given.rounds, folder)
        if given.only in (None, "fair"):
            good &= fair(slides, folder)
        if given.only in (None, "placement"):
            slide, mpp = given.j2k or shared_slides() / "tcga-cr-7395-01a-01-ts1.svs", given.j2k_mpp
            if not given.j2k and slide.exists():
                mpp = 0.25  # it does not say so itself
            elif not slide.exists():
                slide = folder / "j2k.tiff"
                synthetic_slide(slide, width=8192, height=6144, variant="jpeg2000")
            good &= placements(slide, mpp, given.rounds, folder)
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
