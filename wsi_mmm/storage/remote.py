"""Ranged requests that are retried, hedged when they stall and given up in time, and the store on top of them.

All requests of a process run in one event loop, in a thread of its own, so that each can be cancelled. A try that fails
in passing (5xx, 429, time-out, reset, cut-off body) is made again after a random pause that grows; a request that has
been silent for much longer than its like is sent once more, and the first answer wins.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import importlib
import math
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

from wsi_mmm.errors import ConfigError, SlideChanged, StorageError, TransientCause, TransientError
from wsi_mmm.storage.base import BufferedStore, redact
from wsi_mmm.storage.ranges import Buffer, Counter, MergeRule, Range, Ranges, fetch_merged
from wsi_mmm.storage.retry import RetryPolicy
from wsi_mmm.storage.translate import NO_RANGES, SHORT, SILENT, translate_errors

MERGING = MergeRule(gap=512 << 10, waste=0.12)  # measured on RGW with 0 and 20 ms delay, see docs/storage.md
_PER_PROCESS, _PER_ENDPOINT = 32, 16  # requests in flight
_RANGED = RetryPolicy(pause=0.02, longest=2.0)  # given up by the endpoint's time-out
_SHORT_TRIES = 5  # after so many short answers it is an error
_UNREACHED = 5.0  # seconds for a server that has never answered
_TIMEOUT = 30.0  # seconds until a request is given up
WHOLE = 8 << 20  # bytes expected of a whole object, whose size is not known yet
_UNIT = 1 << 20  # bytes: expected times grow with the size beyond this
# Seconds of silence before a second request is sent: at first fixed, then a multiple of the recent p95.
_FIRST_WAIT, _LEAST_BEGIN, _TIMES_BEGIN, _LEAST_BODY, _TIMES_BODY = 0.5, 0.05, 2.0, 0.1, 3.0
_COPIES = 3  # of one request in flight

T = TypeVar("T")
VersionedBytes = tuple[Buffer, str | None]  # bytes, version
OnBegin = Callable[[], None]  # called when the head of an answer has arrived
SendRequest = Callable[[OnBegin], Awaitable[T]]
GetRange = Callable[[int, int, OnBegin], Awaitable[VersionedBytes]]  # start, stop


@dataclass(frozen=True, slots=True)
class _RequestLoop:
    pid: int
    loop: asyncio.AbstractEventLoop
    slots: asyncio.Semaphore


_loop: _RequestLoop | None = None
_lock = threading.Lock()
_closing: set[asyncio.Task[None]] = set()


def _request_loop() -> _RequestLoop:
    """Return this process's loop, started on first use; a forked child starts its own."""
    global _loop
    with _lock:
        if _loop is None or _loop.pid != os.getpid():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="fetch", daemon=True)
            thread.start()
            # A daemon thread that is killed inside native code, as the interpreter ends, aborts the process.
            atexit.register(_end_loop, os.getpid(), loop, thread)
            _loop = _RequestLoop(os.getpid(), loop, asyncio.Semaphore(_PER_PROCESS))
        return _loop


