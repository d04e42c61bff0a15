"""A run in the background: watch it, wait for it, cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
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
        self._future: Future[T] = Future()
        threading.Thread(target=self._run_job, args=(run,), name="wsi-mmm-job", daemon=True).start()

    def _run_job(self, run: Callable[[Listener, threading.Event], T]) -> None:
        try:
            self._future.set_result(run(self.progress.hear, self._stop))
        except BaseException as error:  # noqa: BLE001  (raised by `result`)
            self._future.set_exception(error)

    @property
    def done(self) -> bool:
        """The run has ended, well or not."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the report. Raises TimeoutError after ``timeout`` seconds, Cancelled after ``cancel``."""
        if not wait([self._future], timeout).done:
            share = f"{self.progress.fraction:.0%} of its tiles"
            raise TimeoutError(f"the job is still running after {timeout} s ({share})")
        return self._future.result()

    def cancel(self) -> None:
        """Stop the run; what is done stays, and running the same again resumes. Returns at once."""
        self._stop.set()
