"""The hooks by which logs, metrics and traces see a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wsi_mmm.engine.events import Event, Listener, silent
from wsi_mmm.engine.units import UnitResult, Watch, WorkUnit
from wsi_mmm.storage import store

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>]+")


def ignore_unit(thing: WorkUnit | UnitResult) -> None:
    """Ignore a unit or a result."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """``listener`` hears events; ``watch`` sees units as they are started, and results."""

    listener: Listener = silent
    watch: Watch = ignore_unit


def combine_hooks(hooks: Sequence[Hooks]) -> Hooks:
    """Hooks that call all of these, in order."""
    if not hooks:
        return Hooks()

    def listen(event: Event) -> None:
        for hook in hooks:
            hook.listener(event)

    def watch(thing: WorkUnit | UnitResult) -> None:
        for hook in hooks:
            hook.watch(thing)

    return Hooks(listen, watch)


def redact_uris(text: str) -> str:
    """``text`` with user, password and query removed from every URI in it."""
    return _URI.sub(lambda found: store.redact(found[0]), text) if "://" in text else text