def _end_loop(pid: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Stop the loop in the process that started it; requests that take longer than two seconds are abandoned."""

    async def cancel_all() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    if pid != os.getpid() or not thread.is_alive():
        return
    with contextlib.suppress(concurrent.futures.TimeoutError):
        asyncio.run_coroutine_threadsafe(cancel_all(), loop).result(2)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(2)


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` in the loop and return its result; an interrupted wait cancels it."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _request_loop().loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def close_with_loop(close: Callable[[], Awaitable[object]]) -> None:
    """Call ``close`` when the loop ends; called in the loop."""

    async def close_at_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await close()

    task = asyncio.create_task(close_at_end())
    _closing.add(task)  # the loop itself keeps no task alive
    task.add_done_callback(_closing.discard)


class UsualTime:
    """The 95th percentile of the last 64 durations, in seconds; inf until 8 are known."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=64)
        self.seconds = math.inf

    def add(self, seconds: float) -> None:
        """Record one duration."""
        self._last.append(seconds)
        if len(self._last) >= 8:
            self.seconds = sorted(self._last)[int(0.95 * (len(self._last) - 1))]


@dataclass(slots=True, eq=False)
class Endpoint:
    """Statistics and limits of one server: usual times, slots, allowance of hedged requests. Used in the loop.

    ``timeout``: seconds until a request is given up; ``doubles``: hedge stalled requests; ``final``: causes that are
    not retried here but by the caller.
    """

    timeout: float
    concurrent: int = _PER_ENDPOINT
    doubles: bool = True
    final: Collection[TransientCause] = ()
    reached: bool = False
    begin: UsualTime = field(default_factory=UsualTime)
    body: UsualTime = field(default_factory=UsualTime)  # per _UNIT bytes, as the next
    whole: UsualTime = field(default_factory=UsualTime)
    _slots: tuple[int, asyncio.Semaphore] | None = None  # of a process
    _spare: float = 8.0

    def slots(self) -> asyncio.Semaphore:
        """Return the semaphore that bounds the requests to this server."""
        if self._slots is None or self._slots[0] != os.getpid():
            self._slots = (os.getpid(), asyncio.Semaphore(self.concurrent))
        return self._slots[1]

    def stall_seconds(self, size: int, *, begun: bool) -> float:
        """Return the seconds after which a request, or the body of an answer that has ``begun``, counts as stalled."""
        if begun:
            usual = max(_TIMES_BODY * self.body.seconds * _size_units(size), _LEAST_BODY)
        else:
            usual = max(_TIMES_BEGIN * min(self.begin.seconds, self.whole.seconds * _size_units(size)), _LEAST_BEGIN)
        return min(usual if usual < math.inf else _FIRST_WAIT, self.timeout / 4)

    def count_success(self) -> None:
        """Add to the allowance of hedged requests: a quarter of the good answers, lest hedging cause overload."""
        self.reached = True
        self._spare = min(self._spare + 0.25, 16.0)

    def take_double(self) -> bool:
        """Take one hedged request from the allowance, if there is one."""
        if not self.doubles or self._spare < 1:
            return False
        self._spare -= 1
        return True


def storage_timeout(env: Mapping[str, str] = os.environ, *, otherwise: float = _TIMEOUT) -> float:
    """Return the seconds after which a request is given up: WSI_MMM_STORAGE_TIMEOUT, or 30."""
    value = env.get("WSI_MMM_STORAGE_TIMEOUT") or otherwise
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"WSI_MMM_STORAGE_TIMEOUT={value} is no number of seconds above 0; give one, such as 30")
    return seconds


def endpoint_for(uri: str) -> Endpoint:
    """Return the endpoint that all objects of a server, or of a bucket, share."""
    scheme, _, rest = uri.partition("://")
    return _kept_endpoint(f"{scheme}://{rest.partition('/')[0]}", storage_timeout())


@lru_cache(maxsize=32)
def _kept_endpoint(server: str, seconds: float) -> Endpoint:
    return Endpoint(seconds)


def _size_units(size: int) -> float:
    return max(1.0, size / _UNIT)


async def request(endpoint: Endpoint, name: str, size: int, send: SendRequest[T]) -> T:
    """Return the first good answer of ``send``, which is called as often as needed. Raises StorageError."""
    now = asyncio.get_running_loop().time
    began = math.inf  # waiting for a slot does not count
    for tries, pause in enumerate(_RANGED.pauses(), start=1):
        try:
            async with endpoint.slots(), _request_loop().slots:
                began = min(began, now())
                return await _first_answer(endpoint, size, send, until=began + endpoint.timeout)
        except TransientError as error:
            short = error.cause is TransientCause.SHORT_ANSWER and tries >= _SHORT_TRIES
            if short or error.cause in endpoint.final or now() + pause >= began + _seconds_to_try(endpoint, error):
                raise
            await asyncio.sleep(pause)
        except TimeoutError:
            raise TransientError(f"{name}: {SILENT}", TransientCause.TIMEOUT) from None
    raise AssertionError("unreachable")


