"""Metrics of a run for Prometheus, served on loopback while it goes. Needs the extra ``metrics``.

The names are in docs/observing.md. On the workers of a cluster the same counters are part of what distributed serves
at each worker's ``/metrics``, where prometheus_client is installed: `workers`.
"""

from __future__ import annotations

import socketserver
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from wsi_mmm import timing
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.monitoring.busy import BusyTimes
from wsi_mmm.engine.monitoring.hooks import Hooks, status_of
from wsi_mmm.engine.units import UnitResult, WorkUnit
from wsi_mmm.errors import MissingPackage, OptionError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

LOOPBACK = "127.0.0.1"
WINDOW = 60.0  # seconds that the busy share looks back
REMEMBERED = 1024  # slides whose bytes so far are known


class MetricsRecorder:
    """The metrics of what receipts and events say; any thread may read them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"wsi_mmm_{name}", words, labels, registry=registry)

        self.tiles = counter("tiles", "Tiles whose values are in, cache hits among them")
        self.hits = counter("cache_hits", "Tiles whose values an earlier run had left")
        self.failed = counter("failed_tiles", "Tiles with pixels that cannot be read")
        self.objects = counter("objects", "Objects published")
        self.bytes = counter("read_bytes", "Bytes of slides read")
        self.units = counter("units", "Units of work by kind and outcome", "kind", "status")
        self.seconds = counter("stage_seconds", "Seconds of all threads by stage", "stage")
        self.busy = Gauge("wsi_mmm_busy_share", "Share of the last minute that the models ran", registry=registry)
        self.busy.set_function(self.share)
        self._spans, self._workers = BusyTimes(), dict[str, int]()
        self._bytes: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._lock, self._since = threading.Lock(), time.time()

    def receive(self, result: UnitResult) -> None:
        """Count what came of a unit."""
        self.units.labels(result.kind, result.status).inc()
        if result.kind == "forward":
            self.tiles.inc(result.tiles)
            self.hits.inc(result.tiles if result.status == "cached" else 0)
            self.failed.inc(len(result.failed))
        elif result.kind == "publish":
            self.objects.inc(result.objects)
        for stage, seconds in timing.together(result.laps).items():
            self.seconds.labels(stage).inc(seconds)
        self.bytes.inc(self._more(result))
        with self._lock:
            worker = self._workers.setdefault(result.worker, len(self._workers))
            self._spans.add(worker, result.busy)
            self._spans.forget(time.time() - WINDOW)

    def _more(self, result: UnitResult) -> int:
        """Bytes beyond those of the last receipt of this worker and slide; all, when the slide was opened anew."""
        key = result.worker, result.slide
        before, total = self._bytes.pop(key, 0), result.bytes_read
        self._bytes[key] = total
        if len(self._bytes) > REMEMBERED:
            self._bytes.popitem(last=False)
        return total - before if total >= before else total

    def share(self) -> float:
        """Share of the last minute in which the model ran, averaged over the workers that ran it meanwhile."""
        now = time.time()
        since = max(self._since, now - WINDOW)
        with self._lock:
            spans = self._spans.within(since, now)
        workers = {worker for worker, _, _ in spans}
        return sum(end - start for _, start, end in spans) / len(workers) / (now - since) if workers else 0.0


def process_recorder() -> MetricsRecorder:
    """A Book in the registry of the whole process. Once per process."""
    from prometheus_client import REGISTRY

    return MetricsRecorder(REGISTRY)


class RunMetrics:
    """A Book, and what only the process that keeps the books of a run knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge

        self.book = MetricsRecorder(registry)
        self.slides = Counter("wsi_mmm_slides", "Slides by how they ended", ["status"], registry=registry)
        self.asked = Gauge("wsi_mmm_slides_asked", "Slides of the run", registry=registry)
        self.planned = Counter("wsi_mmm_tiles_planned", "Tiles of the slides planned so far", registry=registry)
        self.flying = Gauge("wsi_mmm_units_in_flight", "Units started and not done", ["kind"], registry=registry)

    def hear(self, event: Event) -> None:
        if event.kind == "plan":
            self.planned.inc(event.total)
        elif event.kind == "slide":
            self.slides.labels(status_of(event)).inc()
            self.asked.set(event.total)

    def watch(self, thing: WorkUnit | UnitResult) -> None:
        if isinstance(thing, WorkUnit):
            self.flying.labels(thing.kind).inc()
        else:
            self.flying.labels(thing.kind).dec()
            self.book.receive(thing)


# ---------------------------------------------------------------- serving


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A server whose requests keep nobody waiting, not even the end of the process."""

    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""


@contextmanager
def serving(port: int) -> Iterator[Hooks]:
    """Serve the metrics of a run at ``http://127.0.0.1:port/metrics``. Raises MissingPackage, OptionError."""
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
    except ImportError as error:
        raise MissingPackage("metrics need prometheus_client; pip install 'wsi-mmm[metrics]'") from error
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    book = RunMetrics(registry)
    try:
        server = make_server(LOOPBACK, port, make_wsgi_app(registry), _Server, _Silent)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"metrics cannot be served on port {port}: {reason}; choose another port") from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="wsi-mmm-metrics", daemon=True)
    thread.start()
    try:
        yield Hooks(book.hear, book.watch)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
