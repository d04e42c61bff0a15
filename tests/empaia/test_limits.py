"""The platform's limits: ours of the tests refuses what breaks one, and the app breaks none however much there is."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from helpers.empaia_platform import JOB, MOST_ITEMS, TOKEN, FakePlatform
from helpers.wsi_service import described
from wsi_mmm.empaia import bodies
from wsi_mmm.empaia.app import JobEnd
from wsi_mmm.empaia.bodies import Collection, Primitive, Record
from wsi_mmm.empaia.client import AppApi, Limits
from wsi_mmm.empaia.pixelmaps import MapLevel, Pixelmap
from wsi_mmm.errors import OutputError
from wsi_mmm.model.card import read_card
from wsi_mmm.slides import Slide, open_slide
from wsi_mmm.slides.base import Reader, ReadStats
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.slides.service.cuts import GRID_CUTS, RECTANGLE_CUTS
from wsi_mmm.types import Block, Canvas, Level, SlideInfo

from .conftest import WSI_ID, Start, posted, rectangle, regions, run
from .test_posting import INFO, SIDE, WSI, answer, published, send

NUMBER, HALF = Primitive("n", "integer", 7), Primitive("n", "float", 0.5)
MAP = Pixelmap("m", "continuous", "float32", WSI.id, (MapLevel(0, (0, 0, 19, 0)),), limits=(0, 1))
TILE = 256 * 256 * 4
FIFTEEN = bytes(15 * TILE)
GOOD = {"Authorization": f"Bearer {TOKEN}"}
Ask = Callable[..., Any]


def asked(work: Callable[[FakePlatform, Ask], Any], **told: Any) -> Any:
    """``work(platform, ask)`` with a platform, and ``await ask(method, path, ...)``: the status it answers."""

    async def both() -> Any:
        async with FakePlatform(**told) as platform, aiohttp.ClientSession() as session:

            async def ask(method: str, path: str, *, job: str = JOB, headers: Any = GOOD, **request: Any) -> int:
                url = f"{platform.job.api}/v3/{job}{path}"
                if (text := request.pop("json", None)) is not None:
                    request["data"] = json.dumps(text).encode()
                data = io.BytesIO(request.pop("data", b""))
                async with session.request(method, url, headers=headers, data=data, **request) as response:
                    return response.status

            return await work(platform, ask)

    return asyncio.run(both())


def sent(record: Record) -> dict[str, Any]:
    return bodies.body(record, JOB)


def items(count: int) -> dict[str, Any]:
    return {"items": [sent(NUMBER)] * count}


async def prepared(platform: FakePlatform, ask: Ask) -> tuple[str, str]:
    """Ids of an empty collection and of a pixelmap of 20 tiles."""
    for key, record in (("some", Collection("integer")), ("map", MAP)):
        assert await ask("POST", f"/outputs/{key}", json=sent(record)) == 201
    return platform.outputs["some"]["id"], platform.outputs["map"]["id"]


REFUSED: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "10,001 items": (413, "POST", "/collections/{some}/items", {"json": items(MOST_ITEMS + 1)}),
    "10,001 items in an output": (
        413, "POST", "/outputs/more", {"json": {**sent(Collection("integer")), **items(MOST_ITEMS + 1)}},
    ),
    "a query for 10,001": (413, "PUT", "/collections/{some}/query?skip=0&limit=10001", {"json": {}}),
    "items of another type": (422, "POST", "/collections/{some}/items", {"json": {"items": [sent(HALF)]}}),
    "a body of 10 MB and more": (413, "POST", "/collections/{some}/items", {"data": b" " * 10_000_001}),
    "a region above 25 megapixels": (422, "GET", f"/regions/{WSI.id}/level/0/start/0/0/size/5001/5000", {}),
    "17 tiles": (413, "PUT", "/pixelmaps/{map}/level/0/position/start/0/0/end/16/0/data", {"data": bytes(17 * TILE)}),
    "15 tiles as 16": (422, "PUT", "/pixelmaps/{map}/level/0/position/start/0/0/end/15/0/data", {"data": FIFTEEN}),
    "a byte too many": (422, "PUT", "/pixelmaps/{map}/level/0/position/0/0/data", {"data": bytes(TILE + 1)}),
    "a byte too few": (422, "PUT", "/pixelmaps/{map}/level/0/position/0/0/data", {"data": bytes(TILE - 1)}),
    "a byte too few, packed": (
        422, "PUT", "/pixelmaps/{map}/level/0/position/0/0/data",
        {"data": gzip.compress(bytes(TILE - 1)), "headers": {**GOOD, "Content-Encoding": "gzip"}},
    ),
    "a tile beyond the map": (404, "PUT", "/pixelmaps/{map}/level/0/position/20/0/data", {"data": bytes(TILE)}),
    "a level beyond the map": (404, "PUT", "/pixelmaps/{map}/level/1/position/0/0/data", {"data": bytes(TILE)}),
    "an output twice": (422, "POST", "/outputs/some", {"json": sent(Collection("integer"))}),
    "an object of another job": (422, "POST", "/outputs/more", {"json": {**sent(NUMBER), "creator_id": WSI.id}}),
    "no such collection": (404, "POST", f"/collections/{WSI.id}/items", {"json": items(1)}),
    "a message of 256": (422, "PUT", "/failure", {"json": {"user_message": "x" * 256}}),
    "progress of 2": (422, "PUT", "/progress", {"json": {"progress": 2.0}}),
    "no token": (401, "GET", "/mode", {"headers": {}}),
    "a wrong token": (401, "GET", "/mode", {"headers": {"Authorization": f"Bearer {TOKEN}x"}}),
    "a token of another kind": (401, "PUT", "/finalize", {"headers": {"Authorization": f"Basic {TOKEN}"}}),
    "another job": (404, "GET", "/mode", {"job": WSI.id}),
}  # fmt: skip
ALLOWED: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "10,000 items": (201, "POST", "/collections/{some}/items", {"json": items(MOST_ITEMS)}),
    "25 megapixels": (200, "GET", f"/regions/{WSI.id}/level/0/start/0/0/size/5000/5000", {}),
    "16 tiles": (204, "PUT", "/pixelmaps/{map}/level/0/position/start/0/0/end/15/0/data", {"data": bytes(16 * TILE)}),
    "a tile": (204, "PUT", "/pixelmaps/{map}/level/0/position/19/0/data", {"data": bytes(TILE)}),
    "a message of 255": (200, "PUT", "/failure", {"json": {"user_message": "x" * 255}}),
}


@pytest.mark.parametrize("what", REFUSED | ALLOWED)
def test_the_platform_keeps_its_limits(what: str) -> None:
    """A client that breaks a limit is refused by the platform of these tests, and one that just keeps it is not."""
    status, method, path, request = (REFUSED | ALLOWED)[what]

    async def work(platform: FakePlatform, ask: Ask) -> int:
        some, tiles = await prepared(platform, ask)
        found = await ask(method, path.format(some=some, map=tiles), **request)
        untouched = set(platform.outputs) == {"some", "map"} and not (platform.items[some] or platform.tiles)
        assert what in ALLOWED or (untouched and not platform.ends and not platform.progress)
        return int(found)

    assert asked(work, lenient="10,000" in what or "10,001" in what, largest=10_000_000) == status


@pytest.mark.parametrize("end", ["finalize", "failure"])
def test_a_job_that_has_ended_may_do_nothing(end: str) -> None:
    """Whatever is asked after the end, the end itself too, is refused with 409 and changes nothing."""

    async def work(platform: FakePlatform, ask: Ask) -> set[int]:
        some, tiles = await prepared(platform, ask)
        message = {"json": {"user_message": "no"}}
        await ask("PUT", f"/{end}", **(message if end == "failure" else {}))
        state = platform.state
        found = {
            await ask("GET", "/mode"),
            await ask("GET", "/inputs/slide"),
            await ask("GET", f"/regions/{WSI.id}/level/0/start/0/0/size/5/5"),
            await ask("POST", "/outputs/more", json=sent(NUMBER)),
            await ask("POST", f"/collections/{some}/items", json=items(1)),
            await ask("PUT", f"/pixelmaps/{tiles}/level/0/position/0/0/data", data=bytes(TILE)),
            await ask("PUT", "/progress", json={"progress": 0.5}),
            await ask("PUT", "/finalize"),
            await ask("PUT", "/failure", **message),
        }
        assert platform.state == state and platform.ends == [end] and set(platform.outputs) == {"some", "map"}
        assert platform.items == {some: []} and not platform.tiles and not platform.progress
        return found

    assert asked(work, inputs={"slide": {}}) == {409}


# ------------------------------------------------------------------------------------------------ the app


def test_12000_objects_and_many_tiles(tmp_path: Path) -> None:
    """No request of the app breaks a limit: items, bytes, tiles; all of them arrive, once."""
    card, count = read_card("default"), 12_000
    results = published(tmp_path, card, count, **{f"stain:{name}": [0.25] * 2 for name in card.tasks[1].classes})
    flat = replace(INFO, levels=(replace(INFO.levels[0]), Level(SIDE // 8, SIDE // 8, 8.0, 8.0, 256, 256)))
    platform = send(replace(answer(results, card), info=flat), lenient=True)
    assert platform.refused == []
    assert 0 < platform.most <= 5000 < MOST_ITEMS and platform.longest <= 4_194_304 < platform.largest
    for name in ("objects", "classes", "confidences"):
        assert len(platform.items[platform.outputs[f"nuclei_{name}"]["id"]]) == count
    [level] = platform.outputs["nuclei_map"]["levels"]
    across, down = (level[f"position_max_{side}"] - level[f"position_min_{side}"] + 1 for side in "xy")
    assert len(platform.tiles) == across * down > 16
    assert platform.outputs["nuclei_slide_count"]["value"] == count


def test_more_objects_than_a_post_may_have_are_never_in_one() -> None:
    """Also where somebody asks for it: limits beyond the platform's cannot be set."""
    for wrong in ({"items": MOST_ITEMS + 1}, {"pixels": 25_000_001}, {"items": 0}):
        with pytest.raises(OutputError):
            Limits(**wrong)

    async def work() -> FakePlatform:
        async with FakePlatform(lenient=True) as platform, AppApi(platform.job, Limits(items=MOST_ITEMS)) as api:
            some = await api.post_output("some", Collection("integer"))
            assert [len(ids) async for ids in api.post_items(some, [NUMBER] * 12_000)] == [10_000, 2000]
            return platform

    assert asyncio.run(work()).refused == []


