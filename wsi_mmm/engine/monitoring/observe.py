"""A run seen from outside: structured logs, metrics for Prometheus, traces for OpenTelemetry.

All of it is made from the events, units and results of the engine. Nothing is imported, opened or begun unless it is
asked for, and no URI is shown with credentials (`hooks.redact_uris`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from wsi_mmm.engine.monitoring.hooks import Hooks, combine_hooks

__all__ = ["NOTHING", "Hooks", "Observe", "combine_hooks", "observing"]


@dataclass(frozen=True, slots=True)
class Observe:
    """The logs, metrics and traces that a run writes.

    ``log_file``: JSON lines are added to it. ``log_level``: "debug" (every unit), "info" (every slide; the default),
    "warning" or "error"; without a file the lines go to stderr. ``metrics_port``: serve metrics on that port of
    loopback (extra ``metrics``). ``traces``: send spans by this exporter, "otlp", "console" or the name of an installed
    one; endpoints, headers and sampling are those of the OTEL_ variables (extra ``tracing``).
    """

    log_file: str | None = None
    log_level: str | None = None
    metrics_port: int | None = None
    traces: str | None = None


NOTHING = Observe()


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
