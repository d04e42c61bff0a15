"""The EMPAIA app on real slides, over a platform of our own: what it asks for, what it posts, and whether it agrees.

    make bench-empaia ARGS="--data FOLDER --slides a.svs b.svs"

The app is a process of its own (``wsi-mmm empaia run``) with the default model at 0.5 mpp. Of every slide:
  pictures  preprocessing, which is the whole slide: pictures given and their bytes, against the least for the tissue.
            All pictures count, those in which tissue is looked for among them. The least: every px under a tile that
            the run worked on, once, at the level that is read. Bytes: those px cut into rectangles without overlap,
            each encoded as the platform encodes what the app asks for (PNG). Calls: one for each megapixel (1024 x
            1024) of those, a measure that does not depend on how large the app's pictures are; what the platform's
            limit of 25 megapixels would allow is said beside it.
  posts     calls and bytes by kind of output, and how many requests 5,000 nuclei as large as these would be
  parity    the objects posted, against those of `wsi_mmm.run` on the same file: the whole slide, and two regions of
            interest (a rectangle and a circle); in whole level-0 px, every corner
Then made-up results are posted by a process that does nothing else (``memory``): its peak for 200,000 nuclei against
2,000 and against two pieces of 5,000, and the requests for 5,000.

Bars: pictures and bytes at most 1.2 times the least; 5,000 nuclei in at most 10 requests; all objects agree; 200,000
nuclei at most 10 % and 20 MB above two pieces.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench_scheduler import measure
from empaia_tally import (
    MeasuredPlatform,
    Picture,
    asked,
    by_kind,
    covered,
    least,
    level_read,
    of_nuclei,
    on_level,
    parity,
    requests_for,
)

from empaia.conftest import WSI_ID, posted, rectangle, regions
from empaia.test_app import objects_of_the_cli
from empaia.test_posting import answer, published
from helpers.empaia_platform import served
from helpers.processes import BIN
from helpers.wsi_service import described, encoded, level_pixels
from wsi_mmm.config import empaia_job
from wsi_mmm.empaia.app import LIMITS
from wsi_mmm.empaia.client import AppApi
from wsi_mmm.empaia.job_inputs import read_regions, read_slide, regions_geojson
from wsi_mmm.empaia.posting import BLOCK, post_all
from wsi_mmm.empaia.results import results_at
from wsi_mmm.model.card import read_card
from wsi_mmm.slides import Slide, open_slide
from wsi_mmm.types import F64

BAR, MOST_REQUESTS, NUCLEI = 1.2, 10, 5000
FEW, MANY = 2000, 200_000
Row = dict[str, Any]


@contextmanager
def platform(slides: dict[str, Slide], **told: Any) -> Iterator[MeasuredPlatform]:
    """Serve a job whose variables are this process's while the block lasts."""
    with served(MeasuredPlatform(slides=slides, lenient=True, **told)) as made:
        assert isinstance(made, MeasuredPlatform)
        os.environ.update(EMPAIA_APP_API=made.job.api, EMPAIA_JOB_ID=made.job.id, EMPAIA_TOKEN=made.job.token)
        yield made


def app_run(slide: Slide, work: Path, given: Row | None = None) -> tuple[MeasuredPlatform, float, float]:
    """The app on a slide, whole or in regions of interest: the platform afterwards, wall seconds, peak MB."""
    inputs = {"slide": described(slide, WSI_ID)} | ({"regions": given} if given else {})
    mode = "STANDALONE" if given else "PREPROCESSING"
    with platform({WSI_ID: slide}, mode=mode, inputs=inputs) as made:
        seconds, peak = measure([str(BIN / "wsi-mmm"), "empaia", "run", "--work", str(work)])
    assert made.ends == ["finalize"], made.message
    assert made.refused == []
    return made, seconds, peak


def boxes_of(work: Path) -> F64:
    """Level-0 boxes float64[n, 4] (x0, y0, x1, y1) of the tiles that the run in ``work`` worked on."""
    [table] = work.rglob("tiles.parquet")
    tiles = results_at(str(table.parent)).tiles()
    x, y = tiles["x"], tiles["y"]
    return np.stack([x, y, x + tiles["width0"], y + tiles["height0"]], axis=1).astype(np.float64)


# ------------------------------------------------------------------------------------------------ of a slide


