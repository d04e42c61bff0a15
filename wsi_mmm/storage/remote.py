"""Requests that may fail: tried again, doubled when silent, given up in time. Bytes of one object, and only of one.

All requests of a process run in one event loop, in a thread of its own, so that each can be cancelled. A try that fails
in passing (5xx, 429, time-out, reset, cut-off body) is made again after a random pause that grows; a request that has
been silent for much longer than its like is sent once more, and the first answer wins.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from wsi_mmm.errors import SlideChanged, StorageError, TransientCause, TransientError
from wsi_mmm.storage.ranges import Buffer, Counter, Merging, Range, Ranges, fetch_merged
from wsi_mmm.storage.retry import RetryPolicy
from wsi_mmm.storage.translate import NO_RANGES, SHORT, SILENT
from wsi_mmm.storage.uris import redact

MERGING = Merging(gap=512 << 10, waste=0.12)  # measured on RGW with 0 and 20 ms delay, see docs/storage.md
_PER_PROCESS, _PER_ENDPOINT = 32, 16  # requests on their way
_RANGED = RetryPolicy(pause=0.02, longest=2.0)  # given up by the endpoint's time-out
_SHORT_TRIES = 5  # answers of a wrong length before it is an error
_UNREACHED = 5.0  # seconds to give a server that never answered anything
_UNIT = 1 << 20  # bytes: a request of this size or less is one unit of work
# Silence before a second request is sent: seconds while nothing is known, else a multiple of the usual p95.
_FIRST_WAIT, _LEAST_BEGIN, _TIMES_BEGIN, _LEAST_BODY, _TIMES_BODY = 0.5, 0.05, 2.0, 0.1, 3.0
_COPIES = 3  # of one request on their way

T = TypeVar("T")
Answer = tuple[Buffer, str | None]  # bytes, version
Begins = Callable[[], None]  # to be called when the head of an answer is there
Send = Callable[[Begins], Awaitable[T]]
Get = Callable[[int, int, Begins], Awaitable[Answer]]  # start, stop


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
                thread = threading.Thread(target=loop.run_forever, name="fetch", daemon=True)
                thread.start()
                # A daemon thread that is killed inside native code, as the interpreter ends, aborts the process.
                atexit.register(_end, os.getpid(), loop, thread)
                _engine = _Engine(os.getpid(), loop, asyncio.Semaphore(_PER_PROCESS))
    return _engine


async def _cancel_all() -> None:
    """Stop every other request of the loop, and wait until it has let go."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _end(pid: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Stop the loop in order, in the process that started it; what takes longer than two seconds is left."""
    if pid != os.getpid() or not thread.is_alive():
        return
    with contextlib.suppress(concurrent.futures.TimeoutError):
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(2)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(2)


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` in the loop and return its result; an interrupted wait cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, _running().loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class Usual:
    """How long something has taken lately: the 95th percentile of the last 64, inf until 8 are known."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=64)
        self.seconds = math.inf

    def add(self, seconds: float) -> None:
        """Take note of one."""
        self._last.append(seconds)
        if len(self._last) >= 8:
            self.seconds = sorted(self._last)[int(0.95 * (len(self._last) - 1))]


class Endpoint:
    """A server as met so far: how long it takes, and how many more requests may be doubled. Used in the loop."""

    def __init__(
        self,
        timeout: float,
        concurrent: int = _PER_ENDPOINT,
        *,
        doubles: bool = True,
        final: Collection[TransientCause] = (),
    ) -> None:
        """``timeout``: seconds until a request is given up; ``doubles``: whether a silent one may be sent once more;
        ``final``: causes after which a request is not repeated here, but left to whoever repeats the unit of work."""
        self.timeout = timeout
        self.final = frozenset(final)
        self._doubles = doubles
        self.reached = False
        self.begin, self.body, self.whole = Usual(), Usual(), Usual()  # the latter two per unit of work
        self._concurrent = concurrent
        self._slots: tuple[int, asyncio.Semaphore] | None = None
        self._spare = 8.0

    def slots(self) -> asyncio.Semaphore:
        """Return what bounds the requests to this server."""
        if self._slots is None or self._slots[0] != os.getpid():
            self._slots = (os.getpid(), asyncio.Semaphore(self._concurrent))
        return self._slots[1]

    def silence(self, size: int, *, begun: bool) -> float:
        """Return the seconds after which a request, or the body of an answer that has ``begun``, counts as stalled."""
        if begun:
            usual = max(_TIMES_BODY * self.body.seconds * _units(size), _LEAST_BODY)
        else:
            usual = max(_TIMES_BEGIN * min(self.begin.seconds, self.whole.seconds * _units(size)), _LEAST_BEGIN)
        return min(usual if usual < math.inf else _FIRST_WAIT, self.timeout / 4)

    def earned(self) -> None:
        """Add to the allowance of second requests: a quarter of the good answers, so that a storm cannot grow."""
        self.reached = True
        self._spare = min(self._spare + 0.25, 16.0)

    def may_double(self) -> bool:
        """Take one from the allowance."""
        if not self._doubles or self._spare < 1:
            return False
        self._spare -= 1
        return True


def _units(size: int) -> float:
    return max(1.0, size / _UNIT)


async def request(endpoint: Endpoint, name: str, size: int, send: Send[T]) -> T:
    """Return the first good answer of ``send``, which is called as often as needed. Raises StorageError and its kin."""
    now = asyncio.get_running_loop().time
    began = math.inf  # waiting for a slot is no fault of the server's
    for tries, pause in enumerate(_RANGED.pauses(), start=1):
        try:
            async with endpoint.slots(), _running().slots:
                began = min(began, now())
                return await _first(endpoint, size, send, until=began + endpoint.timeout)
        except TransientError as error:
            short = error.cause is TransientCause.SHORT_ANSWER and tries >= _SHORT_TRIES
            if short or error.cause in endpoint.final or now() + pause >= began + _patience(endpoint, error):
                raise
            await asyncio.sleep(pause)
        except TimeoutError:
            raise TransientError(f"{name}: {SILENT}", TransientCause.TIMEOUT) from None
    raise AssertionError("unreachable")


def _patience(endpoint: Endpoint, error: TransientError) -> float:
    """Return the seconds to keep trying: few for what may be a wrong address, as nothing ever answered there."""
    lost = not endpoint.reached and error.cause is TransientCause.UNREACHABLE
    return min(endpoint.timeout, _UNREACHED) if lost else endpoint.timeout


class _Try(Generic[T]):
    """A request on its way."""

    def __init__(self, endpoint: Endpoint, size: int, send: Send[T]) -> None:
        self._now = asyncio.get_running_loop().time
        self._endpoint, self._size = endpoint, size
        self._sent, self._begun = self._now(), math.inf
        self.task = asyncio.create_task(self._run(send))

    async def _run(self, send: Send[T]) -> T:
        answer = await send(self._begins)
        over = self._now()
        if self._begun < math.inf:
            self._endpoint.body.add((over - self._begun) / _units(self._size))
        else:
            self._endpoint.whole.add((over - self._sent) / _units(self._size))
        self._endpoint.earned()
        return answer

    def _begins(self) -> None:
        self._begun = self._now()
        self._endpoint.begin.add(self._begun - self._sent)

    def silent_at(self, patience: float) -> float:
        """Return when it will have been silent for too long."""
        begun = self._begun < math.inf
        return (self._begun if begun else self._sent) + patience * self._endpoint.silence(self._size, begun=begun)


async def _first(endpoint: Endpoint, size: int, send: Send[T], *, until: float) -> T:
    """Return the first good answer; while all is silent for too long, send again. Raises TimeoutError at ``until``."""
    now = asyncio.get_running_loop().time
    tries = [_Try(endpoint, size, send)]
    patience = 1.0
    try:
        while True:
            pause = max(min(tries[-1].silent_at(patience), until) - now(), 0.001)
            await asyncio.wait([t.task for t in tries], timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            over = [t.task for t in tries if t.task.done()]
            tries = [t for t in tries if not t.task.done()]
            answer = next((t for t in over if t.exception() is None), None)
            if answer is not None:
                return answer.result()
            if over and not (tries and all(isinstance(t.exception(), TransientError) for t in over)):
                return over[0].result()  # raises
            if now() >= until:
                raise TimeoutError
            if now() < tries[-1].silent_at(patience):
                continue
            if not endpoint.may_double():
                patience *= 2
                continue
            if len(tries) >= _COPIES:
                tries.pop(0).task.cancel()
                patience *= 2
            tries.append(_Try(endpoint, size, send))
    finally:
        for other in tries:
            other.task.cancel()


def check_length(name: str, got: int, wanted: int) -> None:
    """Raise StorageError when a server that knows no ranges sent too much, TransientError when an answer broke off."""
    if got > wanted:
        raise StorageError(f"{name}: {NO_RANGES}")
    if got < wanted:
        raise TransientError(f"{name}: {SHORT}", TransientCause.SHORT_ANSWER)


class RemoteStore:
    """An object behind ``get(start, stop) -> (bytes, version)``; several ranges are in flight at once."""

    remote = True

    def __init__(self, uri: str, size: int, etag: str | None, get: Get, endpoint: Endpoint) -> None:
        self.uri, self.size, self.etag = uri, size, etag
        self.counter = Counter()
        self._get, self._endpoint = get, endpoint
        self._closed = False

    def get_ranges(self, ranges: Ranges) -> list[Buffer]:
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
        return await request(self._endpoint, redact(self.uri), span[1], partial(self._try, *span))

    async def _try(self, start: int, length: int, begins: Begins) -> Buffer:
        data, version = await self._get(start, start + length, begins)
        self.counter.add(len(data))
        if self.etag is not None and version is not None and version != self.etag:
            raise SlideChanged(f"{redact(self.uri)} was replaced while it was read; run again")
        check_length(redact(self.uri), len(data), length)
        return data

    def close(self) -> None:
        """Refuse further reading; connections belong to the server, not to one object."""
        self._closed = True
