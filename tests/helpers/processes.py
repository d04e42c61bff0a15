"""Programs that a test starts and ends, with what they print in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent


@contextmanager
def running(
    command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, bare: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A program of this Python's environment; ended when the block is left, with kill when it does not listen.

    ``env`` is added to ours; with ``bare`` it is all there is.
    """
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    with log.open("ab") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**({} if bare else {**os.environ, "PATH": path}), **(env or {})},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def wait_for(true: Callable[[], bool], what: str, log: Path, *, seconds: float = 60) -> None:
    """Wait until ``true()``; else fail with the end of ``log``."""
    stop = time.monotonic() + seconds
    while not true():
        if time.monotonic() > stop:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
            raise AssertionError(f"{what} did not happen in {seconds:.0f} s: {tail}")
        time.sleep(0.2)


@contextmanager
def dask_cluster(
    folder: Path, options: Sequence[str | Path] = (), *, env: Mapping[str, str] | None = None, protocol: str = "tcp"
) -> Iterator[str]:
    """The address of a plain ``dask scheduler`` with one ``dask worker`` of two threads, both with ``options``."""
    log, facts = folder / "cluster.log", folder / "scheduler.json"
    host = ["--host", "127.0.0.1", "--protocol", protocol, "--no-dashboard", *options]
    with ExitStack() as stack:
        stack.enter_context(
            running(["dask", "scheduler", *host, "--port", "0", "--scheduler-file", facts], log, env=env)
        )
        wait_for(facts.exists, "the start of the scheduler", log)
        address = str(json.loads(facts.read_text())["address"])
        worker = ["dask", "worker", address, *host, "--nthreads", "2", "--local-directory", folder]
        stack.enter_context(running(worker, log, env=env))
        wait_for(lambda: "Registered to" in log.read_text(errors="replace"), "the start of the worker", log)
        yield address
