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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from wsi_mmm import timing
from wsi_mmm._version import __version__
from wsi_mmm.engine.events import Event, SlideStatus
from wsi_mmm.engine.monitoring.hooks import Hooks, redact_uris
from wsi_mmm.engine.units import Failure, ForwardResult, SlideTask, UnitResult, WorkUnit, result_status
from wsi_mmm.errors import MissingPackage, OptionError
from wsi_mmm.storage import store

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, Tracer

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
    """Send spans of a run to ``exporter``, in batches from a thread that begins with the first unit.

    A collector that does not answer costs the run nothing and its end PATIENCE seconds at most: it is told in one line.
    """
    careful = _GiveUpExporter(exporter)
    spans = _RunSpans(careful)
    with _quiet_library():
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


@contextmanager
def _quiet_library() -> Iterator[None]:
    """The library tells of each batch and each try; one line of ours is enough."""
    logger = logging.getLogger("opentelemetry")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


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


@dataclass(frozen=True, slots=True)
class _OpenSpan:
    """A span that is open, and what spans below it are started in."""

    span: Span
    context: Context


class _RunSpans:
    """The spans that are open: that of the run and those of the slides under way."""

    def __init__(self, exporter: _GiveUpExporter) -> None:
        self._exporter, self._begun = exporter, time.time_ns()
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self._run: _OpenSpan | None = None
        self._slides: dict[str, _OpenSpan] = {}
        self._started: dict[str, float] = {}

    def watch(self, thing: WorkUnit | UnitResult) -> None:
        """Take in a unit that is started, or a result, which becomes a span."""
        if isinstance(thing, WorkUnit):
            if thing.slide.id not in self._slides:
                self._begin_slide(thing.slide)
            self._started[thing.name] = time.time()
        elif thing.facts.slide in self._slides:
            self._add_unit(thing)

    def _open_span(self, name: str, above: _OpenSpan | None, **facts: Any) -> _OpenSpan:
        from opentelemetry.trace import set_span_in_context

        if self._tracer is None:
            self._provider = _make_provider(self._exporter)
            self._tracer = self._provider.get_tracer("wsi_mmm", __version__)
        span = self._tracer.start_span(name, context=above.context if above else None, **facts)
        return _OpenSpan(span, set_span_in_context(span))

    def _begin_slide(self, task: SlideTask) -> None:
        if self._run is None:
            self._run = self._open_span("run", None, start_time=self._begun)
        facts = {"wsi_mmm.slide": task.id, "wsi_mmm.uri": store.redact(task.uri)}
        self._slides[task.id] = self._open_span("slide", self._run, attributes=facts)

    def _add_unit(self, result: UnitResult) -> None:
        assert self._tracer is not None
        facts = result.facts
        started = self._started.pop(facts.name, time.time())
        begin = min((one.start for one in facts.times), default=started)
        end = max((one.end for one in facts.times), default=time.time())
        above = self._slides[facts.slide].context
        span = self._tracer.start_span(
            facts.kind, context=above, start_time=_ns(begin), attributes=_unit_attributes(result)
        )
        if isinstance(result, Failure):
            _mark_failed(span, result.error)
        span.end(end_time=_ns(max(begin, end)))

    def hear(self, event: Event) -> None:
        """Take in an event: the span of a slide ends with the slide."""
        if event.kind == "slide" and event.slide in self._slides:
            span = self._slides.pop(event.slide).span
            span.set_attribute("wsi_mmm.status", event.status or "")
            if event.status is SlideStatus.FAILED:
                _mark_failed(span, event.message)
            span.end()

    def fail(self, reason: str) -> None:
        """Mark what is open as failed: the run ends with an exception."""
        for one in [*self._slides.values(), *([self._run] if self._run else [])]:
            _mark_failed(one.span, reason)

    def close(self) -> None:
        """End open spans and send what is left."""
        for one in self._slides.values():
            one.span.end()
        if self._run is not None:
            self._run.span.end()
        if self._provider is not None:
            self._provider.shutdown()
        else:
            self._exporter.shutdown()


def _unit_attributes(result: UnitResult) -> dict[str, str | int | float]:
    facts = result.facts
    found: dict[str, str | int | float] = {
        "wsi_mmm.slide": facts.slide, "wsi_mmm.unit": facts.name, "wsi_mmm.status": result_status(result),
        "wsi_mmm.worker": facts.worker, "wsi_mmm.tiles": result.tiles if isinstance(result, ForwardResult) else 0,
    }  # fmt: skip
    stages = timing.sum_stages(facts.times)
    return found | {f"wsi_mmm.seconds.{stage}": seconds for stage, seconds in stages.items()}


def _mark_failed(span: Span, reason: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, redact_uris(reason)))
