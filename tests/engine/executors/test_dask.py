"""What the Dask executor makes of the workers it finds; the cluster is a fake."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

import wsi_mmm
from wsi_mmm.engine.executors import dask
from wsi_mmm.engine.executors.dask import AHEAD, DaskExecutor
from wsi_mmm.errors import ClusterError


@dataclass
class FakeScheduler:
    workers: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        facts = {
            worker: {"nthreads": f[0], "resources": f[3] if len(f) > 3 else {}} for worker, f in self.workers.items()
        }
        return {"workers": facts}


@dataclass
class FakeClient:
    """Workers by address: (threads, version of wsi-mmm or None, has torch, resources)."""

    workers: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    dashboard_link: str = ""

    @property
    def scheduler(self) -> FakeScheduler:
        return FakeScheduler(self.workers)

    def sync(self, call: Callable[[], Any]) -> Any:
        return call()

    def run(self, what: Callable[..., Any], *_: str, workers: list[str], on_error: str) -> dict[str, Any]:
        asked = {worker: self.workers[worker] for worker in workers}
        if what is importlib.metadata.version:
            return {worker: facts[1] or ModuleNotFoundError("wsi-mmm") for worker, facts in asked.items()}
        return {worker: object() if facts[2] else None for worker, facts in asked.items()}


GOOD = (2, wsi_mmm.__version__, True)


@pytest.fixture(autouse=True)
def _always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "CHECK_EVERY", 0.0)


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({}, "no workers: start some"),
        ({"a": (2, wsi_mmm.__version__, False)}, "torch is not installed there"),
        ({"a": (2, None, True)}, "wsi-mmm is not installed there"),
        ({"a": (2, "9.9", True)}, "it has wsi-mmm 9.9"),
    ],
)
def test_a_cluster_that_cannot_do_the_work_is_refused(workers: dict[str, Any], words: str) -> None:
    """No worker, no torch, no wsi-mmm or another version: one line that says which."""
    with pytest.raises(ClusterError, match=words):
        DaskExecutor(FakeClient(workers))


def test_a_worker_that_cannot_do_the_work_is_left_out() -> None:
    """The others do it; the one left out is a warning."""
    executor = DaskExecutor(FakeClient({"a": GOOD, "b": (2, None, True)}))
    assert executor.capabilities.warnings == ("worker b cannot be used: wsi-mmm is not installed there",)
    assert executor.room("forward") == AHEAD * 2


def test_workers_that_join_or_leave_are_counted() -> None:
    """A cluster that grows in the middle of a run is used; one that shrinks is not flooded."""
    client = FakeClient({"a": GOOD})
    executor = DaskExecutor(client)
    client.workers |= {"b": GOOD, "c": GOOD}
    executor.wait(0)
    assert executor.room("forward") == AHEAD * 6
    del client.workers["a"], client.workers["b"]
    executor.wait(0)
    assert executor.room("forward") == AHEAD * 2


def test_a_cluster_that_has_lost_its_workers_for_long_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short absence is waited for; a long one is a line, not a hang."""
    client = FakeClient({"a": GOOD})
    executor = DaskExecutor(client)
    client.workers.clear()
    assert executor.wait(0) is None
    monkeypatch.setattr(dask, "NO_WORKER_SECONDS", -1.0)
    with pytest.raises(ClusterError, match="no worker has been there"):
        executor.wait(0)


def test_a_lost_scheduler_ends_the_run() -> None:
    """ClusterError says how to go on."""
    client = FakeClient({"a": GOOD})
    executor = DaskExecutor(client)
    client.status = "closed"
    with pytest.raises(ClusterError, match="run again to resume"):
        executor.wait(0)


def test_where_some_workers_are_for_models_only_those_count_for_them() -> None:
    """Models have places at the workers with the resource GPU; the rest is done by all."""
    executor = DaskExecutor(FakeClient({"a": GOOD, "b": (4, wsi_mmm.__version__, True, {"GPU": 1.0})}))
    assert executor.room("forward") == AHEAD * 4
    assert executor.room("publish") == AHEAD * 6


def test_jobs_share_the_places_evenly() -> None:
    """Each of three jobs keeps a third of the workers' threads fed; alone, it has them all."""
    jobs = [3]
    executor = DaskExecutor(FakeClient({"a": (6, wsi_mmm.__version__, True)}), jobs=lambda: jobs[0])
    assert executor.room("forward") == AHEAD * 2
    jobs[0] = 1
    executor.wait(0)
    assert executor.room("forward") == AHEAD * 6
