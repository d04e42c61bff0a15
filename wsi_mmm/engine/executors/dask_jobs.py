"""Jobs that live on a Dask cluster: begun from one process, watched, awaited and cancelled from any other.

A worker drives such a job, beside its units, in a task that has left the worker's threads. When that worker dies
another one begins the task again, and resumes. The scheduler keeps the status of the job (`job_registry`) and, until it
is forgotten, its result.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from distributed import Client, Future, get_client, secede
from distributed.scheduler import KilledWorker

from wsi_mmm import timing
from wsi_mmm.engine.events import Listener
from wsi_mmm.engine.executors.bundles import LABEL_RESOURCE
from wsi_mmm.engine.executors.dask import DaskExecutor, client_of, workers_of
from wsi_mmm.engine.executors.job_registry import EVERY, JobRegistry, JobStatus, LiveJobs, new_job_id, publishing_status
from wsi_mmm.engine.executors.tls import Tls
from wsi_mmm.engine.job import JobProgress
from wsi_mmm.engine.monitoring.run_report import RunReport
from wsi_mmm.errors import Cancelled, ClusterError, WsiError
from wsi_mmm.storage import store

T = TypeVar("T")

BOOKS = "BOOKS"
"""The Dask resource of workers that drive jobs; without any, every worker may."""
URGENT = 100  # before all units: a job that has begun shares the cluster with the others
CANCEL_SECONDS = 3.0  # that a job which waits for a worker may take to notice that it is cancelled

JobFunction = Callable[[DaskExecutor, Listener, threading.Event], T]


@dataclass(frozen=True, slots=True)
class JobSpec(Generic[T]):
    """A job: ``run`` on its executor, and ``load_result`` when the worker that held the result is gone."""

    run: JobFunction[T]
    load_result: Callable[[], T]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """The result of a job, or the error that ended it."""

    result: T | None = None
    error: WsiError | None = None


def _run_job(name: str, spec: JobSpec[T]) -> Outcome[T]:
    """Drive a job from a worker."""
    client = get_client()
    secede()
    registry, progress, stop = JobRegistry(client), JobProgress(), threading.Event()
    status = registry.status(name)
    try:
        if status.over:
            return Outcome(spec.load_result() if status.state == "done" else None)
        if registry.should_stop(name):
            stop.set()
        with publishing_status(registry, replace(status, where=timing.worker_name()), progress, stop):
            executor = DaskExecutor(client, jobs=LiveJobs(registry, name))
            return Outcome(spec.run(executor, progress.hear, stop))
    except WsiError as error:
        return Outcome(error=error)


def launch_job(client: Client, output: str, slides: int, spec: JobSpec[T]) -> ClusterJob[T]:
    """Begin a job on the cluster; returns at once. ClusterError when the cluster cannot do it."""
    DaskExecutor(client)  # says what is wrong with the workers
    registry = JobRegistry(client)
    for old in registry.surplus():
        ClusterJob(client, old.id).forget()
    status = JobStatus(new_job_id(), store.redact(output), slides_total=slides)
    registry.put_status(status)
    apart = any(BOOKS in facts.resources for facts in workers_of(client).values())
    future = client.submit(
        _run_job, status.id, spec, key=_job_key(status.id), pure=False, priority=URGENT,
        resources={BOOKS: LABEL_RESOURCE} if apart else None,
    )  # fmt: skip
    client.publish_dataset(future, name=_job_key(status.id))
    return ClusterJob(client, status.id)


def _job_key(name: str) -> str:
    return f"wsi-mmm-job-{name}"


@dataclass(frozen=True, slots=True)
class ClusterJob(Generic[T]):
    """A job on a cluster. ``T`` is what ``result`` gives: a RunReport. It goes on without this process."""

    client: Client
    id: str

    @property
    def status(self) -> JobStatus:
        """Its state and progress. ClusterError when the cluster does not know the job any more."""
        with _translate_errors():
            return JobRegistry(self.client).status(self.id)

    @property
    def note(self) -> JobStatus:
        """The status, by its former name."""
        return self.status

    @property
    def progress(self) -> JobProgress:
        """How far it is."""
        return self.status.progress()

    @property
    def done(self) -> bool:
        """It has ended, well or not."""
        return self.status.over or self._task_future().status in ("error", "cancelled")

    def watch(self, every: float = EVERY) -> Iterator[JobStatus]:
        """Yield its status now, whenever it has changed, and when it has ended."""
        shown: JobStatus | None = None
        while True:
            status = self.status
            if shown is None or replace(status, beat=0) != replace(shown, beat=0):
                yield status
            shown = status
            if status.over:
                return
            self._raise_task_error()
            time.sleep(every)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the report. TimeoutError after ``timeout`` seconds, Cancelled after ``cancel``, or its own error."""
        try:
            with _translate_errors():
                outcome = self._task_future().result(timeout=timeout)
        except TimeoutError as error:
            share = f"{self.progress.fraction:.0%} of its tiles"
            raise TimeoutError(f"the job is still running after {timeout} s ({share})") from error
        if outcome.error is not None:
            raise outcome.error
        if outcome.result is None:
            self._raise_ended(self.status)
            raise ClusterError(f"the result of job {self.id} is gone; see the report in {self.status.output}")
        return outcome.result

    def cancel(self) -> None:
        """Ask it to stop; what is done stays, and submitting the same again resumes. Returns soon."""
        with _translate_errors():
            registry = JobRegistry(self.client)
            registry.ask_to_stop(self.id)
            until = time.monotonic() + CANCEL_SECONDS
            while registry.status(self.id).state == "waiting":
                if time.monotonic() > until:  # no worker was free to begin it
                    registry.put_status(replace(registry.status(self.id), state="cancelled", ended=time.time()))
                    return
                time.sleep(0.1)

    def forget(self) -> None:
        """Let the cluster drop what it knows of the job; one that still runs is cancelled."""
        with _translate_errors():
            if not self.status.over:
                self.cancel()
            with contextlib.suppress(KeyError):
                self.client.unpublish_dataset(_job_key(self.id))
            JobRegistry(self.client).forget(self.id)

    def _task_future(self) -> Future[Outcome[T]]:
        try:
            future: Future[Outcome[T]] = self.client.get_dataset(_job_key(self.id))
        except KeyError as error:
            self._raise_ended(self.status)
            raise ClusterError(f"the job {self.id} runs in the process that began it; see its output") from error
        return future

    def _raise_task_error(self) -> None:
        """Raise the error of the job's task, when it ended without a status."""
        with contextlib.suppress(TimeoutError), _translate_errors():
            future: Future[Outcome[T]] | None = self.client.get_dataset(_job_key(self.id), default=None)
            if future is not None and future.status in ("error", "cancelled"):
                future.result(timeout=10)

    def _raise_ended(self, status: JobStatus) -> None:
        """Raise the error of a job that did not end well."""
        if status.state == "cancelled":
            raise Cancelled("cancelled; submit the same again to resume")
        if status.state == "failed":
            raise ClusterError(status.error or f"the job {self.id} has failed")


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    """Translate what Dask raises when a cluster is gone into a ClusterError."""
    try:
        yield
    except (WsiError, TimeoutError):
        raise
    except KilledWorker as error:
        raise ClusterError("every worker that drove this job died; submit the same again to resume") from error
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.startswith("distributed")):
            raise
        raise ClusterError("the connection to the scheduler was lost; submit the same again to resume") from error


def find_job(client: Client | str, name: str, *, tls: Tls | None = None) -> ClusterJob[RunReport]:
    """The job of that id on a cluster. ClusterError when there is none."""
    job: ClusterJob[RunReport] = ClusterJob(client_of(client, tls=tls), name)
    _ = job.status
    return job


def job_statuses(client: Client | str, *, tls: Tls | None = None) -> list[tuple[JobStatus, bool]]:
    """All jobs that a cluster knows, and whether each is alive or has ended (else the process that ran it is gone).

    Takes some seconds when there is one that runs.
    """
    with _translate_errors():
        registry = JobRegistry(client_of(client, tls=tls))
        before = {status.id: status.beat for status in registry.statuses() if status.state == "running"}
        if before:
            time.sleep(2.5 * EVERY)
        return [
            (status, status.state != "running" or status.beat != before.get(status.id))
            for status in registry.statuses()
        ]
