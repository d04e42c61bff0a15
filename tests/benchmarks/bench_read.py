"""Reading, side by side: ours, every peer that is installed, and the limit, in turns within one run.

    make bench-read                                     the largest shared slide, else a synthetic gigapixel
    make bench-read ARGS="SLIDE --rounds 7 --picture docs/images/read.png"
    make bench-read ARGS="SLIDE --only s3-delay --only faults --s3 s3://bucket/slide.svs"
    deploy/services/with.sh make bench-read             the same with S3 and JuiceFS, where the slide is put first

Peers come with `pip install -e ".[bench]"`; what is missing is left out and named. Every contestant's pixels are
compared with ours first. Handles are opened before the clock starts; the page cache is warm for all. Figures are the
medians of the rounds, in tiles per second. Prints a Markdown table per scenario, then one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("VIPS_CONCURRENCY", "1")  # one thread per handle, for everybody

import numpy as np
from read_peers import (
    LIMIT,
    OURS,
    PEERS,
    Contestant,
    Job,
    NotForThisError,
    native_tiles,
    ours,
    streamed,
    the_limit,
)
from read_report import Row, draw, markdown
from read_services import proxied, put_on_services

from wsi_mmm.slides import Slide, open_slide
from wsi_mmm.tiles.grid import blocks, make_grid, tile_xy
from wsi_mmm.tiles.tissue import select_tiles, tissue_mask

ROOT = Path(__file__).resolve().parents[2]
CHECKED = 48  # tiles compared with ours before anything is timed
SAME, RESIZED = 2.0, 8.0  # grey levels that pixels may differ by on average: another decoder, another resampling
J2K = "tcga-cr-7395-01a-01-ts1.svs"


# ---------------------------------------------------------------- what is read


def slides_folder() -> Path:
    return Path(os.environ.get("WSI_MMM_TEST_DATA") or ROOT.parent / "shared" / "data") / "slides"


def default_slide(folder: str) -> str:
    """The largest shared slide; where there is none, a gigapixel drawn into ``folder``."""
    found = sorted(slides_folder().glob("*.svs"), key=lambda path: path.stat().st_size)
    return str(found[-1]) if found else synthetic(Path(folder) / "gigapixel.tiff")


def synthetic(path: Path) -> str:
    """A drawing of 8,192 px, repeated to 32,768 x 32,768 px."""
    from wsi_mmm.slides.synthetic import synthetic_image
    from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff

    part, _ = synthetic_image(1, width=8192, height=8192, mpp=0.25, nuclei=20_000)
    whole = np.memmap(path.with_suffix(".raw"), np.uint8, "w+", shape=(32768, 32768, 3))
    for y in range(0, 32768, 8192):
        whole[y : y + 8192] = np.tile(part, (1, 4, 1))
    levels = [whole, np.ascontiguousarray(whole[::4, ::4]), np.ascontiguousarray(whole[::16, ::16])]
    write_tiff(path, levels, TiffForm(quality=75, mpp=0.25))
    path.with_suffix(".raw").unlink()
    return str(path)


def make_job(path: str, mpp: float, *, tile: int, overlap: int = 0, most: int) -> Job:
    """At most ``most`` tissue tiles of the slide, contiguous in the order of blocks, from the middle. 0: all."""
    with open_slide(path) as opened:
        slide = opened if opened.info.mpp_x else Slide(opened.reader, 0.25)
        info = slide.info
        factor = mpp if mpp > 0 else -mpp * float(info.mpp_x or 0)  # negative: times the native mpp
        grid = make_grid(info, factor, tile=tile, overlap=overlap)
        index = np.concatenate([b.index for b in blocks(grid, select_tiles(grid, tissue_mask(slide)), 8)])
    inside = (index[:, 0] * grid.stride + tile <= grid.height) & (index[:, 1] * grid.stride + tile <= grid.width)
    index = index[inside]  # not every peer reads beyond the edge
    start = max(0, (len(index) - most) // 2) if most else 0
    index = index[start : start + most] if most else index
    # Cutting may have left parts of blocks: the order is still that of the stream.
    xy = tile_xy(grid, index)
    size = [round(tile * grid.scale_x), round(tile * grid.scale_y)]
    return Job(path, grid, index, np.concatenate([xy, np.tile(size, (len(xy), 1))], axis=1).astype(np.int64))


def part_of(job: Job, count: int) -> Job:
    return replace(job, index=job.index[:count], boxes=job.boxes[:count])


# ---------------------------------------------------------------- checking and timing


def collected(contestant: Contestant, job: Job, threads: int) -> np.ndarray:
    """Every tile of the job, in order."""
    tile = job.grid.tile
    out = np.zeros((len(job.index), tile, tile, 3), np.uint8)

    def sink(start: int, pixels: Any) -> None:
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (tile, tile, 3):
            raise TypeError(f"it gives {pixels.dtype} pixels of {pixels.shape[1:]}")
        out[start : start + len(pixels)] = pixels

    with contestant(job, threads) as run:
        run(sink)
    return out


def difference(contestant: Contestant, job: Job, want: np.ndarray) -> float:
    """Mean grey levels between a contestant's tiles and ours."""
    got = collected(contestant, part_of(job, len(want)), 2)
    return float(np.abs(got.astype(np.int16) - want).mean())


