"""Output of commands: tables on a terminal, plain lines elsewhere, JSON lines for machines, one-line errors."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from wsi_mmm.errors import Cancelled, WsiError

P = ParamSpec("P")

OK, NOTHING_RAN, STOPPED = 0, 1, 130
"""Exit codes beside those of a run that ended, which `RunReport.exit_code` gives, and typer's 2 for wrong usage."""

EXIT_CODES = (
    "Exit codes: 0 every slide succeeded | 1 wrong input, nothing ran | 2 wrong usage | 3 some slides failed or are "
    "partial | 4 every slide failed | 130 stopped, the same command resumes."
)


@dataclass
class _Flags:
    """The state that ``--debug`` and ``--json`` set."""

    debug: bool = False
    json: bool = False


flags = _Flags()


def _set_debug(value: bool) -> bool:
    flags.debug = value
    return value


def _set_json(value: bool) -> bool:
    flags.json = value
    return value


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug, rich_help_panel="Talk")
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object per line.", callback=_set_json, rich_help_panel="Talk")
]


# ------------------------------------------------------------------------------------------------ errors


def guarded(command: Callable[P, int | None]) -> Callable[P, None]:
    """``command`` with its errors as one line on stderr and its result as exit code (None: 0)."""

    @functools.wraps(command)
    def guarded_command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs) or OK
        except (KeyboardInterrupt, Cancelled) as error:
            fail(error, "stopped; run the same command again to resume", STOPPED)
        except WsiError as error:
            fail(error, str(error), NOTHING_RAN)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of the pipe has ended
            code = NOTHING_RAN
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # noqa: BLE001  (an unexpected error is shown as one line, too)
            text = f"unexpected {type(error).__name__}: {error}; please report it with the output of --debug"
            fail(error, text, NOTHING_RAN)
        raise typer.Exit(code)

    return guarded_command


def fail(error: BaseException, message: str, code: int) -> NoReturn:
    """Print ``error: message`` (after the traceback with ``--debug``) and exit with ``code``."""
    if flags.debug:
        import traceback

        traceback.print_exception(error)
    error_line(message)
    raise typer.Exit(code) from error


def error_line(message: str) -> None:
    """One line on stderr, whatever line breaks a foreign text brought along."""
    label = typer.style("error:", fg="red", bold=True) if sys.stderr.isatty() else "error:"
    typer.echo(f"{label} {' '.join(message.split())}", err=True)


# ------------------------------------------------------------------------------------------------ output


def say(text: str = "") -> None:
    """A line on stdout; nothing with ``--json``."""
    if not flags.json:
        typer.echo(text)


def say_json(value: object) -> None:
    """``value`` as one line of JSON on stdout, at once; NaN and infinity become null."""
    typer.echo(json.dumps(plain(value), separators=(",", ":"), allow_nan=False))
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Return ``value`` as plain JSON: dataclasses are objects, tuples arrays, numpy scalars numbers, paths text."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def table(rows: Sequence[Sequence[object]], header: Sequence[str], title: str | None = None) -> None:
    """A table on a terminal; tab-separated lines elsewhere."""
    if flags.json:
        return
    if not sys.stdout.isatty():
        for row in [header, *rows]:
            typer.echo("\t".join(str(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*header, title=title, title_justify="left", header_style="bold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    Console().print(drawn)


def facts(pairs: Mapping[str, object], title: str) -> None:
    """Name and value, one per line, names aligned."""
    width = max(map(len, pairs), default=0)
    say(title)
    for name, value in pairs.items():
        say(f"  {name:<{width}}  {value}")
