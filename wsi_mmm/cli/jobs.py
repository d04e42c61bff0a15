"""The commands about jobs that live on a cluster: jobs list, watch, cancel, forget."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_mmm import config
from wsi_mmm.cli.console import EXIT_CODES, Debug, Json, flags, guarded, say, say_json, table
from wsi_mmm.cli.progress import duration

if TYPE_CHECKING:
    from wsi_mmm.api import JobStatus

jobs_app = typer.Typer(
    help="Jobs on a cluster: begun by 'run --detach', or by 'run' elsewhere.\n\n\b\nExamples:\n"
    "  wsi-mmm jobs list --scheduler tcp://host:8786\n  wsi-mmm jobs watch 1a2b3c4d --scheduler tcp://host:8786",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    epilog=EXIT_CODES,
)

Name = Annotated[str, typer.Argument(metavar="JOB", help="The id that 'run --detach' or 'jobs list' shows.")]
SchedulerFlag = Annotated[
    str, typer.Option(help="Dask scheduler that has the job, such as tcp://host:8786.", metavar="ADDRESS")
]
TlsFlag = Annotated[
    str | None, typer.Option(help="Folder of ca.crt, tls.crt, tls.key for a tls:// scheduler.", metavar="FOLDER")
]


def list_(scheduler: SchedulerFlag, tls: TlsFlag = None, json: Json = False, debug: Debug = False) -> None:
    """Show every job that a cluster knows.

    \b
    Examples:
      wsi-mmm jobs list --scheduler tcp://host:8786
      wsi-mmm jobs list --scheduler tcp://host:8786 --json
    """
    from wsi_mmm import api

    found = api.list_jobs(scheduler, tls=_tls_folder(scheduler, tls))
    if flags.json:
        for status, alive in found:
            say_json({"job": status, "silent": not alive})
        return
    rows = [
        (
            status.id,
            status.state if alive else "silent",
            f"{status.slides_done}/{status.slides_total}",
            _tile_counts(status),
            status.output,
        )
        for status, alive in found
    ]
    table(rows, ("job", "state", "slides", "tiles", "output"))
    say(f"{len(found)} jobs at {scheduler}")


def watch(name: Name, scheduler: SchedulerFlag, tls: TlsFlag = None, json: Json = False, debug: Debug = False) -> int:
    """Follow a job to its end, from any machine; leaving this command leaves the job alone.

    \b
    Examples:
      wsi-mmm jobs watch 1a2b3c4d --scheduler tcp://host:8786
    """
    status = None
    for status in _attach_job(name, scheduler, tls).watch():
        if flags.json:
            say_json(status)
        else:
            slides = f"{status.slides_done}/{status.slides_total} slides"
            say(f"{status.state}  {slides}, {_tile_counts(status)} tiles{_time_running(status)}")
    if status is not None and status.error:
        say(status.error)
    return 0 if status is not None and status.state == "done" else 1


def cancel(name: Name, scheduler: SchedulerFlag, tls: TlsFlag = None, json: Json = False, debug: Debug = False) -> None:
    """Stop a job; what is done stays, and the same run resumes.

    \b
    Examples:
      wsi-mmm jobs cancel 1a2b3c4d --scheduler tcp://host:8786
    """
    _attach_job(name, scheduler, tls).cancel()
    if flags.json:
        say_json({"job": name, "asked": "cancel"})
    say(f"job {name} is asked to stop")


def forget(name: Name, scheduler: SchedulerFlag, tls: TlsFlag = None, json: Json = False, debug: Debug = False) -> None:
    """Remove a job from the cluster's list; one that runs is stopped. Results stay where they are.

    \b
    Examples:
      wsi-mmm jobs forget 1a2b3c4d --scheduler tcp://host:8786
    """
    _attach_job(name, scheduler, tls).forget()
    if flags.json:
        say_json({"job": name, "asked": "forget"})
    say(f"job {name} is forgotten")


def _attach_job(name: str, scheduler: str, tls: str | None) -> Any:
    from wsi_mmm import api

    return api.attach(scheduler, name, tls=_tls_folder(scheduler, tls))


def _tls_folder(scheduler: str, given: str | None) -> str | None:
    return given or (config.default_tls() if scheduler.startswith("tls://") else None)


def _tile_counts(status: JobStatus) -> str:
    return f"{status.tiles_done:,}/{status.tiles_total:,}"


def _time_running(status: JobStatus) -> str:
    """Return the time a job has run, by the clock of the process that runs it."""
    return f", {duration(max(0.0, (status.ended or time.time()) - status.started))}" if status.started else ""


for _command_name, _command in (("list", list_), ("watch", watch), ("cancel", cancel), ("forget", forget)):
    jobs_app.command(_command_name, epilog=EXIT_CODES)(guarded(_command))
