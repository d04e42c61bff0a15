"""Traces for OpenTelemetry."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import cast

import pytest

from wsi_mmm.engine.monitoring import traces
from wsi_mmm.engine.monitoring.observe import Hooks
from wsi_mmm.engine.monitoring.traces import exporter_named, tracing
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import SlideTask, WorkUnit
from wsi_mmm.errors import Cancelled, MissingPackage, OptionError

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

Story = Callable[[Hooks], None]


def spans_of(story: Story) -> list[ReadableSpan]:
    """The spans of a run, in the order they ended."""
    kept = InMemorySpanExporter()
    with tracing(kept) as hooks:
        story(hooks)
    return list(kept.get_finished_spans())


def test_a_run_is_a_tree_of_spans(story: Story) -> None:
    """The run above its slides, a slide above its units, all of one trace."""
    spans = spans_of(story)
    by_id = {span.context.span_id: span for span in spans}
    assert len({span.context.trace_id for span in spans}) == 1
    [run] = [span for span in spans if span.parent is None]
    assert run.name == "run" and run.resource.attributes["service.name"] == "wsi-mmm"
    for span in spans:
        above = by_id[span.parent.span_id].name if span.parent else ""
        assert above == {"run": "", "slide": "run"}.get(span.name, "slide")
    assert sorted(span.name for span in spans) == [
        "forward",
        "forward",
        "plan",
        "plan",
        "publish",
        "run",
        "slide",
        "slide",
    ]


def test_a_unit_is_as_long_as_its_laps(story: Story) -> None:
    """From the start of the first to the end of the last, with unit, worker, tiles and the seconds of its stages."""
    [unit] = [s for s in spans_of(story) if s.attributes and s.attributes.get("wsi_mmm.unit") == "good/forward/0-0"]
    assert unit.start_time is not None and unit.end_time is not None and unit.attributes is not None
    assert (unit.end_time - unit.start_time) / 1e9 == pytest.approx(1.0, abs=0.001)
    assert unit.attributes["wsi_mmm.slide"] == "good" and unit.attributes["wsi_mmm.worker"] == "node:1"
    assert unit.attributes["wsi_mmm.tiles"] == 4 and unit.attributes["wsi_mmm.seconds.decode"] == 0.3


def test_what_failed_is_marked_and_nothing_shows_a_secret(story: Story) -> None:
    """The unit and the slide are errors with the reason; URIs have no credentials."""
    spans = spans_of(story)
    bad = [span for span in spans if not span.status.is_ok]
    assert sorted(span.name for span in bad if span.status.description) == ["plan", "slide"]
    assert all("no answer" in (span.status.description or "") for span in bad if span.status.description)
    assert "hush" not in "".join(span.to_json() for span in spans)
    [slide] = [s for s in spans if s.name == "slide" and s.attributes and s.attributes["wsi_mmm.slide"] == "good"]
    assert slide.attributes is not None and slide.attributes["wsi_mmm.status"] == "partial"
    assert slide.attributes["wsi_mmm.uri"] == "s3://bucket/good.svs"


def test_a_run_that_is_cut_short_ends_its_spans() -> None:
    """They say why, and are handed over."""
    kept = InMemorySpanExporter()
    task = SlideTask("s", "s.svs", "out/s", Recipe("default", "hash", (), 0.5, 256, 0))

    def run() -> None:
        with tracing(kept) as hooks:
            hooks.watch(WorkUnit("plan", task))
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        run()
    assert [(span.name, span.status.description) for span in kept.get_finished_spans()] == [
        ("slide", "Cancelled"),
        ("run", "Cancelled"),
    ]


class Deaf:
    """A collector that answers nothing of use, and takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    def export(self, spans: object) -> SpanExportResult:
        self.asked += 1
        time.sleep(self.seconds)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Nothing to let go of."""

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_a_collector_that_does_not_answer_is_told_in_one_line(
    story: Story, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked once, and the end of the run waits for it no longer than the patience there is."""
    monkeypatch.setattr(traces, "PATIENCE", 0.5)
    deaf = Deaf(seconds)
    with tracing(cast("InMemorySpanExporter", deaf)) as hooks:
        for _ in range(150):  # more than one batch
            story(hooks)
        ends = time.perf_counter()
    assert time.perf_counter() - ends < 10
    assert deaf.asked == 1
    assert [record.message.partition(":")[0] for record in caplog.records] == ["traces could not be sent"]


def test_an_exporter_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OTEL_TRACES_EXPORTER names it; for an unknown one those there are, without the package the extra."""
    assert type(exporter_named("console")).__name__ == "ConsoleSpanExporter"
    exporter = exporter_named("otlp")
    assert type(exporter).__name__ == "OTLPSpanExporter"
    exporter.shutdown()
    with pytest.raises(OptionError, match=r"'zipkinn'.*installed: .*console"):
        exporter_named("zipkinn")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(MissingPackage, match=r"wsi-mmm\[tracing\]"):
        exporter_named("console")
