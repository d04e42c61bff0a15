"""The Dask executor: the same works on worker processes, here or on a cluster.

Only works and receipts travel (a few hundred bytes each); workers open slides and models themselves, with the
credentials of their own environment. What runs on a worker is ``steps.perform``, the very function of the serial
executor, so both give the same files.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import queue
import threading
from typing import Any

import dask
from distributed import Client, Future, LocalCluster
from distributed.scheduler import KilledWorker

import wsi_mmm
from wsi_mmm.engine import steps
from wsi_mmm.engine.base import Kind, Receipt, Work
from wsi_mmm.engine.local import cpu_count, failure
from wsi_mmm.errors import ClusterError

AHEAD = 2  # works waiting at each worker thread, so that none waits for the client


class DaskExecutor:
    """Works run on the workers of ``client``; the client only keeps the books."""

    def __init__(self, client: Client, *, cluster: LocalCluster | None = None, owned: bool = False) -> None:
        self._client, self._cluster, self._owned = client, cluster, owned
        self._results: queue.SimpleQueue[tuple[Work, Future[Any]]] = queue.SimpleQueue()
        self._flying: dict[Future[Any], Kind] = {}
        self._lock = threading.Lock()
        self.warnings: list[str] = []
        self._workers = self._able_workers()
        threads: dict[str, int] = self._client.nthreads()
        self._places: int = AHEAD * sum(threads[worker] for worker in self._workers)

    def _able_workers(self) -> list[str]:
        """Addresses of the workers that can do the work; an error when there is none, a warning for each left out."""
        client = self._client
        found = client.run(importlib.metadata.version, "wsi-mmm", on_error="return")
        torches = client.run(importlib.util.find_spec, "torch", on_error="return")
        if not found:
            raise ClusterError("the scheduler has no workers: start some with 'dask worker ADDRESS'")
        reasons = {}
        for worker, version in found.items():
            if isinstance(version, BaseException):
                reasons[worker] = "wsi-mmm is not installed there"
            elif version != wsi_mmm.__version__:
                reasons[worker] = f"it has wsi-mmm {version}, this is {wsi_mmm.__version__}"
            elif torches[worker] is None or isinstance(torches[worker], BaseException):
                reasons[worker] = "torch is not installed there"
        able = sorted(set(found) - set(reasons))
        lines = [f"worker {worker} cannot be used: {reason}" for worker, reason in sorted(reasons.items())]
        if not able:
            wanted = f"install wsi-mmm {wsi_mmm.__version__} on the workers"
            raise ClusterError(f"no worker can run models: {lines[0]}; {wanted}")
        self.warnings = lines
        return able

    def room(self, kind: Kind) -> int:
        """Free places: enough work in flight to keep every worker thread fed, and no more."""
        with self._lock:
            same = sum(1 for other in self._flying.values() if (other == "forward") == (kind == "forward"))
        return max(1, self._places) - same

    def start(self, work: Work) -> None:
        """Send a work to the scheduler; a worker that dies is replaced and its works are done again."""
        restrict = self._workers if self.warnings else None
        key = f"{work.name}-{id(work)}"
        future = self._client.submit(steps.perform, work, pure=False, retries=1, workers=restrict, key=key)
        with self._lock:
            self._flying[future] = work.kind
        future.add_done_callback(lambda done: self._results.put((work, done)))

    def wait(self, timeout: float) -> Receipt | None:
        """The next receipt, or None after ``timeout`` seconds; ClusterError when the scheduler is gone."""
        try:
            work, future = self._results.get(timeout=timeout)
        except queue.Empty:
            if self._client.status not in ("running", "connecting"):
                raise ClusterError("the connection to the scheduler was lost; run again to resume") from None
            return None
        with self._lock:
            self._flying.pop(future, None)
        return self._receipt(work, future)

    def _receipt(self, work: Work, future: Future[Any]) -> Receipt:
        try:
            receipt: Receipt = future.result(timeout=30)
        except KilledWorker as error:
            text = f"block {work.block}: every worker that tried it died ({error.last_worker.address}); out of memory?"
            return failure(work, ClusterError(text))
        except Exception as error:  # noqa: BLE001  (whatever the worker raised is told in this work's receipt)
            return failure(work, error)
        finally:
            future.release()
        return receipt

    def close(self, *, cancel: bool = False) -> None:
        """Drop what has not begun when cancelling; end the processes this executor started."""
        if cancel and self._flying:
            self._client.cancel(list(self._flying), force=True)
        if self._owned:
            self._client.close()
        if self._cluster is not None:
            self._cluster.close(timeout=20)


def local_cluster(workers: int) -> DaskExecutor:
    """``workers`` processes on this machine, each with threads enough to read beside the model."""
    threads = max(2, cpu_count() // workers)
    # Workers are started by us and talk on loopback; the dashboard would open a port nobody asked for.
    cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=threads,
        processes=True,
        dashboard_address=None,
        host="127.0.0.1",
        silence_logs=50,
    )
    return DaskExecutor(Client(cluster, set_as_default=False), cluster=cluster, owned=True)


def connect(address: str, timeout: float = 10.0) -> DaskExecutor:
    """The cluster at ``address`` (tcp://host:port); ClusterError when nobody answers within ``timeout`` seconds."""
    try:
        with dask.config.set({"distributed.comm.timeouts.connect": timeout}):
            client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {address}: is it running, is the port open?") from error
    return DaskExecutor(client, owned=True)


def attached(client: Any) -> DaskExecutor:
    """An executor over a client that the caller keeps."""
    return DaskExecutor(client)
