"""Run all slides of a request on an executor and return the report."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from wsi_mmm.engine.events import Event, Listener, silent
from wsi_mmm.engine.executors.tls import Tls
from wsi_mmm.engine.monitoring.observe import NOTHING, Hooks, Observe, combine_hooks
from wsi_mmm.engine.monitoring.run_report import RunReport, outcome_text
from wsi_mmm.engine.output_lock import TAKEN, claimed
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.scheduler import Scheduler
from wsi_mmm.engine.units import Executor, SlideTask, UnitResult, WorkUnit
from wsi_mmm.errors import ModelNotLoaded, OutputTaken, WsiError
from wsi_mmm.storage import store

LISTED = 3  # slides of one folder of a bucket from which on the folder is listed


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A run that has been checked: which slides, by which recipe, to which output."""

    tasks: tuple[SlideTask, ...]
    recipe: Recipe
    output: str
    tls: Tls | None = None


def run_slides(
    request: RunRequest,
    executor: Executor | Callable[[], Executor],
    listener: Listener,
    stop: threading.Event | None = None,
    *,
    observe: Observe = NOTHING,
) -> RunReport:
    """Run every slide of a request, close the executor, and return the report.

    The output is claimed, the executor is made, and then the scheduler starts units on it as slides, memory and workers
    allow. A slide that fails does not stop the others. What is done stays done: the same request resumes.

    Raises OutputTaken, ClusterError; Cancelled soon after ``stop`` is set.
    """
    stop = stop or threading.Event()
    with claimed(request.output, [task.id for task in request.tasks]) as taken, observing(observe) as observers:
        if len(taken) == len(request.tasks):
            raise OutputTaken(f"{request.output}: {TAKEN}")
        tasks = [replace(task, error=task.error or TAKEN) if task.id in taken else task for task in request.tasks]
        running = executor() if callable(executor) else executor
        able = running.capabilities
        announcing = able.announce(request.output, len(tasks), stop) if able.announce else nullcontext(silent)
        # The announcement ends before the executor is closed: it needs the executor's connection.
        with _close_after(running), announcing as announced:
            hooks = combine_hooks([Hooks(listener), Hooks(announced), observers])
            report = RunReport(request.output, request.recipe, tuple(task.id for task in tasks))
            report.warnings = [*request.recipe.warnings()]
            for warning in (*able.warnings, *report.warnings):
                hooks.listener(Event("warning", "", message=warning))
            for remark in (*request.recipe.remarks(), *([f"dashboard: {able.dashboard}"] if able.dashboard else ())):
                hooks.listener(Event("stage", "", message=remark))

            def watch(thing: WorkUnit | UnitResult) -> None:
                report.accounting.watch(thing)
                hooks.watch(thing)

            upcoming = largest_first(tasks) if able.many_workers else tasks
            scheduler = Scheduler(upcoming, hooks.listener, request.recipe.options.placement)
            saved = True
            try:
                for state in scheduler.run(running, stop, watch):
                    row = report.add(state)
                    text = outcome_text(state, row.cache_hits)
                    done, total = scheduler.ended, scheduler.total
                    hooks.listener(Event("slide", state.task.id, done, total, text, state.status))
            except ModelNotLoaded:  # nothing was done, and an earlier report stands
                saved = bool(report.rows)
                raise
            finally:
                report.warnings += scheduler.warnings
                if saved:
                    report.save()
    return report


@contextmanager
def observing(what: Observe = NOTHING) -> Iterator[Hooks]:
    """The hooks that show a run as asked for, and end with it. Raises OutputError, OptionError, MissingPackage."""
    with ExitStack() as stack:
        hooks = []
        if what.log_file is not None or what.log_level is not None:
            from wsi_mmm.engine.monitoring.logs import logging_to

            hooks.append(stack.enter_context(logging_to(what.log_file, what.log_level or "info")))
        if what.metrics_port is not None:
            from wsi_mmm.engine.monitoring.metrics import serving

            hooks.append(stack.enter_context(serving(what.metrics_port)))
        if what.traces is not None:
            from wsi_mmm.engine.monitoring.traces import exporter_named, tracing

            hooks.append(stack.enter_context(tracing(exporter_named(what.traces))))
        yield combine_hooks(hooks)


@contextmanager
def _close_after(executor: Executor) -> Iterator[None]:
    """Close the executor at the end; units that have not begun are dropped when an exception ends the context."""
    finished = False
    try:
        yield
        finished = True
    finally:
        executor.close(cancel=not finished)


def largest_first(tasks: list[SlideTask]) -> list[SlideTask]:
    """The tasks, largest files first: a large slide that comes last would leave the other workers idle.

    The number of tiles shows only in the plan, which is not made yet; the size of the file is known and goes with it.
    """
    if len(tasks) < 2:
        return tasks
    sizes = file_sizes(task.uri for task in tasks)
    return sorted(tasks, key=lambda task: -sizes.get(task.uri, 0))


def file_sizes(uris: Iterable[str]) -> dict[str, int]:
    """Bytes of each slide where that is known without opening it; folders (DICOM, MIRAX) are left out."""
    sizes: dict[str, int] = {}
    folders: dict[str, list[str]] = {}
    for uri in uris:
        if store.is_local(uri):
            with suppress(OSError):
                sizes[uri] = os.stat(store.local_path(uri)).st_size
        else:
            folders.setdefault(uri.rpartition("/")[0], []).append(uri)
    for folder, wanted in folders.items():
        if len(wanted) >= LISTED and urlsplit(folder).scheme == "s3":
            with suppress(WsiError):  # opening the slides will show what is wrong
                sizes |= store.list_sizes(folder)
    return sizes
