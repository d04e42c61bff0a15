"""A client of the App API v3: what one job may read of its slides and post of its results.

::

    async with AppApi(empaia_job()) as api:
        slide = await api.input("slide")
        cells = await api.post_output("nuclei_objects", Collection("polygon", name="nuclei"))
        async for ids in api.post_items(cells, annotations): ...
        await api.finalize()

Every refusal is a PlatformError with its HTTP status. A job ends once: by `finalize`, or by `failure`.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self
from urllib.parse import quote

from wsi_mmm.config import EmpaiaJob
from wsi_mmm.empaia.bodies import Collection, Record, body, encoded
from wsi_mmm.empaia.pixelmaps import Pixelmap, tile_length
from wsi_mmm.empaia.transport import ApiResponse, Method, Patience, Transport
from wsi_mmm.errors import OutputError, PlatformError

_MESSAGE = 255  # characters of a failure's message
_TOO_LARGE = 413
_UNREADABLE = (400, 415, 422)  # what a platform may say to a tile that it does not unpack
_LEVEL = 1  # of gzip: maps are flat, and the platform unpacks them
_BYTES = "application/octet-stream"
_OVER = (400, 409, 422, 423)  # what a platform may say to a job that has ended
_MOST_ITEMS = 10_000  # what the platform takes in one post
_MOST_PIXELS = 25_000_000  # and gives in one region
_OPEN, _CLOSE = b'{"items":[', b"]}"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one request: objects, bytes of JSON, pixels of a region."""

    items: int = 1000
    body: int = 4_000_000
    pixels: int = 4096 * 4096

    def __post_init__(self) -> None:
        if not (1 <= self.items <= _MOST_ITEMS and self.body >= 1000 and 1 <= self.pixels <= _MOST_PIXELS):
            raise OutputError(f"the platform takes 1 to {_MOST_ITEMS} objects and gives {_MOST_PIXELS} pixels at most")


class Mode(StrEnum):
    """The modes of a job."""

    standalone = "STANDALONE"
    preprocessing = "PREPROCESSING"
    postprocessing = "POSTPROCESSING"
    report = "REPORT"


