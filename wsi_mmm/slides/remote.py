"""Requests that may fail: tried again, doubled when silent, given up in time. Bytes of one object, and only of one.

All requests of a process run in one event loop, in a thread of its own, so that each can be cancelled. A try that fails
in passing (5xx, 429, time-out, reset, cut-off body) is made again after a random pause that grows; a request that has
been silent for much longer than its like is sent once more, and the first answer wins.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from wsi_mmm.errors import SlideChanged, StorageError
from wsi_mmm.slides.ranges import Buffer, Counter, Merging, Range, fetch_merged
from wsi_mmm.slides.store_errors import NO_RANGES, SHORT, SILENT, UNREACHABLE, PassingError
from wsi_mmm.slides.uris import redact

MERGING = Merging(gap=256 << 10)
_PER_PROCESS, _PER_ENDPOINT = 32, 16  # requests on their way
_PAUSE, _LONGEST_PAUSE = 0.02, 2.0  # seconds: the first pause is up to _PAUSE, each next one up to twice as long
_SHORT_TRIES = 5  # answers of a wrong length before it is an error
_UNREACHED = 5.0  # seconds to give a server that never answered anything
_UNIT = 1 << 20  # bytes: a request of this size or less is one unit of work
_FIRST_WAIT, _LEAST_WAIT, _TIMES_USUAL = 1.0, 0.1, 4.0  # seconds of silence before a second request is sent
_COPIES = 3  # of one request on their way

T = TypeVar("T")
Answer = tuple[Buffer, str | None]  # bytes, version
Get = Callable[[int, int], Awaitable[Answer]]  # start, stop


@dataclass(frozen=True, slots=True)
class _Engine:
    pid: int
    loop: asyncio.AbstractEventLoop
    slots: asyncio.Semaphore


_engine: _Engine | None = None
_lock = threading.Lock()


def _running() -> _Engine:
    """Return this process's loop, started on first use; a forked child starts its own."""
    global _engine
    if _engine is None or _engine.pid != os.getpid():
        with _lock:
            if _engine is None or _engine.pid != os.getpid():
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name="fetch", daemon=True).start()
                _engine = _Engine(os.getpid(), loop, asyncio.Semaphore(_PER_PROCESS))
    return _engine


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` in the loop and return its result; an interrupted wait cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, _running().loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@dataclass(slots=True)
class Endpoint:
    """A server as met so far: how long its answers take, and how many more requests may be doubled."""

    timeout: float  # seconds until a request is given up
    concurrent: int = _PER_ENDPOINT
    reached: bool = False
    _slots: tuple[int, asyncio.Semaphore] | None = None
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    _usual: float = math.inf  # p95 of the seconds per unit
    _spare: float = 8.0

    def slots(self) -> asyncio.Semaphore:
        """Return what bounds the requests to this server; called in the loop."""
        if self._slots is None or self._slots[0] != os.getpid():
            self._slots = (os.getpid(), asyncio.Semaphore(self.concurrent))
        return self._slots[1]

    def answered(self, seconds: float, size: int) -> None:
        """Take note of a good answer."""
        self.reached = True
        self._seconds.append(seconds / _units(size))
        self._spare = min(self._spare + 0.25, 16.0)
        if len(self._seconds) >= 8:
            self._usual = sorted(self._seconds)[int(0.95 * (len(self._seconds) - 1))]

    def silence(self, size: int) -> float:
        """Return the seconds after which a request for ``size`` bytes counts as stalled."""
        known = self._usual < math.inf
        usual = max(_TIMES_USUAL * self._usual * _units(size), _LEAST_WAIT) if known else _FIRST_WAIT
        return min(usual, self.timeout / 4)

    def may_double(self) -> bool:
        """Take one from the allowance: a quarter of the good answers, so that a storm cannot grow."""
        if self._spare < 1:
            return False
        self._spare -= 1
        return True


def _units(size: int) -> float:
    return max(1.0, size / _UNIT)


async def request(endpoint: Endpoint, name: str, size: int, send: Callable[[], Awaitable[T]]) -> T:
    """Return the first good answer of ``send``, which is called as often as needed. Raises StorageError and its kin."""
    now = asyncio.get_running_loop().time
    began = math.inf  # waiting for a slot is no fault of the server's
    for n in itertools.count():
        try:
            async with endpoint.slots(), _running().slots:
                began = min(began, now())
                return await _first(endpoint, size, send, until=began + endpoint.timeout)
        except PassingError as error:
            pause = random.uniform(0, min(_PAUSE * 2.0 ** min(n, 20), _LONGEST_PAUSE))
            if now() + pause >= began + _patience(endpoint, error) or (SHORT in str(error) and n + 1 >= _SHORT_TRIES):
                raise StorageError(f"{error}") from None
            await asyncio.sleep(pause)
        except TimeoutError:
            raise StorageError(f"{name}: {SILENT}") from None
    raise AssertionError("unreachable")


def _patience(endpoint: Endpoint, error: PassingError) -> float:
    """A wrong address is told soon; a server that answered before may come back."""
    lost = not endpoint.reached and (UNREACHABLE in str(error) or "resolved" in str(error))
    return min(endpoint.timeout, _UNREACHED) if lost else endpoint.timeout


async def _first(endpoint: Endpoint, size: int, send: Callable[[], Awaitable[T]], *, until: float) -> T:
    """Return the first good answer; while all is silent for too long, send again. Raises TimeoutError at ``until``."""
    now = asyncio.get_running_loop().time
    tries: list[asyncio.Task[T]] = [_try(endpoint, size, send)]
    silence, wait = endpoint.silence(size), endpoint.silence(size)
    try:
        while True:
            await asyncio.wait(tries, timeout=min(wait, max(until - now(), 0)), return_when=asyncio.FIRST_COMPLETED)
            over = [t for t in tries if t.done()]
            tries = [t for t in tries if not t.done()]
            answer = next((t for t in over if t.exception() is None), None)
            if answer is not None:
                return answer.result()
            if over and not (tries and all(isinstance(t.exception(), PassingError) for t in over)):
                return over[0].result()  # raises
            if now() >= until:
                raise TimeoutError
            if not over and endpoint.may_double():
                if len(tries) >= _COPIES:
                    tries.pop(0).cancel()
                    silence *= 2
                tries.append(_try(endpoint, size, send))
            wait = silence
    finally:
        for task in tries:
            task.cancel()


def _try(endpoint: Endpoint, size: int, send: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
    async def timed() -> T:
        now = asyncio.get_running_loop().time
        began = now()
        answer = await send()
        endpoint.answered(now() - began, size)
        return answer

    return asyncio.create_task(timed())


def check_length(name: str, got: int, wanted: int) -> None:
    """Raise StorageError when a server that knows no ranges sent too much, PassingError when an answer broke off."""
    if got > wanted:
        raise StorageError(f"{name}: {NO_RANGES}")
    if got < wanted:
        raise PassingError(f"{name}: {SHORT}")


class RemoteStore:
    """An object behind ``get(start, stop) -> (bytes, version)``; several ranges are in flight at once."""

    remote = True

    def __init__(self, uri: str, size: int, etag: str | None, get: Get, endpoint: Endpoint) -> None:
        self.uri, self.size, self.etag = uri, size, etag
        self.counter = Counter()
        self._get, self._endpoint = get, endpoint
        self._closed = False

    def get_ranges(self, ranges: Sequence[Range]) -> list[Buffer]:
        """Return the bytes of each (start, length); short where the object ends."""
        return fetch_merged(ranges, self.size, rule=MERGING, get=self._get_many)

    def _get_many(self, spans: Sequence[Range]) -> list[Buffer]:
        if self._closed:
            raise StorageError(f"{redact(self.uri)} was closed; open it again")
        return wait_for(self._all(spans))

    async def _all(self, spans: Sequence[Range]) -> list[Buffer]:
        tasks = [asyncio.create_task(self._one(span)) for span in spans]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, span: Range) -> Buffer:
        return await request(self._endpoint, redact(self.uri), span[1], lambda: self._try(*span))

    async def _try(self, start: int, length: int) -> Buffer:
        data, version = await self._get(start, start + length)
        self.counter.add(len(data))
        if self.etag is not None and version is not None and version != self.etag:
            raise SlideChanged(f"{redact(self.uri)} was replaced while it was read; run again")
        check_length(redact(self.uri), len(data), length)
        return data

    def close(self) -> None:
        """Refuse further reading; connections belong to the server, not to one object."""
        self._closed = True
