"""Carrying out an order: from checked slides and a recipe to a report, on any executor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from wsi_mmm import timing
from wsi_mmm.engine.events import Listener, WatchedExecutor, greet, silent
from wsi_mmm.engine.executors.job_registry import JobRegistry, JobStatus, LiveJobs, new_id, publishing_status
from wsi_mmm.engine.executors.tls import Tls
from wsi_mmm.engine.job import Progress, closed_after
from wsi_mmm.engine.monitoring import run_report
from wsi_mmm.engine.monitoring.observe import NOTHING, Hooks, Observe, all_of, observing
from wsi_mmm.engine.monitoring.run_report import RunReport
from wsi_mmm.engine.output_lock import TAKEN, claimed
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.scheduler import open_street
from wsi_mmm.engine.sizes import largest_first
from wsi_mmm.engine.units import Executor, SlideTask
from wsi_mmm.errors import OutputTaken


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A run that has been checked: what to do, with what, where to."""

    tasks: tuple[SlideTask, ...]
    recipe: Recipe
    output: str
    tls: Tls | None = None


def run_slides(
    order: RunRequest,
    executor: Executor | Callable[[], Executor],
    listener: Listener,
    stop: threading.Event | None = None,
    *,
    observe: Observe = NOTHING,
) -> RunReport:
    """Do it, and close the executor. Raises OutputTaken, ClusterError; Cancelled soon after ``stop`` is set."""
    stop = stop or threading.Event()
    with claimed(order.output, [task.id for task in order.tasks]) as taken, observing(observe) as seen:
        if len(taken) == len(order.tasks):
            raise OutputTaken(f"{order.output}: {TAKEN}")
        tasks = [replace(task, error=task.error or TAKEN) if task.id in taken else task for task in order.tasks]
        made = executor() if callable(executor) else executor
        # Closed last: how the run ended is told on the board by way of the executor's client.
        with closed_after(made), _on_board(order, made, stop) as noted:
            heard = all_of([Hooks(listener), Hooks(noted), seen]).listener
            greet(made, heard)
            scheduler = open_street(largest_first(tasks, made), heard, order.recipe.options.placement)
            report = run_report.begin(order.output, order.recipe, tasks)
            try:
                watched = WatchedExecutor(made, report.ledger.watch, seen.watch)
                for state in scheduler.run(watched, stop):
                    report.add(state)
            finally:
                report.save()
    return report


@contextmanager
def _on_board(order: RunRequest, executor: Executor, stop: threading.Event) -> Iterator[Listener]:
    """A run on a cluster whose books are kept here stands on its board, too: others see it, share with it, stop it."""
    client: Any = getattr(executor, "client", None)
    if client is None or getattr(executor, "posted", True):
        yield silent
        return
    board, progress = JobRegistry(client), Progress()
    note = JobStatus(new_id(), order.output, slides_total=len(order.tasks), where=timing.worker())
    executor.jobs = LiveJobs(board, note.id)  # type: ignore[attr-defined]
    with publishing_status(board, note, progress, stop):
        yield progress.hear
