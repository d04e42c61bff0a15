"""The commands about jobs on a cluster; the cluster is a fake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from helpers.commands import invoke
from wsi_mmm.cli import jobs
from wsi_mmm.engine.executors.job_registry import JobStatus


@dataclass
class FakeJob:
    """A job that shows these statuses and then, when nobody ends it, Ctrl-C."""

    statuses: list[JobStatus]
    cancelled: list[str] = field(default_factory=list)

    def watch(self) -> Iterator[JobStatus]:
        yield from self.statuses
        if not self.statuses or not self.statuses[-1].over:
            raise KeyboardInterrupt

    def cancel(self) -> None:
        self.cancelled.append("asked")


@pytest.mark.parametrize("seen", [0, 1])
def test_leaving_a_job_leaves_it_alone_and_says_so(seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the watching; the words name how to watch again and how to stop the job."""
    job = FakeJob([JobStatus("1a2b", "/out", "running", slides_total=3)] * seen)
    monkeypatch.setattr(jobs, "_attach_job", lambda *args: job)
    done = invoke("jobs", "watch", "1a2b", "--scheduler", "tcp://h:1")
    assert done.exit_code == 130 and not job.cancelled and done.stderr == ""
    last = done.stdout.splitlines()[-1]
    assert last.startswith("job 1a2b goes on; 'wsi-mmm jobs watch 1a2b --scheduler tcp://h:1' follows it")
    assert "jobs cancel 1a2b --scheduler tcp://h:1" in last and "stopped" not in done.output


def test_watching_to_the_end_shows_each_warning_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job was warned of is for whoever watches it."""
    states = [("running", ("off scale",)), ("running", ("off scale", "coarse")), ("done", ("off scale", "coarse"))]
    job = FakeJob([JobStatus("1a2b", "/out", state, warnings=said) for state, said in states])  # type: ignore[arg-type]
    monkeypatch.setattr(jobs, "_attach_job", lambda *args: job)
    done = invoke("jobs", "watch", "1a2b", "--scheduler", "tcp://h:1")
    assert done.exit_code == 0
    assert [line for line in done.stdout.splitlines() if "warning" in line] == ["warning: off scale", "warning: coarse"]