def fetch(uri: str, size: int, send: SendRequest[T], client: str = "") -> T:
    """Return the answer of ``send`` about the object at ``uri``, expected to bring ``size`` bytes. StorageError.

    ``client``: a library to import before, so that its time is not the server's."""
    if client:
        importlib.import_module(client)

    async def translated(on_begin: OnBegin) -> T:
        with translate_errors(uri):
            return await send(on_begin)

    return wait_for(request(endpoint_for(uri), redact(uri), size, translated))


def _seconds_to_try(endpoint: Endpoint, error: TransientError) -> float:
    """Return the seconds to keep trying: few where nothing ever answered, since the address may be wrong."""
    lost = not endpoint.reached and error.cause is TransientCause.UNREACHABLE
    return min(endpoint.timeout, _UNREACHED) if lost else endpoint.timeout


class _Attempt(Generic[T]):
    """A request in flight."""

    def __init__(self, endpoint: Endpoint, size: int, send: SendRequest[T]) -> None:
        self._now = asyncio.get_running_loop().time
        self._endpoint, self._size = endpoint, size
        self._sent, self._begun = self._now(), math.inf
        self.task = asyncio.create_task(self._run_request(send))

    async def _run_request(self, send: SendRequest[T]) -> T:
        answer = await send(self._count_begin)
        over = self._now()
        if self._begun < math.inf:
            self._endpoint.body.add((over - self._begun) / _size_units(self._size))
        else:
            self._endpoint.whole.add((over - self._sent) / _size_units(self._size))
        self._endpoint.count_success()
        return answer

    def _count_begin(self) -> None:
        self._begun = self._now()
        self._endpoint.begin.add(self._begun - self._sent)

    def silent_at(self, patience: float) -> float:
        """Return the time of the loop at which it counts as stalled."""
        begun = self._begun < math.inf
        return (self._begun if begun else self._sent) + patience * self._endpoint.stall_seconds(self._size, begun=begun)


async def _first_answer(endpoint: Endpoint, size: int, send: SendRequest[T], *, until: float) -> T:
    """Return the first good answer; send again while all attempts stall. Raises TimeoutError at ``until``."""
    now = asyncio.get_running_loop().time
    tries = [_Attempt(endpoint, size, send)]
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
            if not endpoint.take_double():
                patience *= 2
                continue
            if len(tries) >= _COPIES:
                tries.pop(0).task.cancel()
                patience *= 2
            tries.append(_Attempt(endpoint, size, send))
    finally:
        for other in tries:
            other.task.cancel()


def check_length(name: str, got: int, wanted: int) -> None:
    """Raise StorageError when a server that ignores ranges sent too much, TransientError when an answer is short."""
    if got > wanted:
        raise StorageError(f"{name}: {NO_RANGES}")
    if got < wanted:
        raise TransientError(f"{name}: {SHORT}", TransientCause.SHORT_ANSWER)


class RemoteStore:
    """An object behind ``get(start, stop) -> (bytes, version)``; several ranges are in flight at once."""

    remote = True

    def __init__(self, uri: str, size: int, etag: str | None, get: GetRange, endpoint: Endpoint) -> None:
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
        return wait_for(self._fetch_all(spans))

    async def _fetch_all(self, spans: Sequence[Range]) -> list[Buffer]:
        name = redact(self.uri)
        sent = [request(self._endpoint, name, span[1], partial(self._fetch_once, *span)) for span in spans]
        tasks = [asyncio.create_task(one) for one in sent]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _fetch_once(self, start: int, length: int, on_begin: OnBegin) -> Buffer:
        with translate_errors(self.uri):
            data, version = await self._get(start, start + length, on_begin)
        self.counter.add(len(data))
        if self.etag is not None and version is not None and version != self.etag:
            raise SlideChanged(f"{redact(self.uri)} was replaced while it was read; run again")
        check_length(redact(self.uri), len(data), length)
        return data

    def close(self) -> None:
        """Refuse further reading; the connections are shared by all objects of a server."""
        self._closed = True


def opened_with(head: Buffer, uri: str, size: int, version: str, get: GetRange) -> BufferedStore:
    """Return the store of an object whose first bytes came with its size and version."""
    opened = RemoteStore(uri, size, version, get, endpoint_for(uri))
    opened.counter.add(len(head))
    return BufferedStore(opened, head)
