"""A run that is watched: its log, its metrics while it goes, its traces and its report agree; none shows a secret."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import wsi_mmm
from wsi_mmm.api import RunReport
from wsi_mmm.engine.monitoring import traces
from wsi_mmm.timing import STAGES

pytest.importorskip("prometheus_client")
pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SECRET = "hushMadeUpSecret9"


def free_port() -> int:
    """A port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def nothing_there() -> Iterator[str]:
    """The address of a web server that has nothing."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


class Scraper:
    """Asks for the metrics of a run again and again, as Prometheus does; keeps every answer."""

    def __init__(self, port: int) -> None:
        self.url, self.answers = f"http://127.0.0.1:{port}/metrics", list[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            try:
                with urllib.request.urlopen(self.url, timeout=1) as answer:
                    self.answers.append(answer.read().decode())
            except (urllib.error.URLError, OSError):  # before the run, and after it
                continue

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def value(answer: str, name: str) -> float:
    """A sample of an answer; 0 when it is not there yet."""
    found = [line for line in answer.splitlines() if line.startswith(f"{name} ")]
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


@pytest.fixture(scope="module")
def watched(tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run over the tiny slide and one that is not there, whose address holds a secret, with all that shows it."""
    folder, port, kept = tmp_path_factory.mktemp("watched"), free_port(), InMemorySpanExporter()
    with pytest.MonkeyPatch.context() as patch, Scraper(port) as scraper, nothing_there() as address:
        for name, words in {
            "AWS_ACCESS_KEY_ID": "AKIAMADEUP", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": f"token-{SECRET}",
            "AWS_ENDPOINT_URL": f"http://user:{SECRET}@127.0.0.1:9", "AWS_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(name, words)
        patch.setattr(traces, "exporter_named", lambda name: kept)
        observe = wsi_mmm.Observe(str(folder / "run.jsonl"), "debug", port, "memory")
        slides = [tiny_slide, f"http://user:{SECRET}@{address}/lost.svs?sig={SECRET}"]
        said: list[Any] = []
        begun = time.perf_counter()
        report = wsi_mmm.run(slides, output=folder / "out", block_tiles=1, observe=observe, progress=said.append)
        seconds = time.perf_counter() - begun
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return {
        "folder": folder, "report": report, "lines": lines, "spans": kept.get_finished_spans(),
        "answers": scraper.answers, "seconds": seconds, "said": said,
    }  # fmt: skip


def rows(watched: dict[str, Any]) -> list[dict[str, Any]]:
    """The workers of report.json."""
    found: list[dict[str, Any]] = json.loads((watched["folder"] / "out" / "report.json").read_text())["workers"]
    return found


def test_the_metrics_were_there_while_the_run_went(watched: dict[str, Any]) -> None:
    """They grow from scrape to scrape, and the last one before the end has at least all but the last tiles."""
    report: RunReport = watched["report"]
    good = report.slides[0]
    tiles = [value(answer, "wsi_mmm_tiles_total") for answer in watched["answers"]]
    assert len(tiles) > 3 and tiles == sorted(tiles)
    assert 0 < tiles[-1] <= good.tiles
    last = watched["answers"][-1]
    assert value(last, "wsi_mmm_read_bytes_total") > 0
    assert value(last, "wsi_mmm_tiles_planned_total") == good.tiles
    assert 'wsi_mmm_units_total{kind="plan",status="failed"} 1.0' in last
    assert max(value(answer, "wsi_mmm_busy_share") for answer in watched["answers"]) > 0


def test_log_traces_and_report_tell_of_the_same_units(watched: dict[str, Any]) -> None:
    """As many forwards in each, the tiles of the report, and the failed slide as an error in all."""
    report: RunReport = watched["report"]
    assert [row.status for row in report.slides] == ["done", "failed"]
    good, bad = report.slides
    units = [line for line in watched["lines"] if line["event"] == "unit"]
    forwards = {line["unit"] for line in units if line["kind"] == "forward"}
    spans = [span for span in watched["spans"] if span.name == "forward"]
    assert {span.attributes["wsi_mmm.unit"] for span in spans} == forwards
    assert sum(line.get("tiles", 0) for line in units if line["kind"] == "forward") == good.tiles
    assert sum(row["units"] for row in rows(watched)) == sum(line["status"] != "failed" for line in units)
    assert {line["slide"] for line in watched["lines"] if line["level"] == "error"} == {bad.id}
    [span] = [
        span for span in watched["spans"] if span.name == "slide" and not span.status.is_ok and span.status.description
    ]
    assert span.attributes["wsi_mmm.slide"] == bad.id


def test_the_time_of_a_worker_adds_up(watched: dict[str, Any]) -> None:
    """Its stages are its threads times its wall time to a hundredth, and that is nearly all of the run's."""
    [worker] = rows(watched)
    assert worker["worker"].endswith(f":{os.getpid()}")
    assert 3 <= worker["threads"] <= 9  # one for each unit under way
    assert set(worker["time"]) == set(STAGES)
    assert sum(worker["time"].values()) == pytest.approx(worker["threads"] * worker["seconds"], rel=0.01)
    assert 0.5 * watched["seconds"] < worker["seconds"] <= watched["seconds"] + 0.1
    for stage in ("prepare", "fetch", "decode", "model", "interpret", "write", "waiting"):
        assert worker["time"][stage] > 0, stage


def test_the_laps_of_a_thread_follow_each_other(watched: dict[str, Any]) -> None:
    """Seconds in stages, without waiting for a thread, are no more than the threads had: nothing is counted twice."""
    [worker] = rows(watched)
    units = [line for line in watched["lines"] if line["event"] == "unit" and line["status"] != "failed"]
    lapped = sum(sum(line["seconds"].values()) for line in units)
    assert lapped <= worker["threads"] * worker["seconds"] * 1.01
    own = {stage: seconds for stage, seconds in worker["time"].items() if stage != "waiting"}
    for stage, seconds in own.items():
        told = sum(line["seconds"].get(stage, 0.0) for line in units)
        assert seconds == pytest.approx(told, abs=0.05), stage


def test_the_time_of_a_slide_is_that_of_its_units(watched: dict[str, Any]) -> None:
    """The same stages as its worker's but for the waiting, which is that of its own units."""
    report: RunReport = watched["report"]
    good, [worker] = report.slides[0].extra["time"], rows(watched)
    for stage in STAGES:
        if stage != "waiting":
            assert good[stage] == pytest.approx(worker["time"][stage], abs=0.01)
    assert good["waiting"] >= 0


def test_a_secret_is_in_none_of_them(watched: dict[str, Any]) -> None:
    """Log, metrics, traces, report, page and events: neither the secret of the environment nor that of an address."""
    folder: Path = watched["folder"]
    texts = {str(path): path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()}
    texts |= {f"scrape {n}": answer for n, answer in enumerate(watched["answers"])}
    texts |= {f"span {n}": span.to_json() for n, span in enumerate(watched["spans"])}
    texts["events"] = repr(watched["said"])
    assert any("lost" in text for name, text in texts.items() if name.endswith("run.jsonl"))
    assert any("lost" in text for name, text in texts.items() if name.startswith("span"))
    for name, text in texts.items():
        assert SECRET not in text, name
        assert "AKIAMADEUP" not in text, name
