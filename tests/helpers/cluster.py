"""A cluster of plain ``dask scheduler`` and ``dask worker`` processes, which a test may kill one by one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from distributed import Client

BIN = Path(sys.executable).parent


@dataclass
class PlainCluster:
    """``workers`` processes of ``threads`` threads under nannies, with ``options`` and ``env``."""

    folder: Path
    workers: int = 2
    threads: int = 2
    options: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> PlainCluster:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        try:
            self.scheduler = self.start_scheduler()
            for _ in range(self.workers):
                self.add_worker(*self.options)
            with self.client() as client:
                client.wait_for_workers(self.workers, timeout=90)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process, whole families of them."""
        for process in reversed(self.processes):
            kill(process.pid)
            process.wait(20)

    @property
    def address(self) -> str:
        """Where the scheduler answers."""
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What all of them say."""
        return self.folder / "cluster.log"

    def client(self) -> Client:
        """A new client, whose owner closes it."""
        return Client(self.address, set_as_default=False, timeout=60)

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        """At the port of this cluster, also in the place of one that was killed."""
        return self._start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")

    def add_worker(self, *options: str) -> subprocess.Popen[bytes]:
        """One more worker process under a nanny, tuned as `wsi_mmm.host_tuning` says: it imports torch sooner."""
        return self._start(
            "worker", self.address, "--host", "127.0.0.1", "--nthreads", str(self.threads), "--no-dashboard",
            "--local-directory", str(self.folder), "--preload", "wsi_mmm.host_tuning", *options,
        )  # fmt: skip

    def pids(self) -> dict[str, int]:
        """Process ids of the workers themselves, not of their nannies, by address."""
        with self.client() as client:
            found: dict[str, int] = client.run(os.getpid)
        return found

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            process = subprocess.Popen(
                [str(BIN / "dask"), *words], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.env},
            )  # fmt: skip
        self.processes.append(process)
        return process


def kill(pid: int) -> None:
    """SIGKILL for a process and all that came of it: a machine that is gone."""
    try:
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until ``true()``; fail after so many seconds."""
    stop = time.monotonic() + seconds
    while not true():
        if time.monotonic() > stop:
            raise AssertionError(f"{what} did not happen in {seconds:.0f} s")
        time.sleep(0.1)