def timed(contestant: Contestant, job: Job, threads: int) -> tuple[float, float]:
    """Tiles per second, and the seconds it took to open."""
    begin = time.perf_counter()
    with contestant(job, threads) as run:
        opened = time.perf_counter()
        run(lambda start, pixels: None)
        done = time.perf_counter()
    return len(job.index) / (done - opened), opened - begin


def compare(job: Job, contestants: dict[str, Contestant], rounds: int) -> list[Row]:
    """One row per contestant; the rounds go through all of them in turns, each round beginning with another.

    Where a peer must resize, only two threads are timed: they take long enough.
    """
    count = min(CHECKED, len(job.index))
    want = collected(ours, part_of(job, count), 2)
    rows: list[Row] = []
    fit: dict[str, Contestant] = {}
    for name, contestant in contestants.items():
        row: Row = {"name": name, "note": ""}
        rows.append(row)
        try:
            if name != LIMIT or job.native:
                row["differs"] = round(difference(contestant, job, want), 3)
                if row["differs"] > (SAME if job.native else RESIZED):
                    row["note"] = f"wrong pixels: {row['differs']:.1f} grey levels from ours"
            fit[name] = contestant
        except Exception as error:  # noqa: BLE001  (a peer that fails is listed with the reason)
            row["note"] = str(error).strip().splitlines()[0][:120] or type(error).__name__
    names, both = list(fit), (OURS, LIMIT) if not job.native else tuple(fit)
    samples: dict[str, list[tuple[float, float]]] = {f"{n} {t}": [] for n in fit for t in (1, 2)}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for t in (1, 2) if name in both else (2,):
                samples[f"{name} {t}"].append(timed(fit[name], job, t))
    for row in rows:
        for t in (1, 2):
            if found := samples.get(f"{row['name']} {t}"):
                row[f"rate_{t}"] = round(statistics.median(rate for rate, _ in found), 1)
                row["open_ms"] = round(1000 * statistics.median(opened for _, opened in found), 1)
    return rows


# ---------------------------------------------------------------- scenarios


def local(options: argparse.Namespace, scenario: str) -> list[Row]:
    """Native, twice the native mpp, or 0.5 mpp with overlap, from the disk."""
    tiles, slide = options.tiles, options.slide
    if scenario == "native":
        job = make_job(slide, -1.0, tile=256, most=tiles)
        return compare(job, {OURS: ours, LIMIT: the_limit, **PEERS}, options.rounds)
    if scenario == "double":
        job = make_job(slide, -2.0, tile=256, most=tiles)
    else:
        job = make_job(slide, 0.5, tile=224, overlap=32, most=tiles)
    others = {f"{name} + PIL resize": PEERS[name] for name in ("openslide-python", "fastslide")}
    return compare(job, {OURS: ours, LIMIT: the_limit, **others}, options.rounds)


