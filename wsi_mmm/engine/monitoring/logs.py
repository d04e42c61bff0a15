"""Logs as JSON lines, by the standard library's logging under the name ``wsi_mmm``.

A line has ``time`` (UTC), ``level``, ``event`` (unit, plan, tile, slide, stage, warning or the name of a logger),
``message``, and of what it is about: ``slide``, ``unit``, ``worker``, numbers. At "info" there are a few lines per
slide, at "debug" one per unit.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from wsi_mmm import timing
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.monitoring.observe import Hooks, redact_uris
from wsi_mmm.engine.units import (
    Failure,
    ForwardResult,
    InterpretResult,
    PlanResult,
    PublishResult,
    UnitResult,
    WorkUnit,
    result_status,
)
from wsi_mmm.errors import OptionError, OutputError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
NAME = "wsi_mmm"

Fields = dict[str, object]


class JsonLines(logging.Formatter):
    """A record as one line of JSON, without credentials; ``record.facts`` are fields of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as a line of JSON, without the line break."""
        facts: Fields = getattr(record, "facts", {})
        unit = timing.current_unit()
        about = {"slide": unit.partition("/")[0], "unit": unit} if unit and "slide" not in facts else {}
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": when.replace("+00:00", "Z"), "level": record.levelname.lower(),
            "event": facts.get("event", record.name), "message": redact_uris(record.getMessage()), **about,
            **{name: redact_uris(value) if isinstance(value, str) else value for name, value in facts.items()},
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = redact_uris(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=str)


@contextmanager
def logging_to(path: str | None, level: str = "info") -> Iterator[Hooks]:
    """Append the log of a run to the file ``path``, or write it to stderr. Raises OutputError, OptionError."""
    if level not in LEVELS:
        raise OptionError(f"there is no log level {level!r}; choose one of {', '.join(LEVELS)}")
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if path is not None:
        try:
            handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the log to {path}: {error.strerror}; choose another --log-file") from error
    logger = logging.getLogger(NAME)
    handler.setFormatter(JsonLines())
    before, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(LEVELS[level])
    logger.propagate = False  # else an application that set up logging gets every line twice
    try:
        yield Hooks(_Lines(logger).hear, _Lines(logger).watch)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagate
        handler.close()


_EVENT_LEVELS = {"tile": logging.DEBUG, "warning": logging.WARNING}  # else INFO
_BAD = {"failed": logging.ERROR, "partial": logging.WARNING}


class _Lines:
    """Events and units as records of ``logger``."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def hear(self, event: Event) -> None:
        """An event; slides that failed are errors."""
        level = _EVENT_LEVELS.get(event.kind, logging.INFO)
        if event.kind == "slide":
            level = _BAD.get(event.status or "", level)
        if self.logger.isEnabledFor(level):
            facts: Fields = {"event": event.kind, "slide": event.slide}
            if event.total:
                facts |= {"done": event.done, "total": event.total}
            self._write_record(level, event.message, facts)

    def watch(self, thing: WorkUnit | UnitResult) -> None:
        """A result; units that failed or lack tiles are logged as errors and warnings."""
        if not isinstance(thing, WorkUnit):
            level = _BAD.get(result_status(thing), logging.DEBUG)
            if self.logger.isEnabledFor(level):
                self._write_record(level, thing.error if isinstance(thing, Failure) else "", _result_fields(thing))

    def _write_record(self, level: int, message: str, facts: Fields) -> None:
        self.logger.log(level, "%s", message, extra={"facts": facts})


def _result_fields(result: UnitResult) -> Fields:
    facts = result.facts
    match result:
        case PlanResult(plan=plan):
            counts = {"tiles": len(plan.index) if plan else 0}
        case ForwardResult():
            counts = {"tiles": result.tiles, "failed_tiles": len(result.failed)}
        case InterpretResult():
            counts = {"objects": result.objects}
        case PublishResult():
            counts = {"objects": result.summary.object_count}
        case _:
            counts = {}
    seconds = {stage: round(spent, 4) for stage, spent in timing.sum_stages(facts.times).items()}
    fields: Fields = {"event": "unit", "slide": facts.slide, "unit": facts.name, "kind": facts.kind}
    fields |= {"status": result_status(result), **{name: count for name, count in counts.items() if count}}
    return fields | {"seconds": seconds, "worker": facts.worker or f"pid {facts.pid}"}
