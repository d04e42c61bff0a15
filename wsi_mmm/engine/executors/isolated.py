"""Run one unit in a subprocess: isolates units that were on a worker when it was killed.

What kills the subprocess (a codec that crashes, too little memory) kills nothing else, and is certainly the fault of
this unit, where a worker may have died of another unit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection

from wsi_mmm.engine.units import UnitResult, WorkUnit
from wsi_mmm.errors import ClusterError

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_PROGRAM = "import sys; from wsi_mmm.engine.executors.isolated import serve; serve(*map(int, sys.argv[1:]))"


def perform(unit: WorkUnit) -> UnitResult:
    """The result of a unit that is run in a new process. ClusterError when that process dies."""
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
            raise ClusterError(
                f"{describe_unit(unit)}: {describe_exit(process.wait())}, after every worker that tried it"
            ) from error
    process.wait()
    return result


def serve(source: int, sink: int) -> None:
    """Run in the new process: read the unit from file descriptor ``source``, write its result to ``sink``."""
    end_with_parent()
    from wsi_mmm.engine.stages.perform import perform as run_unit
    from wsi_mmm.engine.units import failure_of
    from wsi_mmm.storage.retry import retry_unit

    with Connection(source, writable=False) as hear, Connection(sink, readable=False) as answer:
        unit: WorkUnit = hear.recv()
        try:
            answer.send(retry_unit(run_unit, unit))
        except Exception as error:  # noqa: BLE001  (sent as a Failure)
            answer.send(failure_of(unit, error))


def end_with_parent() -> None:
    """Let the system end this process as soon as the one that started it is gone, by whatever cause (Linux only)."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the system was told
        os._exit(1)


def describe_exit(code: int) -> str:
    """How a process ended; ``code``: its exit code, negative for a signal."""
    if code == -signal.SIGKILL:
        return "its process was killed (out of memory?)"
    if code < 0:
        return f"its process crashed ({signal.Signals(-code).name})"
    return f"its process ended with code {code}"


def describe_unit(unit: WorkUnit) -> str:
    """A unit as error texts name it, without its slide."""
    return f"{unit.kind} of block {unit.block[0]}-{unit.block[1]}" if unit.grid else unit.kind
