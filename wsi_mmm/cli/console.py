"""Output of commands: tables on a terminal, plain lines elsewhere, JSON lines for machines, one-line errors."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Annotated, Any, NoReturn

import typer

from wsi_mmm.errors import Cancelled, WsiError, printable

OK, NOTHING_RAN, STOPPED = 0, 1, 130
"""Exit codes beside those of a run that ended, which `RunReport.exit_code` gives, and typer's 2 for wrong usage."""

EXIT_CODES = (
    "Exit codes: 0 every slide succeeded | 1 wrong input, nothing ran | 2 wrong usage | 3 some slides failed or are "
    "partial | 4 every slide failed | 130 stopped, the same command resumes."
)

CommandFunction = Callable[..., int | None]


@dataclass
class _Flags:
    """The state that ``--debug`` and ``--json`` set."""

    debug: bool = False
    json: bool = False


flags = _Flags()

_JSON = typer.Option("--json", help="One JSON object per line.", rich_help_panel="Talk")
_DEBUG = typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Talk")


# ------------------------------------------------------------------------------------------------ commands


def make_app(words: str, *, no_args_is_help: bool = True) -> typer.Typer:
    """A group of commands; ``words`` is its help."""
    return typer.Typer(
        help=words, no_args_is_help=no_args_is_help, add_completion=False, pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES,
    )  # fmt: skip


def command(app: typer.Typer, name: str, panel: str | None = None) -> Callable[[CommandFunction], CommandFunction]:
    """Make a function the command ``name`` of ``app``, as `as_command` does."""

    def decorate(function: CommandFunction) -> CommandFunction:
        app.command(name, rich_help_panel=panel, epilog=EXIT_CODES)(as_command(function))
        return function

    return decorate


def as_command(function: CommandFunction) -> Callable[..., None]:
    """``function`` with the flags --json and --debug, its errors as one line on stderr, its result as exit code."""

    @functools.wraps(function)
    def command_function(*, json: bool, debug: bool, **values: Any) -> None:
        flags.json, flags.debug = json, debug
        try:
            code = function(**values) or OK
            sys.stdout.flush()
        except (KeyboardInterrupt, Cancelled) as error:
            fail(error, "stopped; run the same command again to resume", STOPPED)
        except WsiError as error:
            fail(error, str(error), NOTHING_RAN)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of the pipe has ended
            code = NOTHING_RAN
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename is not None:
                fail_unexpected(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the rest fails again as Python ends
            fail(error, "standard output is on a full device; free space there, files are where they should be", 1)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # noqa: BLE001  (an unexpected error is shown as one line, too)
            fail_unexpected(error)
        finally:
            flags.json = flags.debug = False
        if code:
            raise typer.Exit(code)

    own = signature(function, eval_str=True)
    switches = [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=Annotated[bool, flag], default=False)
        for name, flag in (("json", _JSON), ("debug", _DEBUG))
    ]
    whole = own.replace(parameters=[*own.parameters.values(), *switches], return_annotation=None)
    command_function.__signature__ = whole  # type: ignore[attr-defined]
    command_function.__annotations__ = {one.name: one.annotation for one in whole.parameters.values()}
    return command_function


def fail_unexpected(error: Exception) -> NoReturn:
    """Print what nobody foresaw as one line."""
    fail(error, f"unexpected {type(error).__name__}: {error}; please report it with the output of --debug", NOTHING_RAN)


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
    typer.echo(f"{label} {' '.join(printable(message).split())}", err=True)


# ------------------------------------------------------------------------------------------------ output


def say(text: str = "") -> None:
    """A line on stdout; nothing with ``--json``."""
    if not flags.json:
        typer.echo(printable(text))


def say_json(value: object) -> None:
    """With ``--json``: ``value`` as one line of JSON on stdout, as `print_json` does; else nothing."""
    if flags.json:
        print_json(value)


def print_json(value: object) -> None:
    """``value`` as one line of JSON on stdout, at once; NaN and infinity become null."""
    typer.echo(json.dumps(plain(value), separators=(",", ":"), allow_nan=False))
    sys.stdout.flush()


def plain(value: object) -> object:
    """Return ``value`` as plain JSON: dataclasses are objects, tuples arrays, numpy scalars numbers, paths text."""
    from pydantic_core import to_jsonable_python  # not needed for --help

    def fallback(other: Any) -> object:
        return other.item() if hasattr(other, "item") else str(other)

    return _printable_json(to_jsonable_python(value, inf_nan_mode="null", fallback=fallback))


def _printable_json(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _printable_json(inner) for key, inner in value.items()}
    return [_printable_json(inner) for inner in value] if isinstance(value, list) else value


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> None:
    """A table on a terminal; tab-separated lines elsewhere."""
    if flags.json:
        return
    if not sys.stdout.isatty():
        for row in [header, *rows]:
            typer.echo("\t".join(printable(str(cell)) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*header, header_style="bold")
    for row in rows:
        drawn.add_row(*(printable(str(cell)) for cell in row))
    Console().print(drawn)


def facts(pairs: Mapping[str, object], title: str) -> None:
    """Name and value, one per line, names aligned."""
    width = max(map(len, pairs), default=0)
    say(title)
    for name, value in pairs.items():
        say(f"  {name:<{width}}  {value}")
