"""Jobs that live on a Dask cluster: begun from one process, watched, awaited and cancelled from any other.

The books of such a job are kept by a worker, beside its other work: a task that has left the worker's threads. When
that worker dies another one begins it anew, and goes on where it was, for what is done is done. The scheduler keeps the
note of the job (`board`) and, until it is forgotten, its result.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from distributed import Client, Future, get_client, secede
from distributed.scheduler import KilledWorker

from wsi_mmm.engine.events import Listener
from wsi_mmm.engine.executors.dask import DaskExecutor, client_of, workers_of
from wsi_mmm.engine.executors.job_registry import EVERY, JobRegistry, JobStatus, LiveJobs, new_id, publishing_status
from wsi_mmm.engine.executors.pools import LABEL_RESOURCE
from wsi_mmm.engine.executors.tls import Tls
from wsi_mmm.engine.job import Progress
from wsi_mmm.errors import Cancelled, ClusterError, WsiError

T = TypeVar("T")

BOOKS = "BOOKS"
"""The Dask resource of workers that keep the books of jobs; without any, every worker does."""
URGENT = 100  # before all works: a job that has begun shares the cluster with the others
BEGUN = 3.0  # seconds that a job which somebody cancels may take to hear of it

JobFunction = Callable[[DaskExecutor, Listener, threading.Event], T]


@dataclass(frozen=True, slots=True)
class JobSpec(Generic[T]):
    """What a job does on its executor, and how its result is found again when the worker that held it is gone."""

    run: JobFunction[T]
    recall: Callable[[], T]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What came of an errand."""

    result: T | None = None
    error: WsiError | None = None


def _keep_books(name: str, errand: JobSpec[T]) -> Outcome[T]:
    """What the worker does that keeps a job's books."""
    client = get_client()
    secede()
    board, progress, stop = JobRegistry(client), Progress(), threading.Event()
    note = board.note(name)
    try:
        if note.over:
            return Outcome(errand.recall() if note.state == "done" else None)
        note = replace(note, where=f"{os.uname().nodename}:{os.getpid()}")
        if board.asked_to_stop(name):
            stop.set()
        with publishing_status(board, note, progress, stop):
            executor = DaskExecutor(client, jobs=LiveJobs(board, name))
            return Outcome(errand.run(executor, progress.hear, stop))
    except WsiError as error:
        return Outcome(error=error)


def launch(client: Client, output: str, slides: int, errand: JobSpec[T]) -> ClusterJob[T]:
    """Begin a job on the cluster; returns at once. ClusterError when the cluster cannot do it."""
    DaskExecutor(client)  # says what is wrong with the workers
    board = JobRegistry(client)
    for old in board.surplus():
        ClusterJob(client, old.id).forget()
    note = JobStatus(new_id(), output, slides_total=slides)
    board.post(note)
    apart = any(BOOKS in facts.resources for facts in workers_of(client).values())
    future = client.submit(
        _keep_books, note.id, errand, key=_key(note.id), pure=False, priority=URGENT,
        resources={BOOKS: LABEL_RESOURCE} if apart else None,
    )  # fmt: skip
    client.publish_dataset(future, name=_key(note.id))
    return ClusterJob(client, note.id)


def _key(name: str) -> str:
    return f"wsi-mmm-job-{name}"


@dataclass(frozen=True, slots=True)
class ClusterJob(Generic[T]):
    """A job on a cluster. ``T`` is what ``result`` gives: a RunReport. It goes on without this process."""

    client: Client
    id: str

    @property
    def note(self) -> JobStatus:
        """How it stands. ClusterError when nobody knows it any more."""
        with _said():
            return JobRegistry(self.client).note(self.id)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self.note.progress()

    @property
    def done(self) -> bool:
        """It has ended, well or not."""
        return self.note.over or self._future().status in ("error", "cancelled")

    def watch(self, every: float = EVERY) -> Iterator[JobStatus]:
        """Its note now, whenever it has changed, and when it has ended."""
        shown: JobStatus | None = None
        while True:
            note = self.note
            if shown is None or replace(note, beat=0) != replace(shown, beat=0):
                yield note
            shown = note
            if note.over:
                return
            self._check()
            time.sleep(every)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the report. TimeoutError after ``timeout`` seconds, Cancelled after ``cancel``, or its own error."""
        try:
            with _said():
                outcome = self._future().result(timeout=timeout)
        except TimeoutError as error:
            share = f"{self.progress.fraction:.0%} of its tiles"
            raise TimeoutError(f"the job is still running after {timeout} s ({share})") from error
        if outcome.error is not None:
            raise outcome.error
        if outcome.result is None:
            self._tell(self.note)
            raise ClusterError(f"the result of job {self.id} is gone; see the report in {self.note.output}")
        return outcome.result

    def cancel(self) -> None:
        """Ask it to stop; what is done stays, and submitting the same again resumes. Returns soon."""
        with _said():
            board = JobRegistry(self.client)
            board.ask_to_stop(self.id)
            until = time.monotonic() + BEGUN
            while board.note(self.id).state == "waiting":
                if time.monotonic() > until:  # no worker has found the time to begin it
                    board.post(replace(board.note(self.id), state="cancelled", ended=time.time()))
                    return
                time.sleep(0.1)

    def forget(self) -> None:
        """Let the cluster drop what it knows of the job; one that still runs is cancelled."""
        with _said():
            if not self.note.over:
                self.cancel()
            with contextlib.suppress(KeyError):
                self.client.unpublish_dataset(_key(self.id))
            JobRegistry(self.client).forget(self.id)

    def _future(self) -> Future[Outcome[T]]:
        try:
            future: Future[Outcome[T]] = self.client.get_dataset(_key(self.id))
        except KeyError as error:
            self._tell(self.note)
            raise ClusterError(f"the job {self.id} runs in the process that began it; see its output") from error
        return future

    def _check(self) -> None:
        """Raise what ended it, when it cannot say so itself."""
        with contextlib.suppress(TimeoutError), _said():
            future: Any = self.client.get_dataset(_key(self.id), default=None)
            if future is not None and future.status in ("error", "cancelled"):
                future.result(timeout=10)

    def _tell(self, note: JobStatus) -> None:
        if note.state == "cancelled":
            raise Cancelled("cancelled; submit the same again to resume")
        if note.state == "failed":
            raise ClusterError(note.error or f"the job {self.id} has failed")


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """What Dask says of a cluster that is not there any more, in our words."""
    try:
        yield
    except (WsiError, TimeoutError):
        raise
    except KilledWorker as error:
        raise ClusterError(
            "every worker that kept the books of this job died; submit the same again to resume"
        ) from error
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.startswith("distributed")):
            raise
        raise ClusterError("the connection to the scheduler was lost; submit the same again to resume") from error


def job_of(client: Client | str, name: str, *, tls: Tls | None = None) -> ClusterJob[Any]:
    """The job of that id on a cluster. ClusterError when there is none."""
    job: ClusterJob[Any] = ClusterJob(client_of(client, tls=tls), name)
    _ = job.note
    return job


def notes_of(client: Client | str, *, tls: Tls | None = None) -> list[tuple[JobStatus, bool]]:
    """All jobs that a cluster knows; whether each is alive or has ended (else whoever ran it is gone).

    Takes some seconds where one says that it runs.
    """
    with _said():
        board = JobRegistry(client_of(client, tls=tls))
        before = {note.id: note.beat for note in board.notes() if note.state == "running"}
        if before:
            time.sleep(2.5 * EVERY)
        return [(note, note.state != "running" or note.beat != before.get(note.id)) for note in board.notes()]
