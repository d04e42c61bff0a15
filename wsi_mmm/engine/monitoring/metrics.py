"""Metrics of a run for Prometheus, served on loopback while it goes. Needs the extra ``metrics``.

The names are in docs/observing.md. On the workers of a cluster the same counters are part of what distributed serves
at each worker's ``/metrics``, where prometheus_client is installed: `count_here`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wsi_mmm import timing
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.monitoring.accounting import BusyTimes, busy_share, busy_spans
from wsi_mmm.engine.monitoring.observe import Hooks
from wsi_mmm.engine.units import ForwardResult, PublishResult, UnitResult, WorkUnit, result_status
from wsi_mmm.errors import MissingPackage, OptionError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

LOOPBACK = "127.0.0.1"
WINDOW = 60.0  # seconds that the busy share looks back
REMEMBERED = 1024  # slides whose bytes so far are known


class MetricsRecorder:
    """The metrics of results; any thread may read them."""

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
        self._spans = BusyTimes()
        self._bytes: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._lock, self._since = threading.Lock(), time.time()

    def receive(self, result: UnitResult) -> None:
        """Count a result."""
        facts = result.facts
        self.units.labels(facts.kind, result_status(result)).inc()
        if isinstance(result, ForwardResult):
            self.tiles.inc(result.tiles)
            self.hits.inc(result.tiles if result.cached else 0)
            self.failed.inc(len(result.failed))
        elif isinstance(result, PublishResult):
            self.objects.inc(result.summary.object_count)
        for stage, seconds in timing.sum_stages(facts.times).items():
            self.seconds.labels(stage).inc(seconds)
        if facts.bytes_read:
            self.bytes.inc(self._new_bytes(facts.worker, facts.slide, facts.bytes_read))
        with self._lock:
            self._spans.add(facts.worker, busy_spans(result))
            self._spans.forget(time.time() - WINDOW)

    def _new_bytes(self, worker: str, slide: str, total: int) -> int:
        """Bytes beyond those of the last result of this worker and slide; all, when the slide was opened anew."""
        key = worker, slide
        before = self._bytes.pop(key, 0)
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
        return busy_share(spans, now - since)


class RunMetrics:
    """A MetricsRecorder, and the metrics that only the client that drives a run knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge

        self.recorder = MetricsRecorder(registry)
        self.slides = Counter("wsi_mmm_slides", "Slides by how they ended", ["status"], registry=registry)
        self.asked = Gauge("wsi_mmm_slides_asked", "Slides of the run", registry=registry)
        self.planned = Counter("wsi_mmm_tiles_planned", "Tiles of the slides planned so far", registry=registry)
        self.flying = Gauge("wsi_mmm_units_in_flight", "Units started and not done", ["kind"], registry=registry)

    def hear(self, event: Event) -> None:
        if event.kind == "plan":
            self.planned.inc(event.total)
        elif event.kind == "slide":
            self.slides.labels(event.status or "").inc()
            self.asked.set(event.total)

    def watch(self, thing: WorkUnit | UnitResult) -> None:
        if isinstance(thing, WorkUnit):
            self.flying.labels(thing.kind).inc()
        else:
            self.flying.labels(thing.facts.kind).dec()
            self.recorder.receive(thing)


# ---------------------------------------------------------------- serving


@contextmanager
def serving(port: int) -> Iterator[Hooks]:
    """Serve the metrics of a run at ``http://127.0.0.1:port/metrics``. Raises MissingPackage, OptionError."""
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
    except ImportError as error:
        raise MissingPackage("metrics need prometheus_client; pip install 'wsi-mmm[metrics]'") from error
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    metrics = RunMetrics(registry)
    try:
        server, thread = start_http_server(port, LOOPBACK, registry)
        thread.name = "wsi-mmm-metrics"
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"metrics cannot be served on port {port}: {reason}; choose another port") from error
    try:
        yield Hooks(metrics.hear, metrics.watch)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---------------------------------------------------------------- workers of a cluster

_recorder_lock = threading.Lock()
_recorders: list[MetricsRecorder] = []


def count_here(result: UnitResult) -> None:
    """Count a unit in the metrics of this worker; does nothing, and loads nothing, where none are served."""
    if "prometheus_client" not in sys.modules or "distributed.worker" not in sys.modules:
        return
    from prometheus_client import REGISTRY

    with _recorder_lock:
        if not _recorders:
            _recorders.append(MetricsRecorder(REGISTRY))
        _recorders[0].receive(result)
