"""A slide as one bag of tiles: a planted model finds the few dark tiles that decide, whatever the run looks like."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import wsi_mmm
from helpers.qupath import check_qupath
from wsi_mmm.api import RunReport
from wsi_mmm.model.aggregator import GatedScore
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.checkpoint import build_model, save_model
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.slides.fake import pyramid
from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff
from wsi_mmm.types import U8

TILE, ROWS, COLUMNS = 64, 7, 9
DARK = [(2, 3), (2, 4), (5, 7)]  # (row, column) of the tiles of the "high" slide that decide
GRAY = [[90, 90, 90]]


def task(name: str, kind: str, *classes: str, head: str = "bag", outputs: int = 0, **params: float) -> dict[str, Any]:
    return {"name": name, "kind": kind, "head": head, "outputs": outputs or len(classes), "classes": list(classes),
            "colors": GRAY * len(classes), "params": params}  # fmt: skip


CARD = {
    "format": "wsi-mmm-model/1", "name": "planted",
    "encoder": {"name": "resnet18", "args": {"channels": [8, 16, 24, 32]}},
    "decoder": {"bottleneck": 16, "widths": [8, 8, 16, 16]}, "bag": {"kind": "gated", "width": 0, "hidden": 4},
    "mpp": 1.0, "tile_size": TILE, "overlap": 0, "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2],
    "tasks": [
        task("grade", "classify", "low", "high"),
        task("age", "regress", "years", centre=50.0, spread=10.0),
        task("risk", "survive", "death"),
        task("relapse", "survive", "relapse", outputs=2, bins=2, horizon=10.0),
        task("marks", "multilabel", "a", "b", head="vector"),
        task("cells", "regress", "count", "size", head="vector"),
        task("hazard", "survive", "death", head="vector", outputs=2, bins=2, horizon=4.0),
    ],
}  # fmt: skip


def picture(dark: list[tuple[int, int]], seed: int) -> U8:
    """Pink noise with dark blue tiles; the last tiles reach beyond the slide."""
    height, width = TILE * ROWS - 20, TILE * COLUMNS - 9
    rng = np.random.default_rng(seed)
    image = np.array([225, 170, 200]) + rng.integers(-12, 13, (height, width, 3))
    for row, column in dark:
        part = np.s_[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        image[part] = np.array([60, 40, 130]) + rng.integers(-12, 13, image[part].shape)
    return image.astype(np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """ "high" with three dark tiles among sixty, and "low" without."""
    folder = tmp_path_factory.mktemp("slides")
    for name, dark, seed in (("high", DARK, 1), ("low", [], 2)):
        write_tiff(folder / f"{name}.tiff", list(pyramid(picture(dark, seed), 2)), TiffForm("deflate", mpp=1.0))
    return [folder / "high.tiff", folder / "low.tiff"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random encoder; attention planted on what is dark, and heads that tell a dark bag from a pink one."""
    torch.manual_seed(5)
    made = build_model(ModelCard.model_validate(CARD)).eval()
    with torch.no_grad():
        plant(made)
    folder = tmp_path_factory.mktemp("model")
    save_model(made, folder, half=False)
    return str(folder)


def plant(made: MultiTaskModel) -> None:
    tiles = [picture([], 3)[:TILE, :TILE], picture([(0, 0)], 4)[:TILE, :TILE]]
    pink, dark = made.features(made.prepare(torch.from_numpy(np.stack(tiles))))
    way = (dark - pink) / (dark - pink).square().sum()  # 0 at pink, 1 at dark
    assert made.grouper is not None
    score = made.grouper.score
    assert isinstance(score, GatedScore)
    for layer in (score.value, score.gate, score.out):
        layer.weight.zero_()
        layer.bias.zero_()
    score.value.weight[0], score.value.bias[0] = 4 * way, -2 * (way @ (dark + pink))
    score.out.weight[0, 0] = 10.0  # the gate is a half: +-5 before the softmax
    wanted = {"grade": [-4.0, 4.0], "age": [1.5], "risk": [2.0], "relapse": [1.0, 2.0]}
    for name, values in wanted.items():  # ``values`` for a dark bag, their opposite for a pink one
        head = made.get_submodule(f"heads.{name}")
        a, b = head.norm(pink), head.norm(dark)
        to = (b - a) / (b - a).square().sum()
        head.out.weight.copy_(2 * torch.tensor(values)[:, None] * to)
        head.out.bias.copy_(-torch.tensor(values) * (to @ (a + b)))


