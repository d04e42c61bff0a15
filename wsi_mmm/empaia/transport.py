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
from typing import Any, Literal, Self

import aiohttp

from wsi_mmm.config import EmpaiaJob
from wsi_mmm.errors import PlatformError
from wsi_mmm.storage.retry import RetryPolicy

_BUSY = frozenset({502, 503, 504})
_TOO_MANY = 429
_LONGEST_WAIT = 30.0  # seconds, also of what Retry-After asks for
_SAID = 10_000  # bytes of an answer in which its reason is looked for: longer than tokens are
_ANSWER = 512 << 20  # bytes of the longest answer that is read

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
class Answer:
    """``status`` of HTTP; 0: there was no answer, ``problem`` says why. ``sent``: the platform may have done it."""

    status: int
    data: bytes = b""
    problem: str = ""
    sent: bool = True
    wait: float = 0.0

    @property
    def good(self) -> bool:
        """Whether it is a 2xx, of any kind."""
        return 200 <= self.status < 300

    @property
    def unclear(self) -> bool:
        """Whether the platform may have done what was asked although it did not say so."""
        return (self.status == 0 and self.sent) or self.status in _BUSY

    def parsed(self) -> Any:
        """The JSON of the answer; PlatformError when it is none."""
        try:
            return json.loads(self.data)
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
        )
        # aiohttp sends a PUT again by itself when its answer is lost: nobody could tell that from a refusal.
        self._session._retry_connection = False
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
    ) -> Answer:
        """The last answer to a request for ``path`` below the job, after what retries its method allows.

        ``again``: whether it may be repeated when nobody knows whether it was done (None: unless it is a POST).
        What was surely not done (no connection, 429) is always repeated. ``coding``: how ``data`` is compressed.
        """
        repeat = method != "POST" if again is None else again
        headers = {} if data is None else {"Content-Type": kind} | ({"Content-Encoding": coding} if coding else {})
        answer = await self._once(method, path, query=query, data=data, headers=headers)
        for pause in self._patience.pauses():
            undone = answer.status == _TOO_MANY or (answer.status == 0 and not answer.sent)
            if not (undone or (repeat and answer.unclear)):
                break
            await asyncio.sleep(min(max(answer.wait, pause), _LONGEST_WAIT))
            answer = await self._once(method, path, query=query, data=data, headers=headers)
        return answer

    async def _once(
        self,
        method: Method,
        path: str,
        *,
        query: Mapping[str, str] | None,
        data: bytes | None,
        headers: Mapping[str, str],
    ) -> Answer:
        if self._session is None:
            raise RuntimeError("the transport is not open")
        url = f"{self._job.api}/v3/{self._job.id}{path}"
        try:
            async with self._session.request(
                method,
                url,
                params=query,
                data=None if data is None else io.BytesIO(data),
                headers={"Authorization": f"Bearer {self._job.token}", **headers},
                allow_redirects=False,
            ) as response:
                body = await _bounded(response)
                return Answer(response.status, body, self.words(body), wait=_seconds(response.headers))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Answer(0, problem=f"cannot be reached ({type(error).__name__})", sent=False)
        except TimeoutError:
            return Answer(0, problem=f"did not answer within {self._patience.total:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Answer(0, problem=f"broke the connection off ({type(error).__name__})")

    def words(self, body: bytes) -> str:
        """The reason an answer gives, shortened to one line; never with the token."""
        text = body[:_SAID].decode("utf-8", "replace").replace(self._job.token, "***")
        words = text.split()
        if len(body) > _SAID:
            words = words[:-1]  # it may be the beginning of a token
        return " ".join(words)[:200]


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """The whole body; PlatformError when it is longer than any answer should be."""
    found = bytearray()
    async for chunk in response.content.iter_chunked(1 << 18):
        found += chunk
        if len(found) > _ANSWER:
            raise PlatformError(f"the EMPAIA platform answered with more than {_ANSWER >> 20} MB")
    return bytes(found)


def _seconds(headers: Mapping[str, str]) -> float:
    """What Retry-After asks for; 0 when it says nothing, or a date."""
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0
