"""Traces of a run for OpenTelemetry: a span for the run, one per slide, one per unit. Needs the extra ``tracing``.

Spans are made by the client that drives the run, from the times in the results, so workers need no library and no
context travels. Endpoint, headers, sampling, service name and batching follow the OTEL_ variables, which the library
reads. This is the home of opentelemetry.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from wsi_mmm import timing
from wsi_mmm._version import __version__
from wsi_mmm.engine.events import Event, SlideStatus
from wsi_mmm.engine.monitoring.observe import Hooks, redact_uris
from wsi_mmm.engine.units import Failure, ForwardResult, UnitResult, WorkUnit, result_status
from wsi_mmm.errors import MissingPackage, OptionError
from wsi_mmm.storage import store

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span

GROUP = "opentelemetry_traces_exporter"  # where packages register exporters
_ALIASES = {"otlp": "otlp_proto_http"}
PATIENCE = 5.0  # seconds that the end of a run waits for the last spans to be sent
_MISSING = "traces need opentelemetry; pip install 'wsi-mmm[tracing]'"


def exporter_named(name: str) -> SpanExporter:
    """The exporter that is installed under a name, as in OTEL_TRACES_EXPORTER. Raises MissingPackage, OptionError."""
    found = importlib.metadata.entry_points(group=GROUP)
    if not found:
        raise MissingPackage(_MISSING)
    wanted = [point for point in found if point.name in (name, _ALIASES.get(name))]
    if not wanted:
        known = ", ".join(sorted(found.names))
        raise OptionError(f"there is no exporter of traces {name!r} here; installed: {known}")
    try:
        exporter: SpanExporter = wanted[0].load()()
    except ImportError as error:
        raise MissingPackage(_MISSING) from error
    return exporter


def _make_provider(exporter: _GiveUpExporter) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "wsi-mmm", "service.version": __version__}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", exporter)))
    return provider


@contextmanager
def tracing(exporter: SpanExporter) -> Iterator[Hooks]:
    """Send spans of a run to ``exporter``, in batches, from a thread.

    A collector that does not answer costs the run nothing and its end PATIENCE seconds at most: it is told in one line.
    """
    careful = _GiveUpExporter(exporter)
    spans = _RunSpans(careful)
    library = logging.getLogger("opentelemetry")
    before = library.level
    library.setLevel(logging.CRITICAL + 1)  # it tells of each batch and each try; one line of ours is enough
    try:
        yield Hooks(spans.hear, spans.watch)
    except BaseException as error:
        spans.fail(type(error).__name__)
        raise
    finally:
        closing = threading.Thread(target=spans.close, name="wsi-mmm-traces", daemon=True)
        closing.start()
        closing.join(PATIENCE)
        if careful.failed or closing.is_alive():
            text = "traces could not be sent: check OTEL_EXPORTER_OTLP_ENDPOINT, and that a collector listens there"
            logging.getLogger("wsi_mmm").warning(text)
        library.setLevel(before)


class _GiveUpExporter:
    """An exporter that gives up after the first batch that could not be sent: the others would cost as much time."""

    def __init__(self, inner: SpanExporter) -> None:
        self.inner, self.failed = inner, False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        from opentelemetry.sdk.trace.export import SpanExportResult

        if not self.failed:
            self.failed = self.inner.export(spans) is not SpanExportResult.SUCCESS
        return SpanExportResult.FAILURE if self.failed else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self.inner.force_flush(timeout_millis)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


class _RunSpans:
    """The spans that are open: that of the run and those of the slides under way."""

    def __init__(self, exporter: _GiveUpExporter) -> None:
        self._provider = _make_provider(exporter)
        self._tracer = self._provider.get_tracer("wsi_mmm", __version__)
        self._run = self._tracer.start_span("run")
        self._slides: dict[str, Span] = {}
        self._started: dict[str, float] = {}

    def watch(self, thing: WorkUnit | UnitResult) -> None:
        """Take in a unit that is started, or a result, which becomes a span."""
        from opentelemetry.trace import set_span_in_context

        if isinstance(thing, WorkUnit):
            task = thing.slide
            if task.id not in self._slides:
                facts = {"wsi_mmm.slide": task.id, "wsi_mmm.uri": store.redact(task.uri)}
                above = set_span_in_context(self._run)
                self._slides[task.id] = self._tracer.start_span("slide", context=above, attributes=facts)
            self._started[thing.name] = time.time()
        elif thing.facts.slide in self._slides:
            self._add_unit(thing, set_span_in_context(self._slides[thing.facts.slide]))

    def _add_unit(self, result: UnitResult, above: Context) -> None:
        facts = result.facts
        started = self._started.pop(facts.name, time.time())
        begin = min((one.start for one in facts.times), default=started)
        end = max((one.end for one in facts.times), default=time.time())
        attributes: dict[str, str | int | float] = {
            "wsi_mmm.slide": facts.slide, "wsi_mmm.unit": facts.name, "wsi_mmm.status": result_status(result),
            "wsi_mmm.worker": facts.worker, "wsi_mmm.tiles": result.tiles if isinstance(result, ForwardResult) else 0,
        }  # fmt: skip
        attributes |= {f"wsi_mmm.seconds.{stage}": spent for stage, spent in timing.sum_stages(facts.times).items()}
        span = self._tracer.start_span(facts.kind, context=above, start_time=_ns(begin), attributes=attributes)
        if isinstance(result, Failure):
            _mark_failed(span, result.error)
        span.end(end_time=_ns(max(begin, end)))

    def hear(self, event: Event) -> None:
        """Take in an event: the span of a slide ends with the slide."""
        if event.kind == "slide" and event.slide in self._slides:
            span = self._slides.pop(event.slide)
            span.set_attribute("wsi_mmm.status", event.status or "")
            if event.status is SlideStatus.FAILED:
                _mark_failed(span, event.message)
            span.end()

    def fail(self, reason: str) -> None:
        """Mark what is open as failed: the run ends with an exception."""
        for span in (*self._slides.values(), self._run):
            _mark_failed(span, reason)

    def close(self) -> None:
        """End open spans and send what is left."""
        for span in (*self._slides.values(), self._run):
            span.end()
        self._provider.shutdown()


def _mark_failed(span: Span, reason: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, redact_uris(reason)))