def run(slides: list[Path], model: str, output: Path, **options: Any) -> RunReport:
    report = wsi_mmm.run([str(s) for s in slides], model, output=output, tissue="none", **options)
    assert report.exit_code == 0, [row.error for row in report.slides]
    return report


@pytest.fixture(scope="module")
def quiet(slides: list[Path], model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunReport]:
    """One run with a cache, which the others are compared with."""
    folder = tmp_path_factory.mktemp("quiet")
    return folder, run(slides, model, folder / "out", cache=folder / "cache", save_maps=True, block_tiles=4)


def answers(report: RunReport) -> dict[str, Any]:
    return {row.id: row.extra["answers"] for row in report.slides}


def test_the_slides_are_told_apart(quiet: tuple[Path, RunReport]) -> None:
    """Class, value, risk and survival of each slide are those that were planted, in slide.json and in the report."""
    folder, report = quiet
    high, low = answers(report)["high"], answers(report)["low"]
    assert (high["grade"], low["grade"]) == ("high", "low")
    assert high["grade:high"] > 0.95 and low["grade:low"] > 0.95
    assert high["grade:high"] + high["grade:low"] == pytest.approx(1.0)
    assert (high["age"], low["age"]) == (pytest.approx(65, abs=2), pytest.approx(35, abs=2))
    assert (high["risk"], low["risk"]) == (pytest.approx(2, abs=0.3), pytest.approx(-2, abs=0.3))
    assert (high["relapse"], low["relapse"]) == (pytest.approx(0.85, abs=0.05), pytest.approx(0.31, abs=0.05))
    assert high["relapse:S(10)"] < high["relapse:S(5)"] < low["relapse:S(10)"] < low["relapse:S(5)"]
    assert json.loads((folder / "out" / "high" / "slide.json").read_text())["answers"] == high
    rows = json.loads((folder / "out" / "report.json").read_text())["slides"]
    assert {row["id"]: row["answers"] for row in rows} == answers(report)
    assert "Predictions for the slide" in (folder / "out" / "report.html").read_text()


def test_the_slides_table_has_a_row_per_slide(quiet: tuple[Path, RunReport]) -> None:
    """CSV and Parquet agree, and are the answers."""
    folder, report = quiet
    table = pq.read_table(folder / "out" / "slides.parquet").to_pylist()
    text = list(csv.DictReader(io.StringIO((folder / "out" / "slides.csv").read_text())))
    assert [row["id"] for row in table] == [row["id"] for row in text] == ["high", "low"]
    for row, line in zip(table, text, strict=True):
        assert row["tiles"] == ROWS * COLUMNS
        for name, value in answers(report)[row["id"]].items():
            assert row[name] == value
            assert line[name] == str(value)


def test_attention_lies_on_the_tiles_that_decide(quiet: tuple[Path, RunReport]) -> None:
    """It adds up to 1 over a slide, nearly all of it on the dark tiles, which the heat map shows brightest."""
    folder, _ = quiet
    tiles = pq.read_table(folder / "out" / "high" / "tiles.parquet").to_pydict()
    shares = dict(zip(zip(tiles["row"], tiles["column"], strict=True), tiles["grade:attention"], strict=True))
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
    assert sorted(sorted(shares, key=lambda place: -shares[place])[:3]) == DARK
    assert sum(shares[place] for place in DARK) > 0.9
    assert tiles["age:attention"] == tiles["grade:attention"]
    shown = np.asarray(Image.open(folder / "out" / "high" / "attention-grade.png").convert("RGB"), float)
    cell = shown.shape[0] / (TILE * ROWS - 20) * TILE
    dark, pink = (shown[int((r + 0.5) * cell), int((c + 0.5) * cell)] for r, c in (DARK[0], (0, 0)))
    assert dark[1] > pink[1] + 30  # yellow against violet, over the slide


