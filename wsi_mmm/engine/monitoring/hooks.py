"""What a kind of telemetry hears of a run, and what it may say of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wsi_mmm.engine.events import Event, Listener, Watch, silent, unwatched
from wsi_mmm.engine.units import UnitResult, WorkUnit
from wsi_mmm.storage import store

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>]+")


@dataclass(frozen=True, slots=True)
class Hooks:
    """``listener`` hears events; ``watch`` sees works as they are started, and receipts."""

    listener: Listener = silent
    watch: Watch = unwatched


def all_of(hooks: Sequence[Hooks]) -> Hooks:
    """One pair of hooks for all of these, in order."""
    if not hooks:
        return Hooks()

    def listen(event: Event) -> None:
        for hook in hooks:
            hook.listener(event)

    def watch(thing: WorkUnit | UnitResult) -> None:
        for hook in hooks:
            hook.watch(thing)

    return Hooks(listen, watch)


def hidden(text: str) -> str:
    """``text`` with every URI in it bare of user, password and query."""
    return _URI.sub(lambda found: store.redact(found[0]), text) if "://" in text else text


def status_of(event: Event) -> str:
    """How the slide of a "slide" event ended: its first word (done, empty, partial, failed)."""
    return event.message.partition(" ")[0].rstrip(":,")
