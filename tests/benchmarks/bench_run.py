"""`embed` end to end, against the encoder alone on a resident batch and against a DataLoader as many write it.

    make bench-run ARGS="SLIDE"         python tests/benchmarks/bench_run.py SLIDE [--rounds 3] [--tiles 300]

Everything runs in turns within this one run, each in a process of its own, and medians of the rounds are compared:
  limits   the encoder alone (see encoder_limit.py): with the default allocator, and with freed memory kept
  ours     ``wsi-mmm embed``: wall time of the process, and the feature stage
  naive    naive_embed.py on the same tiles: wall time of the process, and the feature stage
The feature stage is tiles over the time from the first tile asked for to the last feature in (ours: the last one
stored). Ours begins to read while the model still loads, which counts; the table also says what the rate is from the
model's first tile on. The limit is the best of those with freed memory kept, which is what ours runs with.
``--compile`` adds torch.compile to them, and ONNX Runtime is among them where the extra ``onnx`` is installed; it is
the limit when ours runs with it. Memory is sampled in further runs (``--memory``), not in those that are timed.
``--tiles`` takes that many tissue tiles only, for a quick look; tissue is then given, not found.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_scheduler import measure

from wsi_mmm.model.identity import lacking
from wsi_mmm.slides import open_slide
from wsi_mmm.tiles.grid import make_grid, tile_boxes
from wsi_mmm.tiles.tissue import select_tiles, tissue_mask

HERE = Path(__file__).parent
KEPT = ("kept", "channels_last", "folded", "compile")  # limits with the allocator setting of ours


def plan(slide: str, mpp: float, size: int, count: int | None) -> Any:
    """Level-0 boxes int64[n, 4] (x, y, width, height) of the tissue tiles that embed will take."""
    held = open_slide(slide)
    try:
        grid = make_grid(held.info, mpp, tile=size, overlap=0)
        boxes = tile_boxes(grid, select_tiles(grid, tissue_mask(held, "auto"), min_tissue=0.02))[:count]
    finally:
        held.close()
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).round().astype(np.int64)


def region(boxes: Any, path: Path) -> str:
    """A GeoJSON of the middles of these boxes: embed then takes these tiles and no others."""
    rings = []
    for x, y, w, h in boxes.tolist():
        x0, y0, x1, y1 = x + w // 4, y + h // 4, x + 3 * w // 4, y + 3 * h // 4
        rings.append([[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]])
    shape = {"type": "Feature", "properties": {}, "geometry": {"type": "MultiPolygon", "coordinates": rings}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [shape]}))
    return str(path)


def call(command: list[str]) -> tuple[float, str]:
    """Wall seconds and the last line printed of a command, which must succeed."""
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - begin, (done.stdout.strip().splitlines() or [""])[-1]


def limit(case: str, encoder: str, size: int) -> dict[str, Any]:
    script = [sys.executable, str(HERE / "encoder_limit.py"), encoder, case, "--size", str(size)]
    found: dict[str, Any] = json.loads(call(script)[1])
    return found


def embed_command(given: argparse.Namespace, output: str, tissue: str) -> list[str]:
    return [
        sys.executable, "-m", "wsi_mmm", "embed", given.slide, "-m", given.encoder, "--weights", "random",
        "--mpp", str(given.mpp), "--tile-size", str(given.size), "--tissue", tissue, "-o", output,
        *(["--runtime", given.runtime] if given.runtime else []),
    ]  # fmt: skip


def ours(given: argparse.Namespace, tissue: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        wall, _ = call(embed_command(given, output, tissue))
        [slide] = json.loads((Path(output) / "report.json").read_text())["slides"]
    return {
        "wall": wall, "tiles": slide["tiles"], "features_s": slide["features_s"],
        "model_began_s": slide["model_began_s"], "stages": slide["stages"],
        "encoder": slide["encoder"],
    }  # fmt: skip


def naive_command(given: argparse.Namespace, folder: Path) -> list[str]:
    script, tiles, out = str(HERE / "naive_embed.py"), str(folder / "tiles.npy"), str(folder / "naive.npy")
    return [sys.executable, script, given.slide, tiles, given.encoder, out]


def naive(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    wall, line = call(naive_command(given, folder))
    found = json.loads(line)
    return {"wall": wall, "tiles": found["tiles"], "features_s": found["seconds"]}


def median(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.median(float(row[name]) for row in rows)


def stage_rate(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["tiles"] / row["features_s"] for row in rows)


def summary(limits: dict[str, list[dict[str, Any]]], mine: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """Medians, and the three ratios that count."""
    rates = {case: round(median(rows, "tiles_per_s"), 1) for case, rows in limits.items()}
    reachable = ("onnx",) if mine[-1]["encoder"][0]["runtime"] == "onnx" else KEPT
    best = max((case for case in rates if case in reachable), key=lambda case: rates[case])
    stage, base = stage_rate(mine), stage_rate(theirs)
    later = statistics.median(row["tiles"] / (row["features_s"] - row["model_began_s"]) for row in mine)
    return {
        "tiles": mine[0]["tiles"], "limits": rates, "limit": best, "ours_stage": round(stage, 1),
        "naive_stage": round(base, 1), "ours_wall": round(median(mine, "wall"), 2),
        "naive_wall": round(median(theirs, "wall"), 2), "stage_of_limit": round(stage / rates[best], 3),
        "stage_of_naive": round(stage / base, 2),
        "stage_after_load": round(later, 1),
        "wall_of_naive": round(median(theirs, "wall") / median(mine, "wall"), 2),
        "encoder": mine[-1]["encoder"], "stages": mine[-1]["stages"], "machine": platform.processor() or "unknown",
    }  # fmt: skip


def table(found: dict[str, Any], hows: dict[str, str]) -> str:
    rows = [("| what | tiles/s | wall s |"), ("|---|---|---|")]
    rows += [f"| limit: {case} ({hows[case]}) | {rate:.1f} | |" for case, rate in found["limits"].items()]
    rows += [
        f"| embed, feature stage | {found['ours_stage']:.1f} | |",
        f"| embed, feature stage from the model's first tile on | {found['stage_after_load']:.1f} | |",
        f"| embed, whole process | {found['tiles'] / found['ours_wall']:.1f} | {found['ours_wall']:.2f} |",
        f"| naive, feature stage | {found['naive_stage']:.1f} | |",
        f"| naive, whole process | {found['tiles'] / found['naive_wall']:.1f} | {found['naive_wall']:.2f} |",
        "",
        f"feature stage / limit ({found['limit']}): {found['stage_of_limit']:.3f} (bar 0.85)",
        f"feature stage / naive: {found['stage_of_naive']:.2f} (bar 3)",
        f"naive wall / wall: {found['wall_of_naive']:.2f} (bar 2.5)",
    ]
    return "\n".join(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--encoder", default="mobilenetv4_conv_small")
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int)
    parser.add_argument("--runtime")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    cases = ["plain", "kept", "channels_last", "folded", *(["compile"] if given.compile else [])]
    cases += [] if lacking("onnx") else ["onnx"]
    limits: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    mine: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        boxes = plan(given.slide, given.mpp, given.size, given.tiles)
        np.save(folder / "tiles.npy", boxes)
        tissue = region(boxes, folder / "tiles.geojson") if given.tiles else "auto"
        for number in range(given.rounds):
            for case in cases:
                limits[case].append(limit(case, given.encoder, given.size))
            mine.append(ours(given, tissue))
            theirs.append(naive(given, folder))
            print(
                f"round {number + 1}: limit {max(limits[case][-1]['tiles_per_s'] for case in cases):.1f} tiles/s, "
                f"ours {mine[-1]['wall']:.2f} s (features {mine[-1]['features_s']:.2f}), "
                f"naive {theirs[-1]['wall']:.2f} s (features {theirs[-1]['features_s']:.2f})",
                flush=True,
            )
        assert mine[0]["tiles"] == theirs[0]["tiles"] == len(boxes), "both must do the same tiles"
        found = summary(limits, mine, theirs)
        if given.memory:
            found["ours_peak_mb"] = round(measure(embed_command(given, str(folder / "out"), tissue))[1], 1)
            found["naive_peak_mb"] = round(measure(naive_command(given, folder))[1], 1)
    print(table(found, {case: rows[-1]["how"] for case, rows in limits.items()}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
