"""The App API v3 of the platform of the tests, with its limits."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Annotated, Any

import requests
from empaia_app_test_suite.models.v3.annotation.collections import ItemQuery, PostItemListApps
from empaia_app_test_suite.models.v3.job import PutJobProgress
from empaia_app_test_suite.models.v3.slide import SlideInfo
from fake_store import MOST_ITEMS, Json, judged, of_type, store
from fastapi import APIRouter, Body, Depends, HTTPException, Request, Response
from pydantic import TypeAdapter

MOST_PIXELS, MOST_TILES, LONGEST = 25_000_000, 16, 10_000_000
WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}
APP_ITEMS, QUERY, SLIDE_INFO = TypeAdapter(PostItemListApps), TypeAdapter(ItemQuery), TypeAdapter(SlideInfo)


async def running(job_id: str, request: Request) -> Json:
    """The job of a request. 401 without its token; 409 when it does not run; 413 for a long body."""
    seen = store.seen.get(job_id, {})
    seen.setdefault("requests", []).append(f"{request.method} {request.url.path.split(job_id)[-1]}")
    if request.headers.get("Authorization") != f"Bearer {seen.get('token')}":
        raise HTTPException(401, "Not authenticated")
    if store.jobs[job_id]["status"] != "RUNNING":
        raise HTTPException(409, f"the job is {store.jobs[job_id]['status']}")
    if len(await request.body()) > LONGEST:
        raise HTTPException(413, "Request Entity Too Large")
    return store.jobs[job_id]


Running = Annotated[Json, Depends(running)]
app_api = APIRouter(prefix="/app-api/v3/{job_id}")


@app_api.get("/mode")
async def mode(job: Running) -> Json:
    return {"mode": job["mode"]}


@app_api.get("/configuration")
async def configuration(job: Running) -> Json:
    return {"global": {}, "customer": {}}


@app_api.get("/inputs/{key}")
async def read_input(job: Running, key: str, shallow: bool = False) -> Json:
    thing = job["inputs"].get(key)
    if thing is None:
        raise HTTPException(404, f"the job has no input {key}")
    if thing not in store.slides:
        return store.shown(thing, shallow=shallow)
    info = json.loads((await picture(f"/slides/{thing}/info", {})).body)
    return judged(SLIDE_INFO, info) | {name: store.slides[thing][name] for name in ("tissue", "stain")}


@app_api.post("/outputs/{key}", status_code=201)
async def post_output(job: Running, key: str, item: Annotated[Any, Body()]) -> Json:
    if key in job["outputs"]:
        raise HTTPException(409, f"the job has the output {key} already")
    if isinstance(item, dict) and len(item.get("items") or ()) > MOST_ITEMS:
        raise HTTPException(413, f"more than {MOST_ITEMS} items")
    kept = store.keep(of_type(item, app=True))
    job["outputs"][key] = kept["id"]
    return kept


@app_api.post("/collections/{collection}/items", status_code=201)
async def post_items(job: Running, collection: str, posted: Annotated[Any, Body()]) -> Json:
    judged(APP_ITEMS, posted)
    return store.add(collection, [of_type(one, app=True) for one in posted["items"]])


@app_api.put("/collections/{collection}/query")
async def query_items(
    job: Running, collection: str, query: Annotated[Any, Body()], skip: int = 0, limit: int = MOST_ITEMS
) -> Json:
    judged(QUERY, query)
    return store.part(collection, skip, limit)


@app_api.get("/regions/{wsi}/level/{level}/start/{x}/{y}/size/{width}/{height}")
async def region(
    job: Running, request: Request, wsi: str, level: int, x: int, y: int, width: int, height: int
) -> Response:
    if width * height > MOST_PIXELS:
        raise HTTPException(422, f"may not contain more than {MOST_PIXELS} pixels")
    path = f"/slides/{_slide(job, wsi)}/region/level/{level}/start/{x}/{y}/size/{width}/{height}"
    return await picture(path, dict(request.query_params))


@app_api.get("/tiles/{wsi}/level/{level}/position/{x}/{y}")
async def tile(job: Running, request: Request, wsi: str, level: int, x: int, y: int) -> Response:
    return await picture(f"/slides/{_slide(job, wsi)}/tile/level/{level}/tile/{x}/{y}", dict(request.query_params))


def _slide(job: Json, wsi: str) -> str:
    if wsi not in job["inputs"].values():
        raise HTTPException(404, "the job has no such slide")
    return wsi


async def picture(path: str, query: Json) -> Response:
    """What the WSI service answers."""
    answer = await asyncio.to_thread(requests.get, f"{store.wsi_service}/v3{path}", params=query, timeout=60)
    return Response(answer.content, answer.status_code, media_type=answer.headers.get("Content-Type"))


@app_api.put("/pixelmaps/{pixelmap}/level/{level}/position/{x}/{y}/data", status_code=204)
async def put_tile(job: Running, request: Request, pixelmap: str, level: int, x: int, y: int) -> Response:
    return await write(request, pixelmap, level, (x, y, x, y))


@app_api.put("/pixelmaps/{pixelmap}/level/{level}/position/start/{x0}/{y0}/end/{x1}/{y1}/data", status_code=204)
async def put_tiles(
    job: Running, request: Request, pixelmap: str, level: int, x0: int, y0: int, x1: int, y1: int
) -> Response:
    return await write(request, pixelmap, level, (x0, y0, x1, y1))


async def write(request: Request, pixelmap: str, level: int, box: tuple[int, int, int, int]) -> Response:
    """Tiles of a pixelmap, both ends of ``box`` in it. 404 beyond its range; 413 for too many; 422 for wrong bytes."""
    of, (x0, y0, x1, y1) = store.shown(pixelmap), box
    span = next((one for one in of["levels"] if one["slide_level"] == level), None)
    low = (span or {}).get("position_min_x", 0), (span or {}).get("position_min_y", 0)
    high = (span or {}).get("position_max_x", 1 << 30), (span or {}).get("position_max_y", 1 << 30)
    if span is None or not (low[0] <= x0 <= x1 <= high[0] and low[1] <= y0 <= y1 <= high[1]):
        raise HTTPException(404, "the pixelmap has no such tiles")
    places = [(level, x, y) for y in range(y0, y1 + 1) for x in range(x0, x1 + 1)]
    if len(places) > MOST_TILES:
        raise HTTPException(413, f"more than {MOST_TILES} tiles")
    data = await request.body()
    data = gzip.decompress(data) if request.headers.get("Content-Encoding") == "gzip" else data
    one = of["tilesize"] ** 2 * of["channel_count"] * WIDTH["".join(filter(str.isdigit, of["element_type"]))]
    if len(data) != one * len(places):
        raise HTTPException(422, f"{len(data)} bytes instead of {one * len(places)}")
    held = store.tiles.setdefault(pixelmap, {})
    held |= {place: data[one * n : one * (n + 1)] for n, place in enumerate(places)}
    return Response(status_code=204)


@app_api.put("/progress", status_code=204)
async def progress(job: Running, said: PutJobProgress) -> None:
    job["progress"] = said.progress


@app_api.put("/finalize", status_code=204)
async def finalize(job: Running) -> None:
    store.turn(job, "COMPLETED")


@app_api.put("/failure", status_code=204)
async def failure(job: Running, user_message: Annotated[str, Body(embed=True, max_length=255)]) -> None:
    store.turn(job, "FAILED", user_message)