class AppApi:
    """The App API of one job; open it with ``async with``. One task at a time posts to a collection."""

    def __init__(self, job: EmpaiaJob, limits: Limits | None = None, *, patience: Patience | None = None) -> None:
        self._job, self._limits = job, limits or Limits()
        self._patience = patience or Patience()
        self._transport = Transport(job, self._patience)
        self._counts: dict[str, int] = {}  # collection -> objects that it holds
        self._ended = ""
        self._compresses = True

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.__aexit__(kind, error, trace)

    # -------------------------------------------------------------------------------------------- reading

    async def mode(self) -> Mode:
        """The mode of the job. PlatformError for one that this client does not know."""
        response = await self._get_json("/mode")
        mode = response.get("mode") if isinstance(response, dict) else response
        if not isinstance(mode, str) or mode.upper() not in set(Mode):
            shown = str(mode).replace(self._job.token, "***")[:40]
            raise PlatformError(f"the EMPAIA platform started the app in the unknown mode {shown!r}")
        return Mode(mode.upper())

    async def configuration(self) -> dict[str, object]:
        """The values of the EAD's configuration: ``global`` and ``customer``."""
        response = await self._get_json("/configuration")
        return response if isinstance(response, dict) else {}

    async def input(self, key: str, *, shallow: bool = False) -> object:
        """The input ``key`` of the EAD; ``shallow``: a collection without its items."""
        return await self._get_json(f"/inputs/{_path_part(key)}", shallow="true" if shallow else "false")

    async def region(self, wsi_id: str, level: int, box: tuple[int, int, int, int], *, kind: str = "jpeg") -> bytes:
        """The encoded picture of ``box`` (x, y, width, height), px of that level; white beyond the slide."""
        x, y, width, height = box
        if min(width, height) < 1 or width * height > self._limits.pixels:
            raise OutputError(f"a region of {width} x {height} px; ask for 1 to {self._limits.pixels} px")
        path = f"/regions/{_path_part(wsi_id)}/level/{level}/start/{x}/{y}/size/{width}/{height}"
        return (await self._send_request("GET", path, query={"image_format": kind})).data

    async def tile(self, wsi_id: str, level: int, position: tuple[int, int], *, kind: str = "jpeg") -> bytes:
        """The encoded picture of the slide's own tile at ``position`` (column, row) of a level."""
        path = f"/tiles/{_path_part(wsi_id)}/level/{level}/position/{position[0]}/{position[1]}"
        return (await self._send_request("GET", path, query={"image_format": kind})).data

    # -------------------------------------------------------------------------------------------- posting

    async def post_output(self, key: str, record: Record) -> str:
        """Post ``record`` as the output ``key`` of the EAD: its id. Never posted twice."""
        data = encoded(body(record, self._job.id))
        if len(data) > self._limits.body:
            raise OutputError(f"output '{key}' has {len(data)} bytes; post it empty and its items in batches")
        posted = id_of((await self._send_request("POST", f"/outputs/{_path_part(key)}", data=data)).parsed())
        if isinstance(record, Collection):
            self._counts[posted] = len(record.items)
        return posted

    async def post_items(self, collection_id: str, records: Iterable[Record]) -> AsyncIterator[list[str]]:
        """Add ``records`` to a collection that this client posted: the ids of each batch, in order.

        No object is posted twice: when an answer is lost, the platform is asked what it holds.
        """
        for batch in batches(records, self._job.id, self._limits):
            yield await self._post_batch(collection_id, batch)

    async def put_tile(self, pixelmap: Pixelmap, pixelmap_id: str, place: tuple[int, int, int], *, data: bytes) -> None:
        """Write the tile at ``place`` (level, column, row); its bytes are those of `pixelmaps.tile_bytes`.

        They go compressed, unless the platform has refused one that was and taken it as it is.
        """
        if len(data) != tile_length(pixelmap):
            raise OutputError(f"a tile of '{pixelmap.name}' has {tile_length(pixelmap)} bytes, not {len(data)}")
        level, x, y = place
        path = f"/pixelmaps/{_path_part(pixelmap_id)}/level/{level}/position/{x}/{y}/data"
        if self._compresses:
            packed = gzip.compress(data, _LEVEL)
            response = await self._transport.ask("PUT", path, data=packed, kind=_BYTES, coding="gzip")
            if response.good or response.status not in _UNREADABLE:
                self._check_response(response, f"PUT {path}")
                return
        await self._send_request("PUT", path, data=data, kind=_BYTES)
        self._compresses = False

    async def query(self, collection_id: str, *, skip: int, limit: int) -> tuple[int, list[Mapping[str, object]]]:
        """(how many objects a collection holds, ``limit`` of them from ``skip`` on)."""
        path = f"/collections/{_path_part(collection_id)}/query"
        window = {"skip": str(skip), "limit": str(limit)}
        found = (await self._send_request("PUT", path, query=window, data=b"{}")).parsed()
        count, items = (found.get("item_count"), found.get("items")) if isinstance(found, dict) else (None, None)
        if not isinstance(count, int) or not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
            raise PlatformError("the EMPAIA platform did not say what a collection holds")
        return count, items

    # -------------------------------------------------------------------------------------------- the job

    async def progress(self, done: float) -> None:
        """Say how far the work is, 0 to 1. A platform that does not want to know is no error."""
        value = min(max(done, 0.0), 1.0) if math.isfinite(done) else 0.0
        await self._transport.ask("PUT", "/progress", data=json.dumps({"progress": value}).encode())

    async def finalize(self) -> None:
        """The job is done and its outputs are complete. RuntimeError when it has ended already."""
        await self._end_job("finalize", None)

    async def failure(self, message: str) -> None:
        """The job failed: ``message`` is for a pathologist; one line, cut to 255 characters, never with the token."""
        text = " ".join(message.replace(self._job.token, "***").split()) or "The app failed."
        short = text if len(text) <= _MESSAGE else text[: _MESSAGE - 1] + "…"
        await self._end_job("failure", encoded({"user_message": short}))

    async def _end_job(self, how: str, data: bytes | None) -> None:
        if self._ended:
            raise RuntimeError(f"the job has ended already: {self._ended}")
        self._ended = how  # before waiting, so that nobody ends it a second time meanwhile
        try:
            response, lost = await self._transport.ask("PUT", f"/{how}", data=data, again=False), False
            for pause in self._patience.pauses():
                if not response.unclear:
                    break
                await asyncio.sleep(pause)
                response, lost = await self._transport.ask("PUT", f"/{how}", data=data, again=False), True
            if not (lost and response.status in _OVER):  # it had arrived, although nobody said so
                self._check_response(response, f"PUT /{how}")
        except BaseException:
            self._ended = ""  # it has not ended: it may still fail
            raise

    # -------------------------------------------------------------------------------------------- requests

    async def _post_batch(self, collection_id: str, batch: list[bytes]) -> list[str]:
        path, data = f"/collections/{_path_part(collection_id)}/items", _OPEN + b",".join(batch) + _CLOSE
        response = await self._transport.ask("POST", path, data=data)
        for pause in self._patience.pauses():
            if not response.unclear:
                break
            found = await self._recover_ids(collection_id, batch)
            if found is not None:
                return found
            await asyncio.sleep(pause)
            response = await self._transport.ask("POST", path, data=data)  # none had arrived
        if response.status == _TOO_LARGE and len(batch) > 1:
            first, rest = batch[: len(batch) // 2], batch[len(batch) // 2 :]
            return await self._post_batch(collection_id, first) + await self._post_batch(collection_id, rest)
        ids = ids_of(self._check_response(response, "posting objects").parsed(), len(batch))
        self._counts[collection_id] = self._counts.get(collection_id, 0) + len(batch)
        return ids

    async def _recover_ids(self, collection_id: str, batch: list[bytes]) -> list[str] | None:
        """The ids of a batch whose answer was lost; None when the platform has none of it."""
        before, count = self._counts.get(collection_id, 0), len(batch)
        held, items = await self.query(collection_id, skip=before, limit=count)
        if held == before:
            return None
        if held != before + count:
            raise PlatformError(f"a collection holds {held} objects where {before} or {before + count} were posted")
        ids = match_ids(batch, items)
        self._counts[collection_id] = held
        return ids

    async def _get_json(self, path: str, **query: str) -> object:
        return (await self._send_request("GET", path, query=query)).parsed()

    async def _send_request(
        self,
        method: Method,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        data: bytes | None = None,
        kind: str = "application/json",
    ) -> ApiResponse:
        response = await self._transport.ask(method, path, query=query, data=data, kind=kind)
        return self._check_response(response, f"{method} {path}")

    def _check_response(self, response: ApiResponse, what: str) -> ApiResponse:
        """``answer`` if it is a 2xx; PlatformError in one line otherwise."""
        if response.good:
            return response
        refused = f"refused {what} ({response.status}): {response.problem}"
        text = refused if response.status else f"{response.problem}: {what}"
        error = PlatformError(f"the EMPAIA platform {text}".replace(self._job.token, "***"))
        error.status = response.status
        raise error


def _path_part(text: str) -> str:
    """``text`` as one part of a path, whatever characters it has."""
    return quote(text, safe="")


# ------------------------------------------------------------------------------------------------ batches


def batches(records: Iterable[Record], job_id: str, limits: Limits) -> Iterator[list[bytes]]:
    """``records`` in order, in batches within the limits; one batch at a time is in memory."""
    held: list[bytes] = []
    size = room = limits.body - len(_OPEN) - len(_CLOSE)
    for record in records:
        text = encoded(body(record, job_id))
        if len(text) > room:
            raise OutputError(f"one object has {len(text)} bytes; the platform takes {limits.body} in a request")
        if held and (len(held) == limits.items or len(text) + 1 > size):
            yield held
            held, size = [], room
        held.append(text)
        size -= len(text) + 1
    if held:
        yield held


def ids_of(answer: object, count: int) -> list[str]:
    """The ids of ``count`` objects in the answer to their post, in order. PlatformError when it has others."""
    items = answer.get("items") if isinstance(answer, dict) else answer
    if not isinstance(items, list) or len(items) != count:
        raise PlatformError(f"the EMPAIA platform did not answer with the {count} objects that were posted")
    return [id_of(item) for item in items]


def id_of(answer: object) -> str:
    """The id of a posted object. PlatformError when the answer has none."""
    found = answer.get("id") if isinstance(answer, dict) else None
    if not isinstance(found, str) or not found:
        raise PlatformError("the EMPAIA platform answered without the id of what was posted")
    return found


def match_ids(sent: Sequence[bytes], found: Sequence[Mapping[str, object]]) -> list[str]:
    """The ids of ``sent`` among the objects ``found`` on the platform, by all that was sent of each.

    Objects that are alike in everything may stand for each other. PlatformError unless every one is found.
    """
    waiting: dict[str, list[str]] = {}
    wanted: list[dict[str, object]] = [json.loads(text) for text in sent]
    fields = sorted({name for item in wanted for name in item})
    for item in found:
        waiting.setdefault(_comparison_key(item, fields), []).append(id_of(item))
    keys = [_comparison_key(item, fields) for item in wanted]
    if any(count > len(waiting.get(key, ())) for key, count in Counter(keys).items()):
        raise PlatformError("the connection broke while objects were posted, and the platform does not show them all")
    return [waiting[key].pop(0) for key in keys]


def _comparison_key(item: Mapping[str, object], fields: Sequence[str]) -> str:
    return json.dumps([item.get(name) for name in fields], sort_keys=True)
