"""Requests to the App API: bearer token, verified TLS, time-outs, retries. The only home of aiohttp here.

The token is in no error, log or repr: what the library says is put into words of ours, and its exceptions, which hold
the headers of the request, are dropped.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import aiohttp

from wsi_mmm.config import EmpaiaJob
from wsi_mmm.errors import PlatformError
from wsi_mmm.storage.retry import RetryPolicy

_BUSY = frozenset({502, 503, 504})
_TOO_MANY = 429
_LONGEST_WAIT = 30.0  # seconds, also of what Retry-After asks for
_REASON_BYTES = 10_000  # bytes of an answer in which its reason is looked for: longer than tokens are
_LONGEST_BODY = 512 << 20  # bytes of the longest answer that is read

Method = Literal["GET", "POST", "PUT", "DELETE"]


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds for a whole request and for connecting; how often to try, and the first pause (it doubles)."""

    total: float = 300.0
    connect: float = 10.0
    attempts: int = 5
    pause: float = 0.5

    def pauses(self) -> Iterator[float]:
        """The seconds to wait before each further try."""
        return RetryPolicy(self.pause, longest=_LONGEST_WAIT, jitter=False, tries=self.attempts).pauses()


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """``status`` of HTTP; 0: there was no answer, ``problem`` says why. ``sent``: the platform may have done it."""

    status: int
    data: bytes = b""
    problem: str = ""
    sent: bool = True
    wait: float = 0.0

    @property
    def good(self) -> bool:
        """True for a 2xx of any kind."""
        return 200 <= self.status < 300

    @property
    def unclear(self) -> bool:
        """True if the platform may have done the request although it did not say so."""
        return (self.status == 0 and self.sent) or self.status in _BUSY

    def parsed(self) -> object:
        """The JSON of the answer; PlatformError when it is none."""
        try:
            found: object = json.loads(self.data)
            return found
        except (RecursionError, ValueError) as error:
            raise PlatformError("the EMPAIA platform answered something that is no JSON") from error


class Transport:
    """An open connection to one job's App API: use it in ``async with``."""

    def __init__(self, job: EmpaiaJob, patience: Patience) -> None:
        self._job, self._patience = job, patience
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=self._patience.total, sock_connect=self._patience.connect)
        self._session = aiohttp.ClientSession(
            timeout=timeout,
            trust_env=False,  # the App API is beside the app; a proxy of the environment is not for it
            cookie_jar=aiohttp.DummyCookieJar(),
            middlewares=[_send_only_once],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def ask(
        self,
        method: Method,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        data: bytes | None = None,
        kind: str = "application/json",
        coding: str = "",
        again: bool | None = None,
    ) -> ApiResponse:
        """The last answer to a request for ``path`` below the job, after what retries its method allows.

        ``again``: whether it may be repeated when nobody knows whether it was done (None: unless it is a POST).
        What was surely not done (no connection, 429) is always repeated. ``coding``: how ``data`` is compressed.
        """
        repeat = method != "POST" if again is None else again
        headers = {} if data is None else {"Content-Type": kind} | ({"Content-Encoding": coding} if coding else {})
        reply = await self._send_once(method, path, query, data, headers)
        for pause in self._patience.pauses():
            undone = reply.status == _TOO_MANY or (reply.status == 0 and not reply.sent)
            if not (undone or (repeat and reply.unclear)):
                break
            await asyncio.sleep(min(max(reply.wait, pause), _LONGEST_WAIT))
            reply = await self._send_once(method, path, query, data, headers)
        return reply

    async def _send_once(
        self, method: Method, path: str, query: Mapping[str, str] | None, data: bytes | None, headers: dict[str, str]
    ) -> ApiResponse:
        if self._session is None:
            raise RuntimeError("the transport is not open")
        url = f"{self._job.api}/v3/{self._job.id}{path}"
        try:
            async with self._session.request(
                method, url, params=query, data=None if data is None else io.BytesIO(data),
                headers={"Authorization": f"Bearer {self._job.token}", **headers}, allow_redirects=False,
            ) as response:  # fmt: skip
                body = await _read_bounded(response)
                return ApiResponse(response.status, body, self.reason_of(body), wait=_retry_after(response.headers))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return ApiResponse(0, problem=f"cannot be reached ({type(error).__name__})", sent=False)
        except TimeoutError:
            return ApiResponse(0, problem=f"did not answer within {self._patience.total:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return ApiResponse(0, problem=f"broke the connection off ({type(error.__cause__ or error).__name__})")

    def reason_of(self, body: bytes) -> str:
        """The reason an answer gives, shortened to one line; never with the token."""
        text = body[:_REASON_BYTES].decode("utf-8", "replace").replace(self._job.token, "***")
        words = text.split()
        if len(body) > _REASON_BYTES:
            words = words[:-1]  # it may be the beginning of a token
        return " ".join(words)[:200]


async def _send_only_once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """aiohttp repeats a PUT when its answer is lost, unless the error is another: nobody could tell that it did."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise  # the request has not been sent
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientError from error


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    """The whole body; PlatformError when it is longer than any answer should be."""
    found = bytearray()
    async for chunk in response.content.iter_chunked(1 << 18):
        found += chunk
        if len(found) > _LONGEST_BODY:
            raise PlatformError(f"the EMPAIA platform answered with more than {_LONGEST_BODY >> 20} MB")
    return bytes(found)


def _retry_after(headers: Mapping[str, str]) -> float:
    """What Retry-After asks for; 0 when it says nothing, or a date."""
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0
