"""The jobs of a cluster, on a metadata client that is a dict."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from wsi_mmm.engine.executors import job_registry
from wsi_mmm.engine.executors.job_registry import JobRegistry, JobStatus, LiveJobs, publishing_status
from wsi_mmm.engine.job import JobProgress
from wsi_mmm.errors import Cancelled, ClusterError


@dataclass
class Dict:
    """Keeps what Dask's scheduler would, as it does."""

    kept: dict[str, Any] = field(default_factory=dict)

    def get_metadata(self, keys: list[str], default: Any = None) -> Any:
        found: Any = self.kept
        for key in keys:
            if key not in found:
                return default
            found = found[key]
        return found

    def set_metadata(self, key: list[str], value: Any) -> None:
        inner = self.kept
        for one in key[:-1]:
            if not isinstance(inner.get(one), dict):
                inner[one] = {}
            inner = inner[one]
        inner[key[-1]] = value


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_registry, "EVERY", 0.02)


def test_a_note_is_read_as_it_was_posted() -> None:
    """By whoever reaches the keeper; a job that nobody posted is a ClusterError."""
    registry = JobRegistry(Dict())
    status = JobStatus("a", "/out", "running", 1, 3, 10, 40, started=5.0, warnings=("w",))
    registry.put_status(status)
    assert registry.status("a") == status and registry.statuses() == [status]
    assert registry.status("a").progress().fraction == 0.25
    with pytest.raises(ClusterError, match="no job 'b'"):
        registry.status("b")
    registry.forget("a")
    assert registry.statuses() == []


def test_a_job_that_runs_keeps_its_note_up_to_date_and_hears_a_stop() -> None:
    """Tiles as they are done; once somebody asks, the stop is set; the end is noted."""
    registry, progress, stop = JobRegistry(Dict()), JobProgress(), threading.Event()
    with pytest.raises(Cancelled), publishing_status(registry, JobStatus("a", "/out"), progress, stop):
        _until_stopped(registry, progress, stop)
    assert registry.status("a").state == "cancelled" and registry.status("a").ended > 0


def _until_stopped(registry: JobRegistry, progress: JobProgress, stop: threading.Event) -> None:
    progress.tiles_done, progress.tiles_total = 7, 9
    time.sleep(0.2)
    assert (registry.status("a").state, registry.status("a").tiles_done, registry.status("a").tries) == (
        "running",
        7,
        1,
    )
    registry.ask_to_stop("a")
    assert stop.wait(5)
    raise Cancelled("stopped")


def test_how_a_job_failed_is_noted_in_one_line() -> None:
    """The text of whatever ended it."""
    registry = JobRegistry(Dict())
    with (
        pytest.raises(ValueError, match="two"),
        publishing_status(registry, JobStatus("a", "/o"), JobProgress(), threading.Event()),
    ):
        raise ValueError("two\nlines")
    assert (registry.status("a").state, registry.status("a").error) == ("failed", "two lines")


def test_a_board_that_is_gone_does_not_stop_the_job() -> None:
    """What is wrong with the cluster is told by the works, not by the statuses."""

    class Gone(Dict):
        def set_metadata(self, key: list[str], value: Any) -> None:
            if self.kept:
                raise OSError("gone")
            super().set_metadata(key, value)

    with publishing_status(JobRegistry(Gone()), JobStatus("a", "/o"), JobProgress(), threading.Event()):
        time.sleep(0.1)


def test_only_jobs_whose_beat_goes_on_share_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose process died counts no more after a while; one that has ended, at once."""
    monkeypatch.setattr(job_registry, "SILENT", 0.1)
    registry = JobRegistry(Dict())
    alive = LiveJobs(registry, "a")
    statuses = [JobStatus(name, "/o", "running") for name in "abc"]
    for status in [*statuses, JobStatus("d", "/o", "done"), JobStatus("e", "/o", "waiting")]:
        registry.put_status(status)
    assert alive.running() == {"a", "b", "c"} and alive() == 3
    time.sleep(0.15)
    registry.put_status(replace(statuses[1], beat=1))
    assert alive.running() == {"a", "b"}


def test_the_oldest_of_many_jobs_are_surplus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ended first, beyond the number that is remembered; never one that runs."""
    monkeypatch.setattr(job_registry, "KEPT_JOBS", 2)
    registry = JobRegistry(Dict())
    registry.put_status(JobStatus("r", "/o", "running"))
    for n, name in enumerate("abcd"):
        registry.put_status(JobStatus(name, "/o", "done", ended=10.0 + n))
    assert [status.id for status in registry.surplus()] == ["a", "b"]
