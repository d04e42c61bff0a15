"""The Dask executor: the same works on worker processes, here or on a cluster.

Only works and receipts travel (a few hundred bytes each); workers open slides and models themselves, with the
credentials of their own environment. What runs on a worker is ``steps.perform``, the very function of the serial
executor, so both give the same files.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import queue
import threading
import time
from typing import Any

import dask
from distributed import Client, Future, LocalCluster, Security
from distributed.scheduler import KilledWorker

import wsi_mmm
from wsi_mmm.engine import steps
from wsi_mmm.engine.base import Kind, Receipt, Work
from wsi_mmm.engine.local import cpu_count, failure
from wsi_mmm.engine.tls import Tls
from wsi_mmm.errors import ClusterError

AHEAD = 2  # works waiting at each worker thread, so that none waits for the client
LOOK = 10.0  # seconds between looks at which workers there are: they come, go and are restarted
PATIENCE = 300.0  # seconds that a cluster may be without any worker in the middle of a run


class DaskExecutor:
    """Works run on the workers of ``client``; the client only keeps the books."""

    def __init__(self, client: Client, *, cluster: LocalCluster | None = None, owned: bool = False) -> None:
        self._client, self._cluster, self._owned = client, cluster, owned
        self._results: queue.SimpleQueue[tuple[Work, Future[Any]]] = queue.SimpleQueue()
        self._flying: dict[Future[Any], Kind] = {}
        self._lock = threading.Lock()
        self._looked = self._alive = time.monotonic()
        threads: dict[str, int] = client.nthreads()
        self._seen = set(threads)
        reasons = self._unable()
        self.warnings = [f"worker {worker} cannot be used: {reason}" for worker, reason in sorted(reasons.items())]
        self._workers = sorted(self._seen - set(reasons))
        self._places = AHEAD * sum(threads[worker] for worker in self._workers)
        if not threads:
            raise ClusterError("the scheduler has no workers: start some with 'dask worker ADDRESS'")
        if not self._workers:
            wanted = f"install wsi-mmm {wsi_mmm.__version__} and its dependencies on the workers"
            raise ClusterError(f"no worker can run models: {self.warnings[0]}; {wanted}")

    def _unable(self) -> dict[str, str]:
        """Which workers cannot do the work, and why."""
        found = self._client.run(importlib.metadata.version, "wsi-mmm", on_error="return")
        torches = self._client.run(importlib.util.find_spec, "torch", on_error="return")
        reasons = {}
        for worker, version in found.items():
            if isinstance(version, BaseException):
                reasons[worker] = "wsi-mmm is not installed there"
            elif version != wsi_mmm.__version__:
                reasons[worker] = f"it has wsi-mmm {version}, this is {wsi_mmm.__version__}"
            elif torches.get(worker) is None or isinstance(torches[worker], BaseException):
                reasons[worker] = "torch is not installed there"
        return reasons

    def _look(self) -> None:
        """Every now and then: count the workers anew. ClusterError when there has been none for long."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        threads: dict[str, int] = self._client.nthreads()
        if set(threads) != self._seen:
            self._seen, unable = set(threads), self._unable() if threads else {}
            self._workers = sorted(self._seen - set(unable))
            self._places = AHEAD * sum(threads[worker] for worker in self._workers)
        if self._workers:
            self._alive = now
        elif now - self._alive > PATIENCE:
            raise ClusterError(f"no worker has been there for {PATIENCE:.0f} s; start some, then run again to resume")

    def room(self, kind: Kind) -> int:
        """Free places: enough work in flight to keep every worker thread fed, and no more."""
        with self._lock:
            same = sum(1 for other in self._flying.values() if (other == "forward") == (kind == "forward"))
        return max(1, self._places) - same

    def start(self, work: Work) -> None:
        """Send a work to the scheduler; a worker that dies is replaced and its works are done again."""
        restrict = (self._workers or None) if self.warnings else None
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
            if self._client.status == "running":
                self._look()
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


MAIN_GUARD = "in a script, call it below: if __name__ == '__main__':"


def local_cluster(workers: int) -> DaskExecutor:
    """``workers`` processes on this machine, each with threads enough to read beside the model."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ClusterError(f"a worker process has run the script that starts workers; {MAIN_GUARD}")
    threads = max(2, cpu_count() // workers)
    try:
        # Workers are started by us and talk on loopback; the dashboard would open a port nobody asked for.
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=True,
            dashboard_address=None,
            host="127.0.0.1",
            silence_logs=50,
        )
    except (OSError, RuntimeError, TimeoutError) as error:
        raise ClusterError(f"the {workers} worker processes did not start ({error}); {MAIN_GUARD}") from error
    return _over(Client(cluster, set_as_default=False), cluster)


def connect(address: str, timeout: float = 10.0, *, tls: Tls | None = None) -> DaskExecutor:
    """The cluster at ``address``: tcp://host:port; with ``tls``, tls://host:port.

    ClusterError when nobody answers within ``timeout`` seconds; as long again is waited for its first worker.
    """
    try:
        with dask.config.set({"distributed.comm.timeouts.connect": timeout}):
            client = Client(address, timeout=timeout, set_as_default=False, security=_security(address, tls))
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {address}: {_look_at(address)}") from error
    with contextlib.suppress(TimeoutError):
        client.wait_for_workers(1, timeout=timeout)
    return _over(client)


def _security(address: str, tls: Tls | None) -> Security | None:
    """None leaves it to Dask's own configuration, such as DASK_DISTRIBUTED__COMM__TLS__CA_FILE."""
    if tls is None:
        if address.startswith("tls://") and Security().get_connection_args("client")["ssl_context"] is None:
            raise ClusterError(
                f"no Dask scheduler answers at {address} without certificates: give their folder with --tls"
            )
        return None
    return Security(
        tls_ca_file=tls.ca, tls_client_cert=tls.certificate, tls_client_key=tls.key, require_encryption=True
    )


def _look_at(address: str) -> str:
    """What to look at when a scheduler does not answer."""
    if not address.startswith("tls://"):
        return "is it running, is the port open? One that speaks TLS has an address of tls://, and wants --tls"
    return "is it running, is the port open, did one authority sign its certificate and that of --tls?"


def _over(client: Client, cluster: LocalCluster | None = None) -> DaskExecutor:
    """An executor that owns ``client``; when it cannot be had, nothing is left open."""
    try:
        return DaskExecutor(client, cluster=cluster, owned=True)
    except BaseException:
        client.close()
        if cluster is not None:
            cluster.close(timeout=20)
        raise


def attached(client: Any) -> DaskExecutor:
    """An executor over a client that the caller keeps."""
    return DaskExecutor(client)
