"""Logs as JSON lines, by the standard library's logging under the name ``wsi_mmm``.

A line has ``time`` (UTC), ``level``, ``event`` (unit, plan, tile, slide, stage, warning or the name of a logger),
``message``, and of what it is about: ``slide``, ``unit``, ``worker``, numbers. At "info" there are a few lines per
slide, at "debug" one per unit.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wsi_mmm import timing
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.monitoring.hooks import Hooks, hidden, status_of
from wsi_mmm.engine.units import UnitResult, WorkUnit
from wsi_mmm.errors import OptionError, OutputError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
NAME = "wsi_mmm"


class JsonLines(logging.Formatter):
    """A record as one line of JSON, without credentials; ``record.facts`` are fields of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        facts: dict[str, Any] = getattr(record, "facts", {})
        unit = timing.unit()
        about = {"slide": unit.partition("/")[0], "unit": unit} if unit and "slide" not in facts else {}
        line = {
            "time": _utc(record.created), "level": record.levelname.lower(), "event": facts.get("event", record.name),
            "message": hidden(record.getMessage()), **about,
            **{name: hidden(value) if isinstance(value, str) else value for name, value in facts.items()},
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = hidden(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=str)


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


@contextmanager
def logging_to(path: str | None, level: str = "info") -> Iterator[Hooks]:
    """Log a run to the end of the file ``path``, or to stderr. Raises OutputError, OptionError."""
    if level not in LEVELS:
        raise OptionError(f"there is no log level {level!r}; choose one of {', '.join(LEVELS)}")
    handler, logger = _handler(path), logging.getLogger(NAME)
    handler.setFormatter(JsonLines())
    before, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(LEVELS[level])
    logger.propagate = False  # else whoever set up logging gets every line twice
    try:
        yield Hooks(_Lines(logger).hear, _Lines(logger).watch)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagate
        handler.close()


def _handler(path: str | None) -> logging.Handler:
    if path is None:
        return logging.StreamHandler(sys.stderr)
    try:
        return logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the log to {path}: {error.strerror}; choose another --log-file") from error


_EVENT_LEVELS = {
    "plan": logging.INFO, "tile": logging.DEBUG, "slide": logging.INFO, "stage": logging.INFO,
    "warning": logging.WARNING,
}  # fmt: skip
_BAD = {"failed": logging.ERROR, "partial": logging.WARNING}


class _Lines:
    """Events and units as records of ``logger``."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def hear(self, event: Event) -> None:
        """An event; slides that failed are errors."""
        level = _EVENT_LEVELS.get(event.kind, logging.INFO)
        if event.kind == "slide":
            level = _BAD.get(status_of(event), level)
        if self.logger.isEnabledFor(level):
            facts: dict[str, Any] = {"event": event.kind, "slide": event.slide}
            if event.total:
                facts |= {"done": event.done, "total": event.total}
            self._say(level, event.message, facts)

    def watch(self, thing: WorkUnit | UnitResult) -> None:
        """What came of a unit; those that failed or lack tiles are told at their level."""
        if isinstance(thing, UnitResult):
            level = _BAD.get(thing.status, logging.DEBUG)
            if self.logger.isEnabledFor(level):
                self._say(level, thing.error, _facts(thing))

    def _say(self, level: int, message: str, facts: dict[str, Any]) -> None:
        self.logger.log(level, "%s", message, extra={"facts": facts})


def _facts(result: UnitResult) -> dict[str, Any]:
    seconds = {stage: round(spent, 4) for stage, spent in timing.together(result.laps).items()}
    counts = {"tiles": result.tiles, "failed_tiles": len(result.failed), "objects": result.objects}
    facts: dict[str, Any] = {"event": "unit", "slide": result.slide, "unit": result.name}
    facts |= {"kind": result.kind, "status": result.status}
    facts |= {name: count for name, count in counts.items() if count}
    return facts | {"seconds": seconds, "worker": result.worker or f"pid {result.pid}"}