@pytest.mark.parametrize("side", [1, 300, 2048, 5000, 5001, 100_000, 1_000_000])
@pytest.mark.parametrize("tile", [1, 255, 256, 1024, 4096, 5000, 8192, 1_000_000])
def test_no_picture_is_above_25_megapixels(side: int, tile: int) -> None:
    """Whatever size a slide has, and whatever its tiles are said to be."""
    for level in (Level(side, side, 1, 1, tile, tile), Level(side, 7, 1, 1, tile, 1), Level(7, side, 1, 1, 1, tile)):
        for cuts in (GRID_CUTS, RECTANGLE_CUTS):
            width, height = cuts.sides(level)
            assert min(width, height) >= 1 and width * height <= 25_000_000


class _Far:
    """A slide of 16,000 x 14,000 px, white but for what another reader shows, 8,000 px from its corner."""

    def __init__(self, inner: Reader) -> None:
        self._inner = inner
        levels = tuple(Level(16_000 // k, 14_000 // k, float(k), float(k), 256, 256) for k in (1, 4, 16))
        self.info = SlideInfo("far", 16_000, 14_000, 0.5, 0.5, levels, "far", "far", "far")

    def read(self, block: Block) -> Canvas:
        origin = {"origin_x": block.origin_x - 8_000, "origin_y": block.origin_y - 8_000}
        return self._inner.read(replace(block, **origin))

    def stats(self) -> ReadStats:
        return ReadStats()

    def close(self) -> None:
        pass


def test_a_large_slide(start: Start, tiny_slide: Path) -> None:
    """16,000 px across, 224 megapixels: no region is too large, nothing is refused."""
    with open_slide(str(tiny_slide)) as slide:
        far = Slide(_Far(ArrayReader(slide.read_region(0, 0, slide.info.width, slide.info.height))))
    given = {"slide": described(far, WSI_ID), "regions": regions(rectangle(8_400, 8_300, 400, 300))}
    platform = start(inputs=given)
    platform.slides = {WSI_ID: far}
    assert run() == JobEnd("finalized")
    assert platform.refused == [] and platform.ends == ["finalize"]
    sizes = [re.search(r"GET /regions/.*/size/(\d+)/(\d+)$", line) for line in platform.log]
    pixels = [int(found[1]) * int(found[2]) for found in sizes if found]
    assert len(pixels) > 1 and max(pixels) <= 4 << 20
    near = [one["coordinates"][0] for one in posted(platform, "nuclei_objects")]
    assert len(near) > 3 and all(min(at) > 8_000 and max(at) < 9_600 for at in near)