def elsewhere(options: argparse.Namespace, uri: str, name: str, rounds: int) -> list[Row]:
    """Ours from another storage against ours from the disk; what opening and reading cost there."""
    job = make_job(options.slide, -1.0, tile=256, most=options.tiles)
    away = replace(job, path=uri)
    rates: dict[str, list[float]] = {OURS: [], name: []}
    cost: Row = {}
    for _ in range(rounds):
        rates[OURS].append(timed(ours, job, 2)[0])
        with open_slide(uri) as slide:
            before, begin = slide.reader.stats(), time.perf_counter()
            streamed(slide.reader, away, 2)(lambda start, pixels: None)
            rates[name].append(len(job.index) / (time.perf_counter() - begin))
            after = slide.reader.stats()
        cost = {"requests_to_open": before.requests, "requests": after.requests - before.requests,
                "bytes": after.bytes_read - before.bytes_read}  # fmt: skip
    rows = [{"name": key, "rate_2": round(statistics.median(found), 1), "note": ""} for key, found in rates.items()]
    cost |= bytes_needed(job, cost)
    rows[1]["note"] = (
        f"{cost['requests_to_open']} requests to open, {cost['requests']} to read {cost['bytes'] / 1e6:.1f} MB "
        f"({cost['bytes'] / 1024 / max(1, cost['requests']):.0f} KB each), "
        f"{cost['bytes_over_needed']:.3f} of the bytes needed"
    )
    rows[1] |= cost | {"of_local": round(rows[1]["rate_2"] / rows[0]["rate_2"], 3)}
    rows[1]["note"] += f"; {rows[1]['of_local']:.2f} of the local rate"
    return rows


def bytes_needed(job: Job, cost: Row) -> Row:
    """The bytes of the native tiles under the job."""
    tiles = native_tiles(job.path, jpeg=False)
    needed = sum(tiles.counts[number] for number in tiles.under(job.boxes))
    return {"bytes_needed": needed, "bytes_over_needed": round(cost["bytes"] / needed, 4)}


def digest(job: Job) -> tuple[str, float]:
    """A hash of all pixels of the job, in order, and the seconds."""
    found = hashlib.sha256()
    begin = time.perf_counter()
    with open_slide(job.path) as slide:
        streamed(slide.reader, job, 2)(lambda start, pixels: found.update(pixels))
    return found.hexdigest(), time.perf_counter() - begin


def faults(options: argparse.Namespace) -> list[Row]:
    """One request in ten fails: the pixels are the same, and what it costs in time."""
    job = make_job(options.slide, -1.0, tile=256, most=options.tiles)
    away = replace(job, path=options.s3)
    clean, bad, same = [], [], True
    want, _ = digest(job)
    for _ in range(options.rounds):
        for share, seconds in ((0.0, clean), (0.1, bad)):
            with proxied(share=share):
                got, took = digest(away)
            same &= got == want
            seconds.append(took)
    ratio = statistics.median(bad) / statistics.median(clean)
    note = f"pixels {'identical' if same else 'DIFFER'}, {ratio:.2f}x the time"
    facts = {"identical": same, "time_ratio": round(ratio, 3)}
    rates = [round(len(job.index) / statistics.median(seconds), 1) for seconds in (clean, bad)]
    return [
        {"name": "no faults", "rate_2": rates[0], "note": ""},
        {"name": "one in ten fails", "rate_2": rates[1], "note": note, **facts},
    ]


def s3_delayed(options: argparse.Namespace) -> list[Row]:
    with proxied(delay_ms=options.delay_ms):
        return elsewhere(options, options.s3, f"S3, {options.delay_ms:g} ms a request", options.rounds)


