"""Metrics for Prometheus."""

from __future__ import annotations

import socket
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest

from wsi_mmm.engine.monitoring import metrics
from wsi_mmm.engine.monitoring.metrics import MetricsRecorder, serving
from wsi_mmm.engine.monitoring.observe import Hooks
from wsi_mmm.engine.units import ForwardResult, UnitFacts
from wsi_mmm.errors import MissingPackage, OptionError
from wsi_mmm.timing import StepTime

prometheus_client = pytest.importorskip("prometheus_client")

Story = Callable[[Hooks], None]


@pytest.fixture
def port() -> int:
    """A port of loopback that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scraped(port: int) -> dict[str, float]:
    """What Prometheus would be given: sample -> value."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    assert "hush" not in text
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_a_run_can_be_scraped_while_it_goes(port: int, story: Story) -> None:
    """Tiles, bytes, cache hits, failures, units and their queue, busy share and stages; nothing after the run."""
    with serving(port) as hooks:
        story(hooks)
        found = scraped(port)
    wanted = {
        "wsi_mmm_tiles_total": 7, "wsi_mmm_tiles_planned_total": 7, "wsi_mmm_cache_hits_total": 3,
        "wsi_mmm_failed_tiles_total": 1, "wsi_mmm_objects_total": 42, "wsi_mmm_read_bytes_total": 1500,
        'wsi_mmm_units_total{kind="forward",status="partial"}': 1,
        'wsi_mmm_units_total{kind="plan",status="failed"}': 1,
        'wsi_mmm_units_in_flight{kind="forward"}': 0, 'wsi_mmm_slides_total{status="failed"}': 1,
        "wsi_mmm_slides_asked": 2, 'wsi_mmm_stage_seconds_total{stage="decode"}': 0.3,
    }  # fmt: skip
    assert {name: found.get(name) for name in wanted} == wanted
    assert "process_resident_memory_bytes" in found
    with pytest.raises(urllib.error.URLError):
        scraped(port)


def test_only_this_machine_can_scrape(port: int, story: Story) -> None:
    """The port is one of loopback."""
    with serving(port) as hooks:
        story(hooks)
        assert metrics.LOOPBACK == "127.0.0.1"
        with socket.socket() as other:  # the port of every other address is free
            other.bind(("127.0.0.2", port))


def test_a_port_that_is_taken_is_told_before_the_run(port: int) -> None:
    """And one that is no port."""
    with serving(port), pytest.raises(OptionError, match=f"port {port}: .*in use; choose another"), serving(port):
        pass
    with pytest.raises(OptionError, match="choose another"), serving(70000):
        pass


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, in one line."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingPackage, match=r"wsi-mmm\[metrics\]"), serving(0):
        pass


def test_the_busy_share_is_that_of_the_last_minute() -> None:
    """Averaged over the workers that ran a model; what was before the run or a minute ago counts for nothing."""
    recorder, now = MetricsRecorder(prometheus_client.CollectorRegistry()), time.time()
    assert recorder.share() == 0.0
    recorder._since = now - 600
    for worker, spans in (("a:1", ((now - 300, now - 45),)), ("b:1", ((now - 30, now - 15), (now - 20, now)))):
        times = tuple(StepTime("model", 1, start, end) for start, end in spans)
        recorder.receive(ForwardResult(UnitFacts("forward", "s", worker=worker, times=times), 0))
    assert recorder.share() == pytest.approx((15 + 30) / 2 / 60, abs=0.01)


def test_bytes_are_counted_once_for_each_worker() -> None:
    """Receipts tell what a worker has read of a slide so far; a slide that was opened anew begins at nothing."""
    registry = prometheus_client.CollectorRegistry()
    recorder = MetricsRecorder(registry)
    for worker, total in (("a:1", 100), ("a:1", 150), ("b:1", 70), ("a:1", 150), ("a:1", 20)):
        recorder.receive(ForwardResult(UnitFacts("forward", "s", worker=worker, bytes_read=total), 0))
    assert registry.get_sample_value("wsi_mmm_read_bytes_total") == 150 + 70 + 20


def test_a_worker_counts_where_it_serves_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where distributed has loaded prometheus_client, and then among what it serves there; elsewhere nothing."""
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(metrics, "_recorders", [])
    monkeypatch.delitem(sys.modules, "distributed.worker", raising=False)
    result = ForwardResult(UnitFacts("forward", "s", worker="a:1"), 4)
    metrics.count_here(result)
    assert registry.get_sample_value("wsi_mmm_tiles_total") is None
    monkeypatch.setitem(sys.modules, "distributed.worker", types.ModuleType("distributed.worker"))
    metrics.count_here(result)
    metrics.count_here(result)
    assert registry.get_sample_value("wsi_mmm_tiles_total") == 8
    assert registry.get_sample_value("wsi_mmm_units_in_flight", {"kind": "forward"}) is None


def test_a_unit_costs_microseconds() -> None:
    """Under 50 us of processor time for counting a receipt."""
    recorder, count, now = MetricsRecorder(prometheus_client.CollectorRegistry()), 2000, time.time()
    times = tuple(StepTime("read", n, 1.0, 2.0, {"fetch": 0.5, "decode": 0.5}) for n in range(2))
    results = []
    for n in range(count):
        model = StepTime("model", 3, now + n, now + n + 1, {"model": 1.0})
        facts = UnitFacts("forward", f"s{n % 7}", (n, 0), worker=f"a:{n % 9}", times=(*times, model))
        results.append(ForwardResult(facts, 4))
    begun = time.thread_time()
    for result in results:
        recorder.receive(result)
    assert (time.thread_time() - begun) / count < 50e-6
