"""The jobs of a cluster: a status per job, kept by Dask's scheduler, that every process on the cluster can read.

A status is a few hundred bytes, written anew every second while its job runs. ``beat`` counts the writes: a beat that
stands still means that nobody runs the job any more. This module needs no Dask, only a client that keeps metadata.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

from wsi_mmm.engine.job import JobProgress
from wsi_mmm.errors import Cancelled, ClusterError

JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED: tuple[JobState, ...] = ("done", "failed", "cancelled")
JOBS = "wsi-mmm-jobs"
EVERY = 1.0  # seconds between writes, and between looks at whether the job is to stop
SILENT = 30.0  # seconds without a new beat after which a job does not count any more
KEPT_JOBS = 50  # jobs that have ended and are remembered
KEPT_WARNINGS = 20


class MetadataClient(Protocol):
    """A client that keeps metadata for all: a Dask client, whose scheduler keeps it."""

    def get_metadata(self, keys: list[str], default: Any = None) -> Any:
        """The value under nested keys."""

    def set_metadata(self, key: list[str], value: Any) -> None:
        """Keep a value of plain types under nested keys."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """The state of a job. ``started``, ``ended``: epoch seconds, 0 when not yet; ``error``: one line.

    ``tries``: how often it was begun: again when the worker that ran it died. ``where``: host:pid that runs it.
    """

    id: str
    output: str
    state: JobState = "waiting"
    slides_done: int = 0
    slides_total: int = 0
    tiles_done: int = 0
    tiles_total: int = 0
    started: float = 0.0
    ended: float = 0.0
    beat: int = 0
    tries: int = 0
    where: str = ""
    error: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        """The job has ended; nothing will change."""
        return self.state in ENDED

    def progress(self) -> JobProgress:
        """The progress, as a job in this process has it."""
        return JobProgress(self.tiles_done, self.tiles_total, self.slides_done, self.slides_total, list(self.warnings))

    def updated(self, progress: JobProgress) -> JobStatus:
        """The status with the numbers of ``progress`` and the next beat."""
        return replace(
            self, tiles_done=progress.tiles_done, tiles_total=progress.tiles_total, slides_done=progress.slides_done,
            warnings=tuple(progress.warnings[:KEPT_WARNINGS]), beat=self.beat + 1,
        )  # fmt: skip


def new_job_id() -> str:
    """A new id: eight letters and digits."""
    return uuid.uuid4().hex[:8]


@dataclass(frozen=True, slots=True)
class JobRegistry:
    """The statuses of all jobs of a cluster."""

    client: MetadataClient

    def put_status(self, status: JobStatus) -> None:
        """Replace the status of a job."""
        self.client.set_metadata([JOBS, status.id, "status"], {**asdict(status), "warnings": list(status.warnings)})

    def status(self, name: str) -> JobStatus:
        """The status of a job. ClusterError when there is none."""
        found = self.client.get_metadata([JOBS], default={}).get(name)
        if not found or "status" not in found:
            raise ClusterError(f"there is no job {name!r} on this cluster; its scheduler knows those of 'jobs list'")
        return _parse_status(found["status"])

    def statuses(self) -> list[JobStatus]:
        """The statuses of all jobs, the oldest first."""
        kept = self.client.get_metadata([JOBS], default={}).values()
        found = [_parse_status(one["status"]) for one in kept if one and "status" in one]
        return sorted(found, key=lambda status: status.started or 1e12)

    def ask_to_stop(self, name: str) -> None:
        """Ask the process that runs a job to stop; it notices within EVERY seconds."""
        self.status(name)
        self.client.set_metadata([JOBS, name, "stop"], True)

    def should_stop(self, name: str) -> bool:
        """Somebody has asked the job to stop."""
        found = self.client.get_metadata([JOBS], default={}).get(name) or {}
        return bool(found.get("stop"))

    def forget(self, name: str) -> None:
        """Remove the status of a job."""
        self.client.set_metadata([JOBS, name], None)

    def surplus(self) -> list[JobStatus]:
        """The jobs that ended longest ago, beyond those that are remembered."""
        over = sorted((status for status in self.statuses() if status.over), key=lambda status: status.ended)
        return over[: max(0, len(over) - KEPT_JOBS)]


def _parse_status(raw: dict[str, Any]) -> JobStatus:
    known = {field.name for field in fields(JobStatus)}
    return JobStatus(**{**{k: v for k, v in raw.items() if k in known}, "warnings": tuple(raw.get("warnings", ()))})


class LiveJobs:
    """The jobs that are alive: their beat went on in the last SILENT seconds, as seen from here."""

    def __init__(self, registry: JobRegistry, own: str = "") -> None:
        self._registry, self._own = registry, own
        self._seen: dict[str, tuple[int, float]] = {}

    def running(self) -> set[str]:
        """Ids of the jobs that have units to run, one's own included."""
        now, found = time.monotonic(), {self._own} - {""}
        for status in self._registry.statuses():
            if status.state == "running":
                beat, since = self._seen.get(status.id, (-1, now))
                since = now if beat != status.beat else since
                self._seen[status.id] = status.beat, since
                if now - since < SILENT:
                    found.add(status.id)
        return found

    def __call__(self) -> int:
        """The number of live jobs, at least one."""
        return max(1, len(self.running()))


@contextmanager
def publishing_status(
    registry: JobRegistry, status: JobStatus, progress: JobProgress, stop: threading.Event
) -> Iterator[None]:
    """Keep the status of a job up to date while the context lasts; ``stop`` is set when somebody asks for it.

    The last status holds how the job ended: by the exception that left the context, or well.
    """
    status = replace(status, state="running", started=status.started or time.time(), tries=status.tries + 1)
    ended, latest = threading.Event(), [status]
    registry.put_status(status)
    thread = threading.Thread(
        target=_publish_until, args=(ended, registry, latest, progress, stop), name="wsi-mmm-board", daemon=True
    )
    thread.start()
    state: JobState = "failed"
    error = ""
    try:
        yield
        state = "done"
    except (Cancelled, KeyboardInterrupt):
        state = "cancelled"
        raise
    except BaseException as wrong:
        error = " ".join(f"{wrong}".split())
        raise
    finally:
        ended.set()
        thread.join(10 * EVERY)
        _try_put_status(registry, replace(latest[0].updated(progress), state=state, error=error, ended=time.time()))


def _publish_until(
    ended: threading.Event,
    registry: JobRegistry,
    latest: list[JobStatus],
    progress: JobProgress,
    stop: threading.Event,
) -> None:
    while not ended.wait(EVERY):
        latest[0] = latest[0].updated(progress)
        if _try_put_status(registry, latest[0]) and registry.should_stop(latest[0].id):
            stop.set()


def _try_put_status(registry: JobRegistry, status: JobStatus) -> bool:
    try:
        registry.put_status(status)
    except Exception:  # noqa: BLE001  (a scheduler that is gone ends the job by what the job does on the cluster)
        return False
    return True
