"""What workers did, a JSON line each: preloaded by the workers of `bench_chaos` (``dask worker --preload``).

The file is named by CHAOS_LOG. Lines are written whole, so a worker that is killed leaves no half of one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from wsi_mmm.engine.executors import isolated
from wsi_mmm.engine.stages import perform as stages
from wsi_mmm.engine.units import UnitResult, WorkUnit, result_status

Step = Callable[..., UnitResult]


def say(what: str, name: str = "", why: str = "") -> None:
    """Add a line to the log."""
    line = json.dumps({"t": time.time(), "pid": os.getpid(), "what": what, "name": name, "why": why}) + "\n"
    descriptor = os.open(os.environ["CHAOS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def logged(step: Step) -> Step:
    """The same step, with a line when it begins and one that says how it ended."""

    def perform(unit: WorkUnit, **prefetch: object) -> UnitResult:
        say("begin", unit.name)
        try:
            result = step(unit, **prefetch)
        except BaseException as error:
            say("raised", unit.name, f"{type(error).__name__}: {error}"[:200])
            raise
        say(result_status(result), unit.name)
        return result

    return perform


def dask_setup(worker: object) -> None:
    """Called by Dask in a worker that begins."""
    stages.perform, isolated.perform = logged(stages.perform), logged(isolated.perform)
    say("start")
