"""What can be seen of a run on a cluster: its workers in the report, and metrics where they serve them."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import wsi_mmm
from wsi_mmm.api import Event

pytestmark = pytest.mark.slow
pytest.importorskip("prometheus_client")


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes of two threads, which serve what they have to say on ports of loopback."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0", silence_logs=50,
    ) as held:  # fmt: skip
        yield held


@pytest.fixture(scope="module")
def seen(
    cluster: Any, tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[Event]]:
    """report.json of a run over the tiny slide on that cluster, and what was said."""
    output, said = tmp_path_factory.mktemp("seen"), list[Event]()
    report = wsi_mmm.run(
        tiny_slide, output=output, scheduler=cluster.scheduler_address, block_tiles=1, progress=said.append
    )
    assert report.exit_code == 0
    return json.loads((output / "report.json").read_text()), said


def test_each_worker_has_its_time(seen: tuple[dict[str, Any], list[Event]]) -> None:
    """Per worker the stages are its threads times its wall time to a hundredth; the tiles are those of the slide."""
    report, _ = seen
    assert 1 <= len(report["workers"]) <= 2
    for worker in report["workers"]:
        assert 1 <= worker["threads"] <= 2
        assert sum(worker["time"].values()) == pytest.approx(worker["threads"] * worker["seconds"], rel=0.01, abs=0.01)
    assert sum(worker["tiles"] for worker in report["workers"]) == report["slides"][0]["tiles"]


def test_the_dashboard_is_named(seen: tuple[dict[str, Any], list[Event]]) -> None:
    """Its address is said before anything else happens."""
    _, said = seen
    assert said[0].kind == "stage" and said[0].message.startswith("dashboard: http://127.0.0.1:")
    with urllib.request.urlopen(said[0].message.removeprefix("dashboard: "), timeout=20) as answer:
        assert answer.status == 200


def test_workers_serve_their_counters(cluster: Any, seen: tuple[dict[str, Any], list[Event]]) -> None:
    """At the /metrics of distributed, beside its own: the tiles of all workers are those of the slide."""
    report, _ = seen
    tiles = 0.0
    for worker in cluster.scheduler_info["workers"].values():
        url = f"http://127.0.0.1:{worker['services']['dashboard']}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            text = answer.read().decode()
        assert "dask_worker_threads" in text
        tiles += sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("wsi_mmm_tiles_total "))
    assert tiles == report["slides"][0]["tiles"]