def memory(options: argparse.Namespace) -> list[Row]:
    """Five passes over all tissue in a process of its own: how it grows, and its peak."""
    command = [sys.executable, __file__, options.slide, "--passes", "5"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(found.stdout.splitlines()[-1])
    rss = figures["rss_mb"]
    grown, peak = rss[-1] - rss[0], figures["peak_mb"]
    note = f"{rss[0]:.0f} MB after the first pass, {grown:+.1f} MB after the last, peak {peak:.0f} MB"
    return [{"name": OURS, "rate_2": figures["rate"], "note": note, "growth_mb": grown, **figures}]


def passes(slide: str, count: int) -> None:
    """Read all tissue ``count`` times; print what the process holds after each. Run in a fresh process."""
    import psutil

    job = make_job(slide, -1.0, tile=256, most=0)
    rss, begin = [], time.perf_counter()
    for _ in range(count):
        timed(ours, job, 2)
        rss.append(psutil.Process().memory_info().rss / 1e6)
    seconds = time.perf_counter() - begin
    # Not getrusage: after exec it still holds the peak of the process that forked this one.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024 / 1e6
    rate = len(job.index) * count / seconds
    print(json.dumps({"rss_mb": rss, "peak_mb": peak, "tiles": len(job.index), "rate": rate}))


def jpeg2000(options: argparse.Namespace) -> list[Row]:
    """A JPEG 2000 slide without the tile cache, while it fills, and from it when it is warm."""
    from wsi_mmm.cache import CachedReader

    path = str(slides_folder() / J2K) if options.j2k is None else options.j2k
    if not Path(path).exists():
        raise NotForThisError(f"{J2K} is not among the shared slides; name one with --j2k")
    job = make_job(path, -1.0, tile=256, most=options.tiles)
    want = collected(ours, job, 2)
    rates: dict[str, list[float]] = {"cold, no cache": [], "cold, filling the cache": [], "warm cache": []}
    for _ in range(options.rounds):
        rates["cold, no cache"].append(timed(ours, job, 2)[0])
        with tempfile.TemporaryDirectory() as folder:

            @contextmanager
            def cached(job: Job, threads: int, folder: str = folder) -> Iterator[Callable[..., None]]:
                with open_slide(job.path) as slide:
                    reader = CachedReader(slide.reader, folder, job.grid.scale_x, job.grid.scale_y)
                    yield streamed(reader, job, threads)

            rates["cold, filling the cache"].append(timed(cached, job, 2)[0])
            rates["warm cache"].append(timed(cached, job, 2)[0])
            if not np.array_equal(collected(cached, job, 2), want):
                raise RuntimeError("the cache gives other pixels")
    rows = [{"name": key, "rate_2": round(statistics.median(found), 1), "note": ""} for key, found in rates.items()]
    rows[-1]["note"] = f"{rows[-1]['rate_2'] / rows[0]['rate_2']:.1f}x its cold read; pixels identical"
    return rows


SCENARIOS: dict[str, tuple[str, Callable[[argparse.Namespace], list[Row]]]] = {
    "native": ("native mpp, 256 px on the slide's own tiles", lambda o: local(o, "native")),
    "double": ("twice the native mpp, 256 px", lambda o: local(o, "double")),
    "half": ("0.5 mpp, 224 px tiles with 32 px overlap", lambda o: local(o, "half")),
    "s3": ("S3, native mpp, 256 px", lambda o: elsewhere(o, o.s3, "S3", o.rounds)),
    "s3-delay": ("S3 with a delay, native mpp, 256 px", s3_delayed),
    "juicefs": ("JuiceFS mount, warm, native mpp, 256 px", lambda o: elsewhere(o, o.juicefs, "JuiceFS", o.rounds)),
    "memory": ("memory: five passes over all tissue", memory),
    "jpeg2000": (f"JPEG 2000 slide ({J2K}), native mpp, 256 px", jpeg2000),
    "faults": ("S3, one request in ten failing", faults),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", nargs="?")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="repeatable; default: all it can")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=1600)
    parser.add_argument("--s3", metavar="URI", help="the same slide on S3; the environment names the endpoint")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="delay of every request to S3 in s3-delay")
    parser.add_argument("--juicefs", metavar="PATH", help="the same slide on a JuiceFS mount")
    parser.add_argument("--j2k", metavar="SLIDE", help="another JPEG 2000 slide")
    parser.add_argument("--picture", metavar="FILE.png")
    parser.add_argument("--passes", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def check_needs(options: argparse.Namespace) -> None:
    """Without --only: every scenario whose storage is there. Ends where one was asked for without it."""
    needs = {"s3": options.s3, "s3-delay": options.s3, "faults": options.s3, "juicefs": options.juicefs}
    options.only = options.only or [name for name in SCENARIOS if needs.get(name, True)]
    if missing := [name for name in options.only if not needs.get(name, True)]:
        sys.exit(f"error: {missing[0]} needs --{'juicefs PATH' if missing[0] == 'juicefs' else 's3 URI'}")


def main() -> None:
    options = arguments()
    if options.passes:
        passes(options.slide, options.passes)
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        options.slide = options.slide or default_slide(folder)
        put_on_services(options, stack)
        check_needs(options)
        Path(options.slide).read_bytes()  # the page cache is warm for everybody
        print(f"{Path(options.slide).name}, {os.cpu_count()} cores, {platform.machine()}, {options.rounds} rounds")
        results: dict[str, list[Row]] = {}
        for name in options.only:
            try:
                results[name] = SCENARIOS[name][1](options)
                print(markdown(SCENARIOS[name][0], results[name]), flush=True)
            except NotForThisError as error:
                print(f"\n### {SCENARIOS[name][0]}\n\nleft out: {error}", flush=True)
    if options.picture:
        draw(results, {name: title for name, (title, _) in SCENARIOS.items()}, options.picture)
    print("\n" + json.dumps({"slide": Path(options.slide).name, "cores": os.cpu_count(), "results": results}))


if __name__ == "__main__":
    main()
