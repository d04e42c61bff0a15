"""What is asked for is there while the run goes, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from wsi_mmm.engine.monitoring import traces
from wsi_mmm.engine.monitoring.observe import Hooks, Observe
from wsi_mmm.engine.run import observing
from wsi_mmm.errors import OptionError

Story = Callable[[Hooks], None]


def test_nothing_is_loaded_or_begun_unless_asked_for() -> None:
    """A run that nobody watches knows neither library, no thread, no server and no handler of logs."""
    code = """
import logging, sys, threading
import wsi_mmm.api
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.run import observing
with observing() as seen:
    seen.listener(Event("stage", "s"))
    assert threading.active_count() == 1
    assert not logging.getLogger("wsi_mmm").handlers
names = {name.partition(".")[0] for name in sys.modules}
assert not names & {"prometheus_client", "opentelemetry", "wsgiref"}, names
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_all_of_it_at_once(tmp_path: Path, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log, metrics and traces of one run; afterwards no thread of theirs is left."""
    pytest.importorskip("prometheus_client")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    kept = memory.InMemorySpanExporter()
    monkeypatch.setattr(traces, "exporter_named", lambda name: kept)
    monkeypatch.setattr(traces, "PATIENCE", 60.0)  # a machine may be busy
    with observing(Observe(str(tmp_path / "run.jsonl"), "debug", 0, "memory")) as seen:
        story(seen)
        assert any(thread.name == "wsi-mmm-metrics" for thread in threading.enumerate())
    ours = ("wsi-mmm", "OtelBatch")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)]
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 9
    assert [span.name for span in kept.get_finished_spans()].count("slide") == 2


def test_what_is_wrong_leaves_nothing_open(tmp_path: Path) -> None:
    """The log that was opened before is closed again."""
    with pytest.raises(OptionError, match="no exporter"), observing(Observe(str(tmp_path / "x"), traces="nobody")):
        pass
    with observing(Observe(str(tmp_path / "x"), "info")) as seen:
        assert seen is not None
    assert json.loads("[" + ",".join((tmp_path / "x").read_text().splitlines()) + "]") == []
