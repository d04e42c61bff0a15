"""A small App API v3 in memory: it judges every body by the platform's schemas, and fails when it is told to.

Written from published models; it is ours, not the platform's own. ``async with FakePlatform() as platform:`` serves
``platform.job`` on loopback; ``with served(FakePlatform()) as platform:`` does so in a thread of its own. ``slides``
holds slides by their id: regions and tiles are cut from them as the real service does it.
"""

from __future__ import annotations

import asyncio
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
MOST_ITEMS, MOST_PIXELS, MOST_TILES = 10_000, 25_000_000, 16


@dataclass
class Fault:
    """What becomes of requests whose "METHOD /path" holds ``where``. ``times``: how many; ``done``: after doing them.

    ``status`` 0 breaks the connection off (``torn``: in the middle of an answer); ``wait``: seconds of silence first.
    ``after``: so many are answered before. ``late``: they are answered as always, after the wait; ``twice``: as always,
    but the second time they are done, as something between app and platform may repeat them.
    """

    where: str
    status: int = 0
    times: int = 1
    done: bool = False
    wait: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    torn: bool = False
    late: bool = False
    twice: bool = False

    def meets(self, line: str) -> bool:
        """Whether a request meets this fault."""
        if self.times <= 0 or self.where not in line:
            return False
        self.after -= 1
        return self.after < 0


@dataclass
class FakePlatform:
    """``state``: RUNNING, COMPLETED or FAILED. ``log``: "METHOD /path" of each request. ``largest``: bytes.

    ``ends``: each "finalize" and "failure" that was taken. ``refused``: "STATUS METHOD /path" of what broke a rule.

    ``lenient``: items of collections are not judged (many of them take long). ``unpacks``: compressed tiles are read.
    ``received``, ``sent``: bytes of bodies as they came, and of pictures that were given. ``longest``, ``most``: bytes
    of the longest body as it is read, items of the largest post.
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
    longest: int = 0
    most: int = 0
    log: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
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
                web.put(
                    f"{base}/pixelmaps/{{id}}/level/{{level}}/position/start/{{x0}}/{{y0}}/end/{{x1}}/{{y1}}/data",
                    self._tile,
                ),
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
        line = _line(request)
        self.log.append(line)
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _no(401, "Not authenticated")
        data = await request.read()
        self.received += request.content_length or len(data)
        self.longest = max(self.longest, len(data))
        fault = next((one for one in self.faults if one.meets(line)), None)
        if fault is None:
            return await self._judged(request, data, handler)
        fault.times -= 1
        await asyncio.sleep(fault.wait)
        if fault.done or fault.twice:
            await self._judged(request, data, handler)
        if fault.late or fault.twice:
            return await self._judged(request, data, handler)
        if fault.torn:
            await _begin(request)
        if fault.status == 0:
            assert request.transport is not None
            request.transport.abort()
        answer = _no(fault.status or 500, f"as told, of {request.headers['Authorization']}")
        answer.headers.update(fault.headers)
        return answer

    async def _judged(self, request: web.Request, data: bytes, handler: Any) -> web.StreamResponse:
        if self.state != "RUNNING":
            answer: web.StreamResponse = _no(409, f"the job is {self.state}")
        else:
            answer = _no(413, "too large") if len(data) > self.largest else await handler(request)
        if answer.status >= 400:
            self.refused.append(f"{answer.status} {_line(request)}")
        return answer

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
        if len(item.get("items", ())) > MOST_ITEMS:
            return _no(413, "too many items")
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
        self.most = max(self.most, len(items))
        if len(items) > MOST_ITEMS:
            return _no(413, "too many items")
        [of] = [one["item_type"] for one in self.outputs.values() if one["id"] == request.match_info["id"]]
        problems = [] if self.lenient else [text for one in items for text in _problems(one)]
        if problems or any(one["type"] != of for one in items):
            return _no(422, *(problems or [f"the collection holds items of type {of}"]))
        kept = [_kept(one) for one in items]
        held += kept
        return web.json_response({"item_count": len(kept), "items": kept}, status=201)

    async def _query(self, request: web.Request) -> web.Response:
        if model_problems("ItemQuery", await request.json()):
            return _no(422, "no query")
        held = self.items.get(request.match_info["id"], [])
        skip, limit = int(request.query["skip"]), int(request.query["limit"])
        if limit > MOST_ITEMS:
            return _no(413, "too many items")
        return web.json_response({"item_count": len(held), "items": held[skip : skip + limit][::-1]})

    async def _tile(self, request: web.Request) -> web.Response:
        """One tile, or several with both ends of their range in it, row by row."""
        at, data = request.match_info, await request.read()
        x0, y0 = int(at.get("x", at.get("x0", 0))), int(at.get("y", at.get("y0", 0)))
        x1, y1 = int(at.get("x1", x0)), int(at.get("y1", y0))
        of = next((one for one in self.outputs.values() if one["id"] == at["id"]), None)
        places = [(int(at["level"]), x, y) for y in range(y0, y1 + 1) for x in range(x0, x1 + 1)]
        if of is None or not places or not all(_has(of, *place) for place in places):
            return _no(404, "no such pixelmap or tile")
        if len(places) > MOST_TILES:
            return _no(413, "too many tiles")
        if "Content-Encoding" in request.headers and not self.unpacks:
            return _no(422, "wrong number of bytes")
        one = of["tilesize"] ** 2 * of["channel_count"] * np.dtype(of["element_type"]).itemsize
        if len(data) != one * len(places):
            return _no(422, "wrong number of bytes")
        for number, place in enumerate(places):
            self.tiles[(at["id"], *place)] = data[one * number : one * (number + 1)]
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
        key = (slide.info.fingerprint, level, window, tuple(request.query.items()))
        data = _seen.get(key) or await asyncio.to_thread(_cut, slide, level, window, dict(request.query))
        _seen[key] = data
        if len(_seen) > _MOST_SEEN:
            del _seen[next(iter(_seen))]
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
        self.ends.append("finalize")
        return web.Response(status=202)

    async def _failure(self, request: web.Request) -> web.Response:
        said = await request.json()
        if set(said) != {"user_message"} or not 1 <= len(said["user_message"]) <= 255:
            return _no(422, "no message")
        self.state, self.message = "FAILED", said["user_message"]
        self.ends.append("failure")
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


_MOST_SEEN = 16  # pictures
_seen: dict[tuple[Any, ...], bytes] = {}


def _cut(slide: Slide, level: int, window: tuple[int, int, int, int], query: Mapping[str, str]) -> bytes:
    return encoded(level_pixels(slide, level, window), {name: [value] for name, value in query.items()})


def _has(pixelmap: dict[str, Any], level: int, x: int, y: int) -> bool:
    """Whether the description of a pixelmap has this tile."""
    of = next((one for one in pixelmap.get("levels", ()) if one["slide_level"] == level), None)
    if of is None:
        return False
    low, high = (
        [of.get(f"position_{end}_{side}", otherwise) for side in "xy"]
        for end, otherwise in (("min", 0), ("max", 1 << 30))
    )
    return bool(low[0] <= x <= high[0] and low[1] <= y <= high[1])


def _line(request: web.Request) -> str:
    return f"{request.method} {request.path.removeprefix(f'/v3/{JOB}')}"


async def _begin(request: web.Request) -> None:
    """Send the head of an answer and some of its body."""
    answer = web.StreamResponse()
    answer.content_length = 1000
    await answer.prepare(request)
    await answer.write(b'{"id": ')


def _no(status: int, *problems: str) -> web.Response:
    return web.Response(status=status, text=json.dumps({"detail": list(map(str, problems))}))
