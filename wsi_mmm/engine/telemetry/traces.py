"""Traces of a run for OpenTelemetry: a span for the run, one per slide, one per unit. Needs the extra ``tracing``.

Spans are made where the books are kept, from the times that receipts bring along, so workers need no library and no
context travels. Endpoint, headers, sampling, service name and batching follow the OTEL_ variables, which the library
reads. This is the home of opentelemetry.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import wsi_mmm
from wsi_mmm import clock
from wsi_mmm.engine.base import Receipt, SlideTask, Work
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.telemetry.hooks import Hooks, hidden, status_of
from wsi_mmm.errors import MissingPackage, RecipeError
from wsi_mmm.slides import store

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

GROUP = "opentelemetry_traces_exporter"  # where packages register exporters
_ALIASES = {"otlp": "otlp_proto_http"}
_MISSING = "traces need opentelemetry; pip install 'wsi-mmm[tracing]'"


def exporter_named(name: str) -> SpanExporter:
    """The exporter that is installed under a name, as in OTEL_TRACES_EXPORTER. Raises MissingPackage, RecipeError."""
    found = importlib.metadata.entry_points(group=GROUP)
    if not found:
        raise MissingPackage(_MISSING)
    wanted = [point for point in found if point.name in (name, _ALIASES.get(name))]
    if not wanted:
        known = ", ".join(sorted(found.names))
        raise RecipeError(f"there is no exporter of traces {name!r} here; installed: {known}")
    try:
        exporter: SpanExporter = wanted[0].load()()
    except ImportError as error:
        raise MissingPackage(_MISSING) from error
    return exporter


def _provider(exporter: SpanExporter) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "wsi-mmm", "service.version": wsi_mmm.__version__}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


@contextmanager
def tracing(exporter: SpanExporter) -> Iterator[Hooks]:
    """Send spans of a run to ``exporter``, in batches from a thread that begins with the first unit."""
    spans = _Spans(exporter)
    try:
        yield Hooks(spans.hear, spans.watch)
    except BaseException as error:
        spans.fail(type(error).__name__)
        raise
    finally:
        spans.close()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


class _Spans:
    """The spans that are open: that of the run and those of the slides under way."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter, self._begun = exporter, time.time_ns()
        self._provider: TracerProvider | None = None
        self._run: Span | None = None
        self._slides: dict[str, Span] = {}
        self._started: dict[str, float] = {}

    def watch(self, thing: Work | Receipt) -> None:
        """A unit goes out, or comes back and becomes a span."""
        if isinstance(thing, Work):
            self._slide(thing.slide)
            self._started[thing.name] = time.time()
        elif thing.slide in self._slides:
            self._unit(thing)

    def _tracer(self) -> Any:
        if self._provider is None:
            self._provider = _provider(self._exporter)
        return self._provider.get_tracer("wsi_mmm", wsi_mmm.__version__)

    def _slide(self, task: SlideTask) -> None:
        from opentelemetry.trace import set_span_in_context

        if self._run is None:
            self._run = self._tracer().start_span("run", start_time=self._begun)
        if task.id not in self._slides:
            facts = {"wsi_mmm.slide": task.id, "wsi_mmm.uri": store.redact(task.uri)}
            parent = set_span_in_context(self._run)
            self._slides[task.id] = self._tracer().start_span("slide", context=parent, attributes=facts)

    def _unit(self, receipt: Receipt) -> None:
        from opentelemetry.trace import set_span_in_context

        started = self._started.pop(receipt.name, time.time())
        begin = min((lap.start for lap in receipt.laps), default=started)
        end = max((lap.end for lap in receipt.laps), default=time.time())
        parent = set_span_in_context(self._slides[receipt.slide])
        span = self._tracer().start_span(
            receipt.kind, context=parent, start_time=_ns(begin), attributes=_attributes(receipt)
        )
        if receipt.status == "failed":
            _fault(span, receipt.error)
        span.end(end_time=_ns(max(begin, end)))

    def hear(self, event: Event) -> None:
        """The span of a slide ends with the slide."""
        if event.kind == "slide" and event.slide in self._slides:
            span = self._slides.pop(event.slide)
            span.set_attribute("wsi_mmm.status", status_of(event))
            if status_of(event) == "failed":
                _fault(span, event.message)
            span.end()

    def fail(self, reason: str) -> None:
        """The run ends with an exception."""
        for span in [*self._slides.values(), *([self._run] if self._run else [])]:
            _fault(span, reason)

    def close(self) -> None:
        """End what is open and hand over what is left, for as long as the exporter lets one wait."""
        for span in self._slides.values():
            span.end()
        if self._run is not None:
            self._run.end()
        if self._provider is not None:
            self._provider.shutdown()
        else:
            self._exporter.shutdown()


def _attributes(receipt: Receipt) -> dict[str, str | int | float]:
    facts: dict[str, str | int | float] = {
        "wsi_mmm.slide": receipt.slide, "wsi_mmm.unit": receipt.name, "wsi_mmm.status": receipt.status,
        "wsi_mmm.worker": receipt.worker, "wsi_mmm.tiles": receipt.tiles,
    }  # fmt: skip
    stages = clock.together(receipt.laps)
    return facts | {f"wsi_mmm.seconds.{stage}": round(seconds, 6) for stage, seconds in stages.items()}


def _fault(span: Span, reason: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, hidden(reason)))
