"""The options that show a run from outside: logs, metrics, traces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_mmm import config
from wsi_mmm.errors import OptionError

if TYPE_CHECKING:
    from wsi_mmm.engine.monitoring.observe import Observe

_PANEL = "Watch it"
LogFile = Annotated[
    str | None, typer.Option(help="Add what happens to this file, a JSON object per line.", rich_help_panel=_PANEL)
]
LogLevel = Annotated[
    str | None,
    typer.Option(
        help="debug (every unit of work), info, warning or error; without --log-file to stderr. (default: info)",
        rich_help_panel=_PANEL,
    ),
]
MetricsPort = Annotated[
    int | None, typer.Option(help="Serve Prometheus metrics on this port of this machine.", rich_help_panel=_PANEL)
]
Traces = Annotated[
    bool,
    typer.Option("--traces", help="Send OpenTelemetry traces, as the OTEL_ variables say.", rich_help_panel=_PANEL),
]

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "log_file": ((str,), "a path"), "log_level": ((str,), "a word"), "metrics_port": ((int,), "a whole number"),
    "traces": ((bool, str), "true, false or the name of an exporter"),
}  # fmt: skip


def observed(options: Mapping[str, Any]) -> tuple[Observe | None, dict[str, Any]]:
    """What of ``options`` says how the run is shown (None: nothing does), and the rest of them. Raises OptionError."""
    rest = dict(options)
    given = {name: rest.pop(name) for name in _KINDS if name in rest}
    for name, value in given.items():
        kinds, words = _KINDS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise OptionError(f"option {name} must be {words}, not {value!r}")
    if isinstance(given.get("traces"), bool):
        given["traces"] = config.trace_exporter() if given["traces"] else None
    if not given:
        return None, rest
    from wsi_mmm.engine.monitoring.observe import Observe  # with it comes numpy: not needed for --help

    return Observe(**given), rest
