"""The commands about the EMPAIA platform: empaia init, empaia run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_mmm.cli.console import NOTHING_RAN, OK, STOPPED, command, error_line, make_app, say, say_json

empaia_app = make_app(
    "Make a model an app of the EMPAIA platform, and run it.\n\n\b\n"
    "Examples:\n  wsi-mmm empaia init default -o app/\n  wsi-mmm empaia run"
)


@command(empaia_app, "init")
def init(
    model: Annotated[str, typer.Argument(help="Packaged model, or the folder of one.")] = "default",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of ead.json.", metavar="FOLDER")] = Path(),
    vendor: Annotated[str, typer.Option(help="Who offers the app: part of its namespace.")] = "wsi_mmm",
    regions: Annotated[
        Literal["rectangle", "polygon", "circle"], typer.Option(help="The shape of regions of interest.")
    ] = "rectangle",
) -> None:
    """Write the description (EAD) that registers a model with the platform.

    \b
    Examples:
      wsi-mmm empaia init default -o app/
      wsi-mmm empaia init my-model/ -o app/ --vendor my_hospital --regions polygon
    """
    from wsi_mmm.empaia.ead import ead, ead_json, write_ead
    from wsi_mmm.model.card import read_card

    made = ead(read_card(model), vendor=vendor, regions=regions)
    path = write_ead(ead_json(made), output)
    say_json({"path": path, "namespace": made["namespace"], "outputs": len(made["io"]) - 2})
    say(f"wrote {path}: {made['namespace']}")


@command(empaia_app, "run")
def run(
    model: Annotated[str, typer.Option("--model", "-m", help="Packaged model, or the folder of one.")] = "default",
    vendor: Annotated[str, typer.Option(help="Who offers the app, as for 'empaia init'.")] = "wsi_mmm",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    pictures: Annotated[
        Literal["png", "jpeg"], typer.Option(help="png: results are those of the slide's file; jpeg: fewer bytes.")
    ] = "png",
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Dask scheduler whose workers have the job's EMPAIA variables. (environment: "
            "WSI_MMM_EMPAIA_SCHEDULER)",
            metavar="ADDRESS",
        ),
    ] = None,
    scratch: Annotated[
        str | None,
        typer.Option(
            "--work",
            help="Folder or s3:// prefix to write to on the way; a job started again goes on from there. "
            "(environment: WSI_MMM_EMPAIA_WORK; default: a temporary folder)",
            metavar="FOLDER",
        ),
    ] = None,
) -> int:
    """Do the job that EMPAIA_APP_API, EMPAIA_JOB_ID and EMPAIA_TOKEN name, and end it. What a container runs.

    \b
    Examples:
      wsi-mmm empaia run
      wsi-mmm empaia run --model my-model/ --vendor my_hospital

    Exits with 0 when the job was finalized, 1 when it failed, 130 when it was stopped; the platform is told.
    """
    from wsi_mmm import config

    job, places = config.empaia_job(), config.empaia_places()
    scheduler, scratch = scheduler or places.get("scheduler"), scratch or places.get("work")
    options = (model, vendor, scheduler, config.default_tls(scheduler), scratch, device, pictures)
    try:
        from wsi_mmm.empaia.app import App, run_app

        ended = run_app(job, App(*options))
    except KeyboardInterrupt:  # a signal before the app can handle it
        from wsi_mmm.empaia.app import stop_app

        ended = stop_app(job)
    say_json({"job": job.id, "ended": ended.how, "message": ended.message})
    if ended.how == "finalized":
        say(f"job {job.id}: finalized")
        return OK
    error_line(" | ".join(text for text in (ended.message, ended.error) if text))
    return STOPPED if ended.how == "stopped" else NOTHING_RAN
