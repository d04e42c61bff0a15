"""The board of a cluster: a note per job, kept by its scheduler, which every process that reaches it can read.

A note is a few hundred bytes, written anew every second while its job runs (``beat`` counts that: whoever sees it stand
still knows that nobody runs the job any more). No Dask here: a client that keeps metadata is all there is to know.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

from wsi_mmm.engine.job import Progress
from wsi_mmm.errors import Cancelled, ClusterError

State = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
JOBS = "wsi-mmm-jobs"
EVERY = 1.0  # seconds between notes, and between looks at whether the job is to stop
SILENT = 30.0  # seconds without a new note after which a job counts no more
KEPT = 50  # jobs that have ended and are remembered
SPOKEN = 20  # warnings that a note carries


class MetadataClient(Protocol):
    """What keeps the board: a Dask client, by which the scheduler does."""

    def get_metadata(self, keys: list[str], default: Any = None) -> Any:
        """What is kept under nested keys."""

    def set_metadata(self, key: list[str], value: Any) -> None:
        """Keep a value of plain types under nested keys."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How a job stands. ``started``, ``ended``: epoch seconds where it runs, 0 when not yet; ``error``: one line.

    ``tries``: how often it was begun: again when the worker that ran it died. ``where``: host:pid of who runs it.
    """

    id: str
    output: str
    state: State = "waiting"
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
        """Nothing will change any more."""
        return self.state in ENDED

    def progress(self) -> Progress:
        """As a job in this process would show it."""
        return Progress(self.tiles_done, self.tiles_total, self.slides_done, self.slides_total, list(self.warnings))

    def of(self, progress: Progress) -> JobStatus:
        """The note with the numbers of now."""
        return replace(
            self, tiles_done=progress.tiles_done, tiles_total=progress.tiles_total, slides_done=progress.slides_done,
            warnings=tuple(progress.warnings[:SPOKEN]), beat=self.beat + 1,
        )  # fmt: skip


def new_id() -> str:
    """The name of a job: eight letters and digits."""
    return uuid.uuid4().hex[:8]


@dataclass(frozen=True, slots=True)
class JobRegistry:
    """The notes of all jobs of a cluster."""

    keeper: MetadataClient

    def post(self, note: JobStatus) -> None:
        """Put a note in the place of an earlier one of that job."""
        self.keeper.set_metadata([JOBS, note.id, "note"], {**asdict(note), "warnings": list(note.warnings)})

    def note(self, name: str) -> JobStatus:
        """The note of a job. ClusterError when there is none."""
        found = self.keeper.get_metadata([JOBS], default={}).get(name)
        if not found or "note" not in found:
            raise ClusterError(f"there is no job {name!r} on this cluster; its scheduler knows those of 'jobs list'")
        return _note(found["note"])

    def notes(self) -> list[JobStatus]:
        """Those of all jobs, the oldest first."""
        kept = self.keeper.get_metadata([JOBS], default={}).values()
        return sorted(
            (_note(one["note"]) for one in kept if one and "note" in one), key=lambda note: note.started or 1e12
        )

    def ask_to_stop(self, name: str) -> None:
        """Whoever runs the job hears of it within EVERY seconds."""
        self.note(name)
        self.keeper.set_metadata([JOBS, name, "stop"], True)

    def asked_to_stop(self, name: str) -> bool:
        """Whether somebody wants the job to stop."""
        found = self.keeper.get_metadata([JOBS], default={}).get(name) or {}
        return bool(found.get("stop"))

    def forget(self, name: str) -> None:
        """Take the note away."""
        self.keeper.set_metadata([JOBS, name], None)

    def surplus(self) -> list[JobStatus]:
        """Jobs that ended longest ago, beyond those that are remembered."""
        over = sorted((note for note in self.notes() if note.over), key=lambda note: note.ended)
        return over[: max(0, len(over) - KEPT)]


def _note(raw: dict[str, Any]) -> JobStatus:
    known = {field.name for field in fields(JobStatus)}
    return JobStatus(**{**{k: v for k, v in raw.items() if k in known}, "warnings": tuple(raw.get("warnings", ()))})


class LiveJobs:
    """Which jobs are alive, as seen from here: those whose beat went on in the last SILENT seconds."""

    def __init__(self, board: JobRegistry, own: str = "") -> None:
        self._board, self._own = board, own
        self._seen: dict[str, tuple[int, float]] = {}

    def running(self) -> set[str]:
        """Ids of the jobs that want work now, one's own included."""
        now, found = time.monotonic(), {self._own} - {""}
        for note in self._board.notes():
            if note.state == "running":
                beat, since = self._seen.get(note.id, (-1, now))
                since = now if beat != note.beat else since
                self._seen[note.id] = note.beat, since
                if now - since < SILENT:
                    found.add(note.id)
        return found

    def __call__(self) -> int:
        """How many there are, at least one."""
        return max(1, len(self.running()))


@contextmanager
def publishing_status(board: JobRegistry, note: JobStatus, progress: Progress, stop: threading.Event) -> Iterator[None]:
    """While the context lasts the job's note is kept up to date, and ``stop`` is set when somebody asks for it.

    In the end the note says how it ended, by the exception that left the context.
    """
    note = replace(note, state="running", started=note.started or time.time(), tries=note.tries + 1)
    ended, board_note = threading.Event(), [note]
    board.post(note)
    thread = threading.Thread(
        target=_keep_posting, args=(board, board_note, progress, stop, ended), name="wsi-mmm-board", daemon=True
    )
    thread.start()
    state: State = "failed"
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
        last = replace(board_note[0].of(progress), state=state, error=error, ended=time.time())
        _try_to_post(board, last)


def _keep_posting(
    board: JobRegistry, note: list[JobStatus], progress: Progress, stop: threading.Event, ended: threading.Event
) -> None:
    while not ended.wait(EVERY):
        note[0] = note[0].of(progress)
        if not _try_to_post(board, note[0]):
            continue
        if board.asked_to_stop(note[0].id):
            stop.set()


def _try_to_post(board: JobRegistry, note: JobStatus) -> bool:
    """A board that is gone is told by what the job itself does on the cluster."""
    try:
        board.post(note)
    except Exception:  # noqa: BLE001
        return False
    return True
