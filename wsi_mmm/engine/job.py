"""A run in the background: watch it, wait for it, cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from wsi_mmm.engine.events import Event, Listener

T = TypeVar("T")


@dataclass(slots=True)
class JobProgress:
    """How far a job is: tiles and slides, done and in total (``tiles_total`` grows while slides are planned)."""

    tiles_done: int = 0
    tiles_total: int = 0
    slides_done: int = 0
    slides_total: int = 0
    warnings: list[str] = field(default_factory=list)
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)  # of slides under way

    def hear(self, event: Event) -> None:
        """Take in an event of the run."""
        if event.kind in ("plan", "tile"):
            done, total = self._seen.get(event.slide, (0, 0))
            self._seen[event.slide] = (event.done, event.total)
            self.tiles_done += event.done - done
            self.tiles_total += event.total - total
        elif event.kind == "slide":
            self._seen.pop(event.slide, None)
            self.slides_done, self.slides_total = event.done, event.total
        elif event.kind == "warning":
            self.warnings.append(event.message)

    @property
    def fraction(self) -> float:
        """Share of the tiles planned so far that are done, 0 to 1."""
        return self.tiles_done / self.tiles_total if self.tiles_total else 0.0


class Job(Generic[T]):
    """A run in a thread of this process. ``T`` is the type of its ``result``: a RunReport."""

    def __init__(self, run: Callable[[Listener, threading.Event], T]) -> None:
        self.progress = JobProgress()
        self._stop = threading.Event()
        self._outcome: list[T] = []
        self._error: list[BaseException] = []
        self._thread = threading.Thread(target=self._run_job, args=(run,), name="wsi-mmm-job", daemon=True)
        self._thread.start()

    def _run_job(self, run: Callable[[Listener, threading.Event], T]) -> None:
        try:
            self._outcome.append(run(self.progress.hear, self._stop))
        except BaseException as error:  # noqa: BLE001  (raised by `result`)
            self._error.append(error)

    @property
    def done(self) -> bool:
        """The run has ended, well or not."""
        return not self._thread.is_alive()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the report. Raises TimeoutError after ``timeout`` seconds, Cancelled after ``cancel``."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            share = f"{self.progress.fraction:.0%} of its tiles"
            raise TimeoutError(f"the job is still running after {timeout} s ({share})")
        if self._error:
            raise self._error[0]
        return self._outcome[0]

    def cancel(self) -> None:
        """Stop the run; what is done stays, and running the same again resumes. Returns at once."""
        self._stop.set()
