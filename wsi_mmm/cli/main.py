"""``wsi-mmm``: every command is a few lines that forward to the api, which is imported when a command runs."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from wsi_mmm._version import __version__
from wsi_mmm.cli import cache, doctor, empaia, fewshot, jobs, models, run, slide, train
from wsi_mmm.cli.console import command, make_app
from wsi_mmm.host_tuning import tune_process

app = make_app(
    """Whole-slide images in, QuPath-ready GeoJSON out.

    \b
    Begin with:
      wsi-mmm demo                          a synthetic slide, start to end
      wsi-mmm run slide.svs -o results      your own slide
      wsi-mmm run --help                    every option, with examples
    """
)

_STOPPING = ("SIGTERM", "SIGHUP", "SIGUSR1")
_PROCESS, _LEARN, _LOOK, _REST = "Work through slides", "Learn", "Look at one slide", "Models and machine"


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"wsi-mmm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Show the version or the help."""


for _name, _panel, _command in (
    ("run", _PROCESS, run.run),
    ("embed", _PROCESS, run.embed),
    ("export", _PROCESS, models.export),
    ("demo", _PROCESS, run.demo),
    ("train", _LEARN, train.train),
    ("info", _LOOK, slide.info),
    ("thumbnail", _LOOK, slide.thumbnail),
    ("tissue", _LOOK, slide.tissue),
    ("doctor", _REST, doctor.doctor),
):
    command(app, _name, _panel)(_command)
app.add_typer(fewshot.fewshot_app, name="fewshot", rich_help_panel=_LEARN)
app.add_typer(jobs.jobs_app, name="jobs", rich_help_panel=_PROCESS)
app.add_typer(cache.cache_app, name="cache", rich_help_panel=_REST)
app.add_typer(empaia.empaia_app, name="empaia", rich_help_panel=_REST)
app.add_typer(models.models_app, name="models", rich_help_panel=_REST)


def main() -> None:
    """Entry point of the ``wsi-mmm`` command; tunes the process, which a library call never does."""
    tune_process()
    _keep_streams()
    warnings.showwarning = show_warning
    for name in _STOPPING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _raise_interrupt)
    app()


def _keep_streams() -> None:
    """Make any text printable on standard output and error; a stream that was closed swallows what is printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # opened first, so that no slide or result gets its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (to the end of the process)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """Print a warning for users as a line; warnings for programmers keep the place in the code that caused them."""
    if category is UserWarning:
        sys.stderr.write(f"warning: {message}\n")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _raise_interrupt(*_: object) -> NoReturn:
    """Stop as after Ctrl-C: SIGTERM and SIGUSR1 are what batch systems send before they kill, SIGHUP a closed shell.

    Once: they may send several, to every process of a job, and the second must not break what the first began.
    """
    for name in _STOPPING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise KeyboardInterrupt