def pictures_row(slide: Slide, pictures: Sequence[Picture], boxes: F64) -> Row:
    """What was asked for, against the least."""
    number = level_read(pictures)
    there = [one for one in pictures if one.level == number]
    kind = there[0].format
    windows = covered(on_level(boxes, slide.info.levels[number]))
    query = {"image_format": [kind]}
    sizes = [len(encoded(level_pixels(slide, number, tuple(one)), query)) for one in windows]
    fewest = least(windows, sizes)
    all_of, of_level = asked(pictures), asked(there)
    return {
        "level": number, "format": kind, "tiles": len(boxes), "all": asdict(all_of), "at_level": asdict(of_level),
        "least": asdict(fewest), "calls_ratio": round(all_of.calls / fewest.calls, 3),
        "bytes_ratio": round(all_of.size / fewest.size, 3),
    }  # fmt: skip


def two_regions(slide: Slide, boxes: F64) -> Row:
    """A rectangle and a circle on tissue, each some tiles wide."""
    (ax, ay), (bx, by) = ((boxes[len(boxes) * k // 3, :2]).astype(int).tolist() for k in (1, 2))
    side = int(boxes[0, 2] - boxes[0, 0])
    width, height = min(2 * side, slide.info.width - ax), min(side, slide.info.height - ay)
    centre = [min(bx + side // 2, slide.info.width - 1), min(by + side // 2, slide.info.height - 1)]
    return regions(rectangle(ax, ay, width, height), {"type": "circle", "center": centre, "radius": side * 3 // 4})


def parity_row(path: Path, made: MeasuredPlatform, folder: Path, given: Row | None = None) -> Row:
    """The objects posted against those of a run over the file."""
    wsi, where = read_slide(made.inputs["slide"]), None
    folder.mkdir()
    if given:
        where = folder / "regions.geojson"
        where.write_bytes(regions_geojson(tuple(read_regions(given, wsi))))
    expected = objects_of_the_cli(path, folder / "cli", wsi, where)
    found = parity([one["coordinates"] for one in posted(made, "nuclei_objects")], expected)
    return {**asdict(found), "holds": found.holds}


def slide_row(path: Path, folder: Path) -> Row:
    """All figures of one slide."""
    with open_slide(str(path)) as slide:
        whole, seconds, peak = app_run(slide, folder / "whole")
        boxes = boxes_of(folder / "whole")
        row: Row = {"slide": path.name, "seconds": round(seconds, 1), "peak_mb": round(peak)}
        row["pictures"] = pictures_row(slide, whole.pictures, boxes)
        count = len(posted(whole, "nuclei_objects"))
        row["posts"] = by_kind(whole.posted)
        row["requests_for_5000"] = (
            requests_for(NUCLEI, whole.posted, count, items=LIMITS.items, body=LIMITS.body) if count else None
        )
        row["parity"] = {"whole slide": parity_row(path, whole, folder / "parity")}
        given = two_regions(slide, boxes)
        parts, _, _ = app_run(slide, folder / "parts", given)
        row["parity"]["two regions"] = parity_row(path, parts, folder / "parity-parts", given)
    return row


# ------------------------------------------------------------------------------------------------ memory


def memory_row(count: int, folder: Path) -> Row:
    """Post ``count`` made-up nuclei by a process of its own: memory before and at most, requests."""
    folder.mkdir()
    card = read_card("default")
    results = published(folder, card, count, **{f"stain:{name}": [0.25] * 2 for name in card.tasks[1].classes})
    (folder / "slide.json").write_text(json.dumps(results.facts))
    with platform({}, mode="PREPROCESSING", forgets=True) as made:
        script = [sys.executable, __file__, "--post", str(folder)]
        done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True)
    before, peak = json.loads(done.stdout.splitlines()[-1])
    nuclei = of_nuclei(made.posted)
    return {
        "nuclei": count, "before_mb": round(before, 1), "peak_mb": round(peak, 1), "requests": len(nuclei),
        "bytes": sum(one.size for one in nuclei),
    }  # fmt: skip


def post(folder: Path) -> None:
    """What the process of `memory_row` does: post, and print its memory (MB) before and at most."""

    async def send() -> None:
        async with AppApi(empaia_job(), LIMITS) as api:
            await post_all(api, answer(results_at(str(folder)), read_card("default")), lambda share: None)

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    asyncio.run(send())
    print(json.dumps([before, _memory("VmHWM")]))


def _memory(name: str) -> float:
    said = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert said is not None
    return int(said[1]) / 1e3


# ------------------------------------------------------------------------------------------------ what is said


def slide_table(row: Row) -> str:
    """The figures of a slide, to read."""
    found, fewest = row["pictures"], row["pictures"]["least"]
    lines = [
        f"## {row['slide']}: {found['tiles']:,} tiles, app {row['seconds']:,.1f} s, peak {row['peak_mb']:,} MB",
        "",
        f"| pictures ({found['format']}, level {found['level']}) | calls | again | bytes | px |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {name} | {one['calls']:,} | {one['again']:,} | {one['size']:,} | {one['pixels']:,} |"
            for name, one in (("all", found["all"]), ("of that level", found["at_level"]))
        ),
        f"| least (calls of 25 megapixels: {fewest['fewest']:,}) | {fewest['calls']:,} | | {fewest['size']:,} "
        f"| {fewest['pixels']:,} |",
        f"| all / least (bar {BAR}) | {found['calls_ratio']:.3f} | | {found['bytes_ratio']:.3f} "
        f"| {found['all']['pixels'] / fewest['pixels']:.3f} |",
        "",
        "| posts | calls | bytes |",
        "|---|--:|--:|",
        *(f"| {kind} | {calls:,} | {size:,} |" for kind, (calls, size) in row["posts"].items()),
        f"| 5,000 nuclei as large as these (bar {MOST_REQUESTS}) | {row['requests_for_5000']} | |",
        "",
        "| parity | app | command line | agree | near, but not the same | same order |",
        "|---|--:|--:|--:|--:|---|",
        *(
            f"| {name} | {one['app']:,} | {one['cli']:,} | {one['alike']:,} | {one['moved']:,} | {one['in_order']} |"
            for name, one in row["parity"].items()
        ),
    ]
    return "\n".join(lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Posting made-up nuclei, to read."""
    lines = ["| nuclei posted | MB before | MB at most | requests | bytes |", "|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row['nuclei']:,} | {row['before_mb']:,.1f} | {row['peak_mb']:,.1f} | {row['requests']:,} "
        f"| {row['bytes']:,} |"
        for row in rows
    ]
    return "\n".join(lines)


def broken(row: Row) -> list[str]:
    """Bars that a slide breaks."""
    found = [
        f"{what} are {row['pictures'][name]:.3f} times the least, bar {BAR}"
        for what, name in (("picture calls", "calls_ratio"), ("picture bytes", "bytes_ratio"))
        if row["pictures"][name] > BAR
    ]
    if (row["requests_for_5000"] or 0) > MOST_REQUESTS:
        found.append(f"5,000 nuclei need {row['requests_for_5000']} requests, bar {MOST_REQUESTS}")
    found += [
        f"{name}: {one['alike']:,} objects agree of {one['app']:,} and {one['cli']:,}"
        for name, one in row["parity"].items()
        if not one["holds"]
    ]
    return [f"{row['slide']}: {text}" for text in found]


def too_much(rows: Sequence[Row]) -> list[str]:
    """Bars that posting breaks."""
    by_count = {row["nuclei"]: row for row in rows}
    found = []
    if by_count[NUCLEI]["requests"] > MOST_REQUESTS:
        found.append(f"5,000 nuclei: {by_count[NUCLEI]['requests']} requests, bar {MOST_REQUESTS}")
    pieces, many = by_count[2 * BLOCK]["peak_mb"], by_count[MANY]["peak_mb"]
    if many > 1.1 * pieces + 20:
        found.append(f"{MANY:,} nuclei: {many:,.0f} MB, {pieces:,.0f} MB for two pieces")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the slides")
    parser.add_argument("--slides", nargs="*", default=[], help="their names")
    parser.add_argument("--no-memory", action="store_true", help="slides only")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--post", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.post:
        post(given.post)
        return
    rows, posting, wrong = [], [], []
    with tempfile.TemporaryDirectory() as name:
        for number, slide in enumerate(given.slides):
            folder = Path(name) / str(number)
            folder.mkdir()
            rows.append(slide_row(given.data / slide, folder))
            wrong += broken(rows[-1])
            print(slide_table(rows[-1]) + "\n", flush=True)
        if not given.no_memory:
            posting = [memory_row(n, Path(name) / f"post-{n}") for n in (FEW, NUCLEI, 2 * BLOCK, MANY)]
            wrong += too_much(posting)
            print(memory_table(posting))
    if given.json:
        given.json.write_text(json.dumps({"slides": rows, "posting": posting}, indent=1))
    if wrong:
        sys.exit("\n".join(f"bar: {reason}" for reason in wrong))


if __name__ == "__main__":
    main()
