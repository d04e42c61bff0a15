"""Posting what was found: few requests, memory that does not grow, and the outputs of every kind of task."""

from __future__ import annotations

import asyncio
import gc
import io
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from helpers.empaia_platform import FakePlatform
from wsi_mmm.empaia import posting
from wsi_mmm.empaia.app import LIMITS
from wsi_mmm.empaia.bodies import Polygon, Record, Wsi, body
from wsi_mmm.empaia.client import AppApi, Mode
from wsi_mmm.empaia.ead import ead
from wsi_mmm.empaia.geometry import area_of
from wsi_mmm.empaia.job_inputs import JobInputs, Region
from wsi_mmm.empaia.posting import JobOutputs, post_all
from wsi_mmm.empaia.results import Outline, Results
from wsi_mmm.errors import JobError
from wsi_mmm.model.card import ModelCard, read_card
from wsi_mmm.outputs.geojson import GeoJSONWriter
from wsi_mmm.types import Level, Objects, SlideInfo, TaskInfo

SIDE = 40_000
WSI = Wsi("b10648a7-340d-43fc-a2d9-4d91cc86f33f", SIDE, SIDE, 250.0)
ROI = "11111111-1111-4111-8111-111111111111"
LEVELS = tuple(Level(SIDE // k, SIDE // k, float(k), float(k), 256, 256) for k in (1, 4, 16))
INFO = SlideInfo("s", SIDE, SIDE, 0.25, 0.25, LEVELS, "v", "r", "f")
TISSUE = [
    Polygon(((0, 0), (20_000, 0), (20_000, 20_000))),
    Polygon(((30_000, 30_000), (31_000, 30_000), (31_000, 31_000))),
]


def squares(task: str, count: int) -> Objects:
    """``count`` octagons of 30 px across on a grid, with a probability."""
    at = np.stack([np.arange(count) % 900, np.arange(count) // 900], axis=1) * 40.0 + 20
    angle = np.arange(8) * np.pi / 4
    ring = 15 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    coords = (at[:, None] + ring).reshape(-1, 2)
    anchor, which = at[:, ::-1].astype(np.int64), np.zeros(count, np.int32)
    numbers = {"probability": np.linspace(0.5, 1, count)}
    return Objects(task, coords, np.arange(0, 8 * count + 1, 8), np.arange(count + 1), which, anchor, numbers)


def published(folder: Path, card: ModelCard, count: int, **columns: Any) -> Results:
    """A folder as a run leaves it: ``count`` objects of each task that draws some, and a table of tiles."""
    drawing = [task for task in card.tasks if task.kind in ("instances", "detect", "segment", "multisegment")]
    infos = [TaskInfo(task.name, task.kind, task.classes, task.colors) for task in drawing]
    with GeoJSONWriter(folder / "result.geojson.gz", "f", infos) as writer:
        for task in drawing:
            writer.write(squares(task.name, count))
    tiles = len(next(iter(columns.values()), []))
    table = {
        "x": [1000 * i for i in range(tiles)],
        "y": [0] * tiles,
        "width0": [1000] * tiles,
        "height0": [1000] * tiles,
    }
    buffer = io.BytesIO()
    parquet.write_table(pa.table(table | columns), buffer)
    (folder / "tiles.parquet").write_bytes(buffer.getvalue())
    files = {"geojson": "result.geojson.gz", "tiles": "tiles.parquet"}
    return Results(
        str(folder), {"objects": {task.name: count for task in drawing}, "files": files, "mpp_effective": 0.5}
    )


def answer(results: Results, card: ModelCard, mode: Mode = Mode.preprocessing) -> JobOutputs:
    area = area_of(np.array([(0.0, 0.0), (2000, 0), (2000, 2000), (0, 2000)]), WSI)
    assert area is not None
    regions = (Region(ROI, area),) if mode is Mode.standalone else ()
    return JobOutputs(JobInputs(mode, WSI, regions), card, "wsi_mmm", results, TISSUE, INFO)


def send(what: JobOutputs, **told: Any) -> FakePlatform:
    async def both() -> FakePlatform:
        async with FakePlatform(**told) as platform, AppApi(platform.job, LIMITS) as api:
            await post_all(api, what, lambda share: None)
            return platform

    return asyncio.run(both())


def test_5000_objects_in_few_requests(tmp_path: Path) -> None:
    """With their classes and confidences they are ten requests at most, empty collections included."""
    card = read_card("default")
    results = published(tmp_path, card, 5000, **{f"stain:{name}": [0.25] * 2 for name in card.tasks[1].classes})
    platform = send(answer(results, card, Mode.standalone), lenient=True)
    nuclei = [line for line in platform.log if line.startswith("POST /outputs/nuclei_") and line.endswith(("s", "ses"))]
    filled = [platform.outputs[f"nuclei_{name}"]["id"] for name in ("objects", "classes", "confidences")]
    requests = sum(f"/collections/{one}/items" in line for one in filled for line in platform.log)
    assert [len(platform.items[one]) for one in filled] == [5000] * 3
    assert requests + 3 <= 10 and len(nuclei) == 5  # three, counts and densities
    assert len(platform.tiles) == len([line for line in platform.log if line.endswith("/data")]) == 3


class _Sink:
    """Takes what is posted and keeps nothing of it. ``held``: most outlines that were in memory at a post."""

    def __init__(self) -> None:
        self.items, self.most, self.held = 0, 0, 0

    async def post_output(self, key: str, record: Record) -> str:
        return key

    async def post_items(self, collection: str, records: Iterable[Record]) -> AsyncIterator[list[str]]:
        ids = [f"{self.items + i:08x}-1111-4111-8111-111111111111" for i, _ in enumerate(records)]
        self.items, self.most = self.items + len(ids), max(self.most, len(ids))
        self.held = max(self.held, sum(type(one) is Outline for one in gc.get_objects()))
        yield ids

    async def put_tile(self, *_: Any, **__: Any) -> None:
        pass


def test_memory_is_that_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many objects there are, never more than two pieces of them are in memory, and one is in a request."""
    monkeypatch.setattr(posting, "BLOCK", 500)
    card, sink = read_card("default"), _Sink()
    asyncio.run(post_all(sink, answer(published(tmp_path, card, 4321), card), lambda share: None))  # type: ignore[arg-type]
    assert sink.items == 3 * 4321 + len(TISSUE) and sink.most == 500 <= sink.held <= 1000


def _card(*tasks: dict[str, Any]) -> ModelCard:
    known = read_card("default").model_dump()
    made = [{"colors": [[1, 2, 3]] * len(task["classes"]), "outputs": 1, "params": {}, **task} for task in tasks]
    return ModelCard.model_validate({**known, "tasks": made})


OTHERS = (
    {"name": "cells", "kind": "detect", "head": "dense", "classes": ["a", "b"]},
    {"name": "areas", "kind": "multisegment", "head": "map", "classes": ["tumour", "stroma"]},
    {"name": "age", "kind": "regress", "head": "vector", "classes": ["years"]},
    {"name": "marks", "kind": "multilabel", "head": "vector", "classes": ["x", "y"]},
    {"name": "grade", "kind": "classify", "head": "bag", "classes": ["low", "high"]},
)
COLUMNS = {"age": [20.0, 40.0], "marks:x": [0.25, 0.75], "marks:y": [0.0, 1.0]}


@pytest.mark.parametrize("mode", [Mode.standalone, Mode.preprocessing])
def test_every_kind_of_task_posts_what_its_ead_promises(tmp_path: Path, mode: Mode) -> None:
    """All outputs of the mode and no others, each accepted by the platform's schemas, with classes of the EAD."""
    card = _card(*OTHERS)
    results = published(tmp_path, card, 40, **COLUMNS)
    results.facts["answers"] = {"grade": "high", "grade:low": 0.1, "grade:high": 0.9}  # type: ignore[index]
    platform = send(answer(results, card, mode))
    promised = ead(card)
    assert set(platform.outputs) == set(promised["modes"][mode.lower()]["outputs"])
    assert (
        platform.outputs["age_slide_value"]["value"] == 30 and platform.outputs["grade_slide_class"]["value"] == "high"
    )
    values = {
        key: platform.items[platform.outputs[key]["id"]]
        for key in platform.outputs
        if key.endswith(("values", "classes"))
    }
    assert [one["value"] for one in values["marks_slide_values"]] == [0.5, 0.5]
    base = f"{promised['namespace']}.classes"
    assert {one["value"] for one in values["grade_classes"]} == {f"{base}.grade.high"}
    assert {one["value"] for one in values["areas_classes"]} == {f"{base}.areas.tumour"}
    assert len(values["areas_classes"]) == len(values["cells_classes"]) == 40


def test_a_number_that_nobody_knows_is_a_failure(tmp_path: Path) -> None:
    """Without tiles there is nothing to average: no 0 is made up."""
    card = _card({"name": "age", "kind": "regress", "head": "vector", "classes": ["years"]})
    with pytest.raises(JobError, match="No tissue"):
        send(answer(published(tmp_path, card, 0, age=[]), card))


def test_tissue_has_the_class_of_its_tiles(tmp_path: Path) -> None:
    """Each piece by the tiles that meet it; one without tiles has the class of the slide."""
    card = _card({"name": "stain", "kind": "classify", "head": "vector", "classes": ["H&E", "IHC"]})
    shares = [0.9] * 20 + [0.0] * 10 + [0.0]
    results = published(tmp_path, card, 0, **{"stain:H&E": shares, "stain:IHC": [1 - one for one in shares]})
    platform = send(answer(results, card))
    found = [one["value"].rsplit(".", 1)[1] for one in platform.items[platform.outputs["stain_classes"]["id"]]]
    assert found == ["H_and_E", "H_and_E"] and platform.outputs["stain_slide_class"]["value"] == "H&E"


def test_names_of_bodies_are_those_of_the_card(tmp_path: Path) -> None:
    """An object is called by its class."""
    [record] = [one for one in body_records(tmp_path) if one["type"] == "polygon"][:1]
    assert record["name"] == "nucleus" and record["npp_created"] == 500.0


def body_records(folder: Path) -> list[dict[str, Any]]:
    class Keeper(_Sink):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[dict[str, Any]] = []

        async def post_items(self, collection: str, records: Iterable[Record]) -> AsyncIterator[list[str]]:
            some = list(records)
            if collection == "nuclei_objects":
                self.kept += [json.loads(json.dumps(body(one, "job"))) for one in some]
            async for ids in super().post_items(collection, some):
                yield ids

    card, keeper = read_card("default"), Keeper()
    asyncio.run(post_all(keeper, answer(published(folder, card, 3), card), lambda share: None))  # type: ignore[arg-type]
    return keeper.kept
