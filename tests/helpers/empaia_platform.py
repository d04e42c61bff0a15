"""A small App API v3 in memory: it judges every body by the platform's schemas, and fails when it is told to.

Written from published models; it is ours, not the platform's own. ``async with FakePlatform() as platform:`` serves
``platform.job`` on loopback; ``with served(FakePlatform()) as platform:`` does so in a thread of its own. ``slides``
holds slides by their id: regions and tiles are cut from them as the real service does it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
from aiohttp import web

from helpers.empaia_schemas import item_problems, model_problems
from helpers.wsi_service import encoded, level_pixels
from wsi_mmm.config import EmpaiaJob
from wsi_mmm.slides import Slide

TOKEN = "header.secret-of-the-job.signature"
JOB = "00000000-0000-4000-8000-00000000000a"
MOST_ITEMS, MOST_PIXELS = 10_000, 25_000_000


@dataclass
class Fault:
    """What becomes of requests whose "METHOD /path" holds ``where``. ``times``: how many; ``done``: after doing them.

    ``status`` 0 breaks the connection off; ``wait``: seconds of silence first.
    """

    where: str
    status: int = 0
    times: int = 1
    done: bool = False
    wait: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakePlatform:
    """``state``: RUNNING, COMPLETED or FAILED. ``log``: "METHOD /path" of each request. ``largest``: bytes.

    ``lenient``: items of collections are not judged (many of them take long). ``unpacks``: compressed tiles are read.
    ``received``, ``sent``: bytes of bodies as they came, and of pictures that were given.
    """

    mode: str = "STANDALONE"
    inputs: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    largest: int = 10_000_000
    state: str = "RUNNING"
    message: str = ""
    outputs: dict[str, Any] = field(default_factory=dict)
    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tiles: dict[tuple[str, int, int, int], bytes] = field(default_factory=dict)
    progress: list[float] = field(default_factory=list)
    slides: Mapping[str, Slide] = field(default_factory=dict)
    lenient: bool = False
    unpacks: bool = True
    received: int = 0
    sent: int = 0
    log: list[str] = field(default_factory=list)
    job: EmpaiaJob = field(init=False)
    _runner: web.AppRunner = field(init=False)

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._guard])
        base = f"/v3/{JOB}"
        app.add_routes(
            [
                web.get(f"{base}/mode", self._mode),
                web.get(f"{base}/configuration", self._configuration),
                web.get(f"{base}/inputs/{{key}}", self._input),
                web.post(f"{base}/outputs/{{key}}", self._output),
                web.post(f"{base}/collections/{{id}}/items", self._items),
                web.put(f"{base}/collections/{{id}}/query", self._query),
                web.put(f"{base}/pixelmaps/{{id}}/level/{{level}}/position/{{x}}/{{y}}/data", self._tile),
                web.get(f"{base}/regions/{{id}}/level/{{l}}/start/{{x}}/{{y}}/size/{{w}}/{{h}}", self._region),
                web.get(f"{base}/tiles/{{id}}/level/{{l}}/position/{{x}}/{{y}}", self._native),
                web.put(f"{base}/progress", self._progress),
                web.put(f"{base}/finalize", self._finalize),
                web.put(f"{base}/failure", self._failure),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.job = EmpaiaJob(f"http://127.0.0.1:{self._runner.addresses[0][1]}", JOB, TOKEN)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def posts(self) -> int:
        """How many posts of items arrived."""
        return sum(line.startswith("POST") and line.endswith("/items") for line in self.log)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        line = f"{request.method} {request.path.removeprefix(f'/v3/{JOB}')}"
        self.log.append(line)
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _no(401, "Not authenticated")
        data = await request.read()
        self.received += request.content_length or len(data)
        fault = next((one for one in self.faults if one.times > 0 and one.where in line), None)
        if fault is None:
            return await self._judged(request, data, handler)
        fault.times -= 1
        await asyncio.sleep(fault.wait)
        if fault.done:
            await self._judged(request, data, handler)
        if fault.status == 0:
            assert request.transport is not None
            request.transport.abort()
        answer = _no(fault.status or 500, f"as told, of {request.headers['Authorization']}")
        answer.headers.update(fault.headers)
        return answer

    async def _judged(self, request: web.Request, data: bytes, handler: Any) -> web.StreamResponse:
        if self.state != "RUNNING":
            return _no(409, f"the job is {self.state}")
        return _no(413, "too large") if len(data) > self.largest else await handler(request)

    async def _mode(self, _: web.Request) -> web.Response:
        return web.json_response({"mode": self.mode})

    async def _configuration(self, _: web.Request) -> web.Response:
        return web.json_response({"global": {}, "customer": {}})

    async def _input(self, request: web.Request) -> web.Response:
        found = self.inputs.get(request.match_info["key"])
        return _no(404, "no such input") if found is None else web.json_response(found)

    async def _output(self, request: web.Request) -> web.Response:
        item, key = await request.json(), request.match_info["key"]
        problems = _problems(item)
        if problems or key in self.outputs:
            return _no(422, *(problems or ["posted already"]))
        self.outputs[key] = kept = _kept(item)
        if item["type"] == "collection":
            self.items[kept["id"]] = [_kept(one) for one in item["items"]]
        return web.json_response(kept, status=201)

    async def _items(self, request: web.Request) -> web.Response:
        items = (await request.json())["items"]
        held = self.items.get(request.match_info["id"])
        if held is None:
            return _no(404, "no such collection")
        if len(items) > MOST_ITEMS:
            return _no(413, "too many items")
        types = {one["type"] for one in itertools.chain(held[:1], items)}
        problems = [] if self.lenient else [text for one in items for text in _problems(one)]
        if problems or len(types) > 1:
            return _no(422, *(problems or ["items of several types"]))
        kept = [_kept(one) for one in items]
        held += kept
        return web.json_response({"item_count": len(kept), "items": kept}, status=201)

    async def _query(self, request: web.Request) -> web.Response:
        if model_problems("ItemQuery", await request.json()):
            return _no(422, "no query")
        held = self.items.get(request.match_info["id"], [])
        skip, limit = int(request.query["skip"]), int(request.query["limit"])
        return web.json_response({"item_count": len(held), "items": held[skip : skip + limit][::-1]})

    async def _tile(self, request: web.Request) -> web.Response:
        at, data = request.match_info, await request.read()
        of = next((one for one in self.outputs.values() if one["id"] == at["id"]), None)
        if of is None:
            return _no(404, "no such pixelmap")
        if "Content-Encoding" in request.headers and not self.unpacks:
            return _no(422, "wrong number of bytes")
        if len(data) != of["tilesize"] ** 2 * of["channel_count"] * np.dtype(of["element_type"]).itemsize:
            return _no(422, "wrong number of bytes")
        self.tiles[at["id"], int(at["level"]), int(at["x"]), int(at["y"])] = data
        return web.Response(status=204)

    async def _region(self, request: web.Request) -> web.Response:
        pixels = int(request.match_info["w"]) * int(request.match_info["h"])
        if pixels > MOST_PIXELS:
            return _no(422, "may not contain more than 25000000 pixels")
        at = {name: int(value) for name, value in request.match_info.items() if name != "id"}
        window = at["x"], at["y"], at["w"], at["h"]
        return await self._picture(request, at["l"], window)

    async def _native(self, request: web.Request) -> web.Response:
        at = {name: int(value) for name, value in request.match_info.items() if name != "id"}
        slide = self.slides.get(request.match_info["id"])
        if slide is None or at["l"] >= len(slide.info.levels):
            return _no(404, "no such tile")
        side = slide.info.levels[0].tile_width, slide.info.levels[0].tile_height
        return await self._picture(request, at["l"], (at["x"] * side[0], at["y"] * side[1], *side))

    async def _picture(self, request: web.Request, level: int, window: tuple[int, int, int, int]) -> web.Response:
        kind = request.query.get("image_format", "jpeg")
        if not self.slides:
            return web.Response(body=f"{window[2] * window[3]} px".encode(), content_type="image/jpeg")
        slide = self.slides.get(request.match_info["id"])
        if slide is None or level >= len(slide.info.levels):
            return _no(404 if slide is None else 422, "no such slide or level")
        query = {name: [value] for name, value in request.query.items()}
        data = await asyncio.to_thread(lambda: encoded(level_pixels(slide, level, window), query))
        self.sent += len(data)
        return web.Response(body=data, content_type=f"image/{kind}")

    async def _progress(self, request: web.Request) -> web.Response:
        said = await request.json()
        if model_problems("PutJobProgress", said):
            return _no(422, "no progress")
        self.progress.append(said["progress"])
        return web.Response(status=204)

    async def _finalize(self, _: web.Request) -> web.Response:
        self.state = "COMPLETED"
        return web.Response(status=202)

    async def _failure(self, request: web.Request) -> web.Response:
        said = await request.json()
        if set(said) != {"user_message"} or not 1 <= len(said["user_message"]) <= 255:
            return _no(422, "no message")
        self.state, self.message = "FAILED", said["user_message"]
        return web.Response(status=200)


@contextmanager
def served(platform: FakePlatform) -> Iterator[FakePlatform]:
    """The platform in a thread of its own, for apps that are no coroutine."""
    ready, ends = threading.Event(), []

    async def serve() -> None:
        stop = asyncio.Event()
        ends.append(partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set))
        async with platform:
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        yield platform
    finally:
        for end in ends:
            end()
        thread.join(30)


def _problems(item: Any) -> list[str]:
    problems = item_problems(item)
    made = item.get("creator_id"), item.get("creator_type")
    return problems if made == (JOB, "job") else [*problems, "the creator is not the job"]


def _kept(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "id": str(uuid.uuid4()), "is_locked": False}


def _no(status: int, *problems: str) -> web.Response:
    return web.Response(status=status, text=json.dumps({"detail": list(map(str, problems))}))
