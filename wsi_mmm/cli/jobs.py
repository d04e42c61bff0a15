"""The commands about jobs that live on a cluster: jobs list, watch, cancel, forget."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_mmm import config
from wsi_mmm.cli.console import STOPPED, command, make_app, say, say_json, table
from wsi_mmm.cli.progress import duration

if TYPE_CHECKING:
    from wsi_mmm.api import JobStatus

jobs_app = make_app(
    "Jobs on a cluster: begun by 'run --detach', or by 'run' elsewhere.\n\n\b\nExamples:\n"
    "  wsi-mmm jobs list --scheduler tcp://host:8786\n  wsi-mmm jobs watch 1a2b3c4d --scheduler tcp://host:8786"
)

Name = Annotated[str, typer.Argument(metavar="JOB", help="The id that 'run --detach' or 'jobs list' shows.")]
SchedulerFlag = Annotated[
    str, typer.Option(help="Dask scheduler that has the job, such as tcp://host:8786.", metavar="ADDRESS")
]
TlsFlag = Annotated[
    str | None, typer.Option(help="Folder of ca.crt, tls.crt, tls.key for a tls:// scheduler.", metavar="FOLDER")
]


@command(jobs_app, "list")
def list_(scheduler: SchedulerFlag, tls: TlsFlag = None) -> None:
    """Show every job that a cluster knows.

    \b
    Examples:
      wsi-mmm jobs list --scheduler tcp://host:8786
      wsi-mmm jobs list --scheduler tcp://host:8786 --json
    """
    from wsi_mmm import api

    found = api.list_jobs(scheduler, tls=tls or config.default_tls(scheduler))
    rows = []
    for status, alive in found:
        say_json({"job": status, "silent": not alive})
        state, slides = status.state if alive else "silent", f"{status.slides_done}/{status.slides_total}"
        rows.append((status.id, state, slides, _tile_counts(status), status.output))
    table(rows, ("job", "state", "slides", "tiles", "output"))
    say(f"{len(found)} jobs at {scheduler}")


@command(jobs_app, "watch")
def watch(name: Name, scheduler: SchedulerFlag, tls: TlsFlag = None) -> int:
    """Follow a job to its end, from any machine; leaving this command leaves the job alone.

    \b
    Examples:
      wsi-mmm jobs watch 1a2b3c4d --scheduler tcp://host:8786
    """
    status, warned = None, 0
    try:
        for status in _attach_job(name, scheduler, tls).watch():
            say_json(status)
            slides = f"{status.slides_done}/{status.slides_total} slides"
            # By the clock of the process that runs it.
            seconds = max(0.0, (status.ended or time.time()) - status.started)
            running = f", {duration(seconds)}" if status.started else ""
            for warning in status.warnings[warned:]:
                say(f"warning: {warning}")
            warned = len(status.warnings)
            say(f"{status.state}  {slides}, {_tile_counts(status)} tiles{running}")
    except KeyboardInterrupt:
        where = f"{name} --scheduler {scheduler}"
        say(f"job {name} goes on; 'wsi-mmm jobs watch {where}' follows it, 'wsi-mmm jobs cancel {where}' stops it")
        return STOPPED
    if status is not None and status.error:
        say(status.error)
    return 0 if status is not None and status.state == "done" else 1


@command(jobs_app, "cancel")
def cancel(name: Name, scheduler: SchedulerFlag, tls: TlsFlag = None) -> None:
    """Stop a job; what is done stays, and the same run resumes.

    \b
    Examples:
      wsi-mmm jobs cancel 1a2b3c4d --scheduler tcp://host:8786
    """
    _attach_job(name, scheduler, tls).cancel()
    say_json({"job": name, "asked": "cancel"})
    say(f"job {name} is asked to stop")


@command(jobs_app, "forget")
def forget(name: Name, scheduler: SchedulerFlag, tls: TlsFlag = None) -> None:
    """Remove a job from the cluster's list; one that runs is stopped. Results stay where they are.

    \b
    Examples:
      wsi-mmm jobs forget 1a2b3c4d --scheduler tcp://host:8786
    """
    _attach_job(name, scheduler, tls).forget()
    say_json({"job": name, "asked": "forget"})
    say(f"job {name} is forgotten")


def _attach_job(name: str, scheduler: str, tls: str | None) -> Any:
    from wsi_mmm import api

    return api.attach(scheduler, name, tls=tls or config.default_tls(scheduler))


def _tile_counts(status: JobStatus) -> str:
    return f"{status.tiles_done:,}/{status.tiles_total:,}"
