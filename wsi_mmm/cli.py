"""``wsi-mmm``: every command is a few lines that forward to the api, which is imported when a command runs."""

from __future__ import annotations

import signal
from typing import Annotated, NoReturn

import typer

from wsi_mmm import (
    __version__,
    cli_cache,
    cli_doctor,
    cli_empaia,
    cli_fewshot,
    cli_jobs,
    cli_models,
    cli_run,
    cli_slide,
    cli_train,
)
from wsi_mmm.cli_console import EXIT_CODES, guarded

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)

_WORK, _LEARN, _LOOK, _REST = "Work through slides", "Learn", "Look at one slide", "Models and machine"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"wsi-mmm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Whole-slide images in, QuPath-ready GeoJSON out.

    \b
    Begin with:
      wsi-mmm demo                          a synthetic slide, start to end
      wsi-mmm run slide.svs -o results      your own slide
      wsi-mmm run --help                    every option, with examples
    """


for _name, _panel, _command in (
    ("run", _WORK, cli_run.run),
    ("embed", _WORK, cli_run.embed),
    ("export", _WORK, cli_models.export),
    ("demo", _WORK, cli_run.demo),
    ("train", _LEARN, cli_train.train),
    ("info", _LOOK, cli_slide.info),
    ("thumbnail", _LOOK, cli_slide.thumbnail),
    ("tissue", _LOOK, cli_slide.tissue),
    ("doctor", _REST, cli_doctor.doctor),
):
    app.command(_name, rich_help_panel=_panel, epilog=EXIT_CODES)(guarded(_command))
app.add_typer(cli_fewshot.fewshot_app, name="fewshot", rich_help_panel=_LEARN)
app.add_typer(cli_jobs.jobs_app, name="jobs", rich_help_panel=_WORK)
app.add_typer(cli_cache.cache_app, name="cache", rich_help_panel=_REST)
app.add_typer(cli_empaia.empaia_app, name="empaia", rich_help_panel=_REST)
app.add_typer(cli_models.models_app, name="models", rich_help_panel=_REST)


def main() -> None:
    """Entry point of the ``wsi-mmm`` command."""
    signal.signal(signal.SIGTERM, _stop)
    app()


def _stop(*_: object) -> NoReturn:
    """SIGTERM, which batch systems send before they kill, stops as Ctrl-C does."""
    raise KeyboardInterrupt
