"""The logs, metrics and traces of a run, and the hooks by which they see it.

All of it is made from the events, units and results of the engine. Nothing is imported, opened or begun unless it is
asked for (`run.observing`), and no URI is shown with credentials.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wsi_mmm.engine.events import Event, Listener, silent
from wsi_mmm.engine.units import UnitResult, Watch, WorkUnit
from wsi_mmm.errors import printable
from wsi_mmm.storage import store

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>]+")


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


@dataclass(frozen=True, slots=True)
class Hooks:
    """``listener`` hears events; ``watch`` sees units as they are started, and results."""

    listener: Listener = silent
    watch: Watch = lambda unit_or_result: None


def combine_hooks(hooks: Sequence[Hooks]) -> Hooks:
    """Hooks that call all of these, in order."""

    def listen(event: Event) -> None:
        for hook in hooks:
            hook.listener(event)

    def watch(thing: WorkUnit | UnitResult) -> None:
        for hook in hooks:
            hook.watch(thing)

    return Hooks(listen, watch)


def redact_uris(text: str) -> str:
    """``text`` with user, password and query removed from every URI in it, as UTF-8 can hold it."""
    text = printable(text)
    return _URI.sub(lambda found: store.redact(found[0]), text) if "://" in text else text
