"""A work in a process of its own: for those in whose company workers have died.

What kills its process (a codec that crashes, more memory than there is) kills nothing else, and is known for certain
to be the fault of this work, where a worker may have died of a neighbour.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection

from wsi_mmm.engine.units import UnitResult, WorkUnit
from wsi_mmm.errors import ClusterError

_PROGRAM = "import sys; from wsi_mmm.engine.executors.isolated import serve; serve(*map(int, sys.argv[1:]))"


def perform(unit: WorkUnit) -> UnitResult:
    """The receipt of a work, done in a new process. ClusterError when that process dies of it."""
    here, there = os.pipe(), os.pipe()
    with Connection(there[0], writable=False) as back, Connection(here[1], readable=False) as forth:
        command = [sys.executable, "-c", _PROGRAM, str(here[0]), str(there[1])]
        process = subprocess.Popen(command, pass_fds=(here[0], there[1]), stdin=subprocess.DEVNULL)
        os.close(here[0])
        os.close(there[1])
        try:
            forth.send(unit)
            result: UnitResult = back.recv()
        except (EOFError, OSError) as error:
            raise ClusterError(f"{named(unit)}: {ending(process.wait())}, after every worker that tried it") from error
    process.wait()
    return result


def serve(source: int, sink: int) -> None:
    """What the new process does; ``source``, ``sink``: the file descriptors that it hears and answers by."""
    from wsi_mmm.engine.executors.threads import failure
    from wsi_mmm.engine.stages import steps
    from wsi_mmm.storage.retry import retry_unit

    with Connection(source, writable=False) as hear, Connection(sink, readable=False) as answer:
        unit: WorkUnit = hear.recv()
        try:
            answer.send(retry_unit(steps.perform, unit))
        except Exception as error:  # noqa: BLE001  (told in the receipt)
            answer.send(failure(unit, error))


def ending(code: int) -> str:
    """How a process ended, in words; ``code``: its exit code, of a signal negative."""
    if code == -signal.SIGKILL:
        return "its process was killed (out of memory?)"
    if code < 0:
        return f"its process crashed ({signal.Signals(-code).name})"
    return f"its process ended with code {code}"


def named(unit: WorkUnit) -> str:
    """A work as errors name it; the slide stands beside."""
    return f"{unit.kind} of block {unit.block[0]}-{unit.block[1]}" if unit.grid else unit.kind