def test_tile_tasks_have_columns_and_measurements(quiet: tuple[Path, RunReport]) -> None:
    """Labels, values and survival of every tile: in the tiles table and, as numbers, in the GeoJSON."""
    folder, report = quiet
    tiles = pq.read_table(folder / "out" / "high" / "tiles.parquet").to_pydict()
    assert {"marks", "marks:a", "marks:b", "cells:count", "cells:size", "hazard", "hazard:S(2)"} <= set(tiles)
    said = [max((a, "a"), (b, "b")) for a, b in zip(tiles["marks:a"], tiles["marks:b"], strict=True)]
    assert tiles["marks"] == [name if chance >= 0.5 else None for chance, name in said]
    path = folder / "out" / "high" / "result.geojson.gz"
    checked = check_qupath(path)
    assert checked.ok, checked.violations
    assert checked.object_types == {"tile": 3 * ROWS * COLUMNS}
    drawn = [feature["properties"] for feature in json.loads(gzip.decompress(path.read_bytes()))["features"]]
    cells = [one for one in drawn if "count" in one["measurements"]]
    assert all("classification" not in one and set(one["measurements"]) == {"count", "size"} for one in cells)
    assert [one["measurements"]["size"] for one in cells] == pytest.approx(tiles["cells:size"], rel=1e-6)
    hazards = [one for one in drawn if "hazard" in one["measurements"]]
    assert {one["classification"]["name"] for one in hazards} == {"death"}
    assert [one["measurements"]["S(2)"] for one in hazards] == pytest.approx(tiles["hazard:S(2)"], rel=1e-6)
    [row] = [row for row in report.slides if row.id == "high"]
    assert set(row.extra["classes"]) == {"marks"}  # values and risks have no classes to count
    assert row.extra["classes"]["marks"]["a"] == sum(a >= 0.5 for a in tiles["marks:a"])


@pytest.mark.parametrize("options", [{"block_tiles": 2}, {"block_tiles": 5, "threads": 1, "features": False}])
def test_the_answers_do_not_know_the_blocks(
    options: dict[str, Any], quiet: tuple[Path, RunReport], slides: list[Path], model: str, tmp_path: Path
) -> None:
    """Other blocks, threads and order of slides, features not asked for: the same answers and attention to the bit."""
    folder, report = quiet
    again = run(slides[::-1], model, tmp_path, **options)
    assert answers(again) == answers(report)
    for name in ("high", "low"):
        wanted, found = (pq.read_table(at / name / "tiles.parquet") for at in (folder / "out", tmp_path))
        assert found.equals(wanted)
    assert (tmp_path / "high" / "features.zarr").exists() == options.get("features", True)


def test_a_bag_is_answered_from_the_cache(
    quiet: tuple[Path, RunReport], slides: list[Path], model: str, tmp_path: Path
) -> None:
    """Another output over the same cache runs no tile anew; the same output is not even looked at again."""
    folder, report = quiet
    cached = run(slides, model, tmp_path, cache=folder / "cache", block_tiles=4)
    assert [row.cache_hits for row in cached.slides] == [ROWS * COLUMNS] * 2
    assert answers(cached) == answers(report)
    resumed = run(slides, model, tmp_path, cache=folder / "cache", block_tiles=4)
    assert all(row.extra["resumed"] for row in resumed.slides)
    assert answers(resumed) == answers(report)
    assert (tmp_path / "slides.csv").read_text().count("\n") == 3


def test_a_choice_of_tasks_is_answered_alone(
    quiet: tuple[Path, RunReport], slides: list[Path], model: str, tmp_path: Path
) -> None:
    """One bag task and one tile task: their columns and no others, with the same values; a bag task alone, too."""
    _, report = quiet
    some = run(slides[:1], model, tmp_path, tasks=["risk", "marks"])
    assert answers(some) == {"high": {"risk": answers(report)["high"]["risk"]}}
    names = pq.read_table(tmp_path / "high" / "tiles.parquet").column_names
    assert names[8:] == ["marks", "marks:a", "marks:b", "risk:attention"]
    alone = run(slides[:1], model, tmp_path / "alone", tasks="age")
    assert answers(alone) == {"high": {"age": answers(report)["high"]["age"]}}
    assert check_qupath(tmp_path / "alone" / "high" / "result.geojson.gz").features == 0


@pytest.mark.slow
def test_worker_processes_give_the_same(
    quiet: tuple[Path, RunReport], slides: list[Path], model: str, tmp_path: Path
) -> None:
    """Two processes: the slide's bag is answered by whichever publishes it."""
    assert answers(run(slides, model, tmp_path, workers=2)) == answers(quiet[1])
