"""The Dask executor: the same works on worker processes, here or on a cluster.

Only works and receipts travel (see ``wire``); workers open slides and models themselves, with the credentials of their
own environment. What runs on a worker is ``steps.perform``, the very function of the serial executor, so both give the
same files.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import itertools
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import dask
from distributed import Client, Future, LocalCluster, Security, get_worker
from distributed.scheduler import KilledWorker
from distributed.utils import sync

from wsi_mmm._version import __version__
from wsi_mmm.engine.executors import isolated, wire
from wsi_mmm.engine.executors.bundles import Pace, bundled
from wsi_mmm.engine.executors.isolated import named
from wsi_mmm.engine.executors.pools import (
    FIRST,
    LABEL_RESOURCE,
    MODELS,
    POOLS,
    READERS,
    Pool,
    WorkerFacts,
    labelled,
    pool_of,
)
from wsi_mmm.engine.executors.threads import failure
from wsi_mmm.engine.executors.tls import Tls
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import steps
from wsi_mmm.engine.units import Kind, UnitResult, WorkUnit
from wsi_mmm.errors import ClusterError, WsiError
from wsi_mmm.storage import store
from wsi_mmm.storage.retry import retry_unit

AHEAD = 2  # works waiting at each worker thread, so that none waits for the client
LOOK = 2.0  # seconds between looks at which workers and which other jobs there are: they come and go
PATIENCE = 300.0  # seconds that a cluster may be without any worker in the middle of a run
GATHER = 5.0  # seconds to wait for receipts that are ready
BATCH = 512  # receipts fetched at once
SAID = 20  # messages that a client keeps for whoever debugs it; Dask's 1,000 are 50 MB of works

RECIPES = "wsi-mmm-recipes"  # where the scheduler keeps them, by key


def perform(bundle: bytes) -> list[UnitResult]:
    """What a worker does; ``bundle``: a work a line. Errors of ours are receipts; of others, Dask tries once more."""
    return [_done(lambda unit: retry_unit(steps.perform, unit), line) for line in bundle.split(b"\n")]


def perform_alone(bundle: bytes) -> list[UnitResult]:
    """The same in processes of their own: what kills such a one leaves the worker alive, and is a receipt."""
    return [_done(isolated.perform, line) for line in bundle.split(b"\n")]


def _done(step: Callable[[WorkUnit], UnitResult], line: bytes) -> UnitResult:
    unit = wire.unpacked(line, _recipe_there)
    try:
        return wire.light(step(unit))
    except WsiError as error:
        return failure(unit, error)


def _recipe_there(key: str) -> str | None:
    worker = get_worker()
    found = sync(worker.loop, worker.scheduler.get_metadata, keys=[RECIPES, key], default=None)
    return None if found is None else str(found)


class DaskExecutor:
    """Works run on the workers of ``client``; here the books are kept. Several such jobs share a cluster evenly.

    ``jobs``: how many there are now, this one included; None: whoever runs this one says so later, as ``jobs``, and
    until then it is not ``posted``.
    """

    def __init__(
        self,
        client: Client,
        *,
        cluster: LocalCluster | None = None,
        owned: bool = False,
        jobs: Callable[[], int] | None = None,
    ) -> None:
        self.client = self._client = client
        self.jobs, self.publishing_status = jobs or (lambda: 1), jobs is not None or cluster is not None
        self._cluster, self._owned = cluster, owned
        self._token, self._number = uuid.uuid4().hex[:8], itertools.count()
        self._results: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._outbox: dict[Kind, list[WorkUnit]] = {}
        self._inbox: deque[UnitResult] = deque()
        self._flying: dict[Future[Any], list[WorkUnit]] = {}
        self._pace = Pace()
        self._suspects: set[str] = set()
        self._taken = dict.fromkeys(POOLS, 0)
        self._keys: dict[int, tuple[Recipe, str]] = {}
        self._looked = self._alive = time.monotonic()
        self._workers = workers_of(client)
        self._unfit = self._unable(self._workers)
        self.warnings = [f"worker {worker} cannot be used: {reason}" for worker, reason in sorted(self._unfit.items())]
        self.dashboard = dashboard_of(client)
        self._places = self._count()
        if not self._workers:
            raise ClusterError("the scheduler has no workers: start some with 'dask worker ADDRESS'")
        if not self._places["rest"]:
            wanted = f"install wsi-mmm {__version__} and its dependencies on the workers"
            raise ClusterError(f"no worker can run models: {self.warnings[0]}; {wanted}")

    def _unable(self, workers: Iterable[str]) -> dict[str, str]:
        """Which of these workers cannot do the work, and why."""
        chosen = sorted(workers)
        found = self._client.run(importlib.metadata.version, "wsi-mmm", workers=chosen, on_error="return")
        torches = self._client.run(importlib.util.find_spec, "torch", workers=chosen, on_error="return")
        reasons = {}
        for worker, version in found.items():
            if isinstance(version, BaseException):
                reasons[worker] = "wsi-mmm is not installed there"
            elif version != __version__:
                reasons[worker] = f"it has wsi-mmm {version}, this is {__version__}"
            elif torches.get(worker) is None or isinstance(torches[worker], BaseException):
                reasons[worker] = "torch is not installed there"
        return reasons

    def _count(self) -> dict[Pool, int]:
        """Places of each pool: enough to keep this job's share of the worker threads fed, and no more."""
        fit = {name: facts for name, facts in self._workers.items() if name not in self._unfit}
        models = labelled(fit.values(), MODELS)
        readers = labelled(fit.values(), READERS)
        self._needs = {
            "model": {MODELS: LABEL_RESOURCE} if models else None,
            "read": {READERS: LABEL_RESOURCE} if readers else None,
        }
        chosen = {"model": models or fit.values(), "read": readers or fit.values(), "rest": fit.values()}
        threads = {pool: sum(worker.threads for worker in chosen[pool]) for pool in POOLS}
        jobs = max(1, self.jobs())
        return {pool: -(-AHEAD * threads[pool] // jobs) for pool in POOLS}

    def _look(self) -> None:
        """Every now and then: count workers and jobs anew. ClusterError when there has been no worker for long."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        with contextlib.suppress(OSError, TimeoutError):  # a scheduler that is busy, a worker that just died: next time
            self._recount()
        if self._places["model"]:
            self._alive = now
        elif now - self._alive > PATIENCE:
            raise ClusterError(f"no worker has been there for {PATIENCE:.0f} s; start some, then run again to resume")

    def _recount(self) -> None:
        found = workers_of(self._client)
        new = found.keys() - self._workers.keys()
        unfit = {name: why for name, why in self._unfit.items() if name in found}
        unfit |= self._unable(new) if new else {}
        self._workers, self._unfit = found, unfit
        self._places = self._count()

    def room(self, kind: Kind) -> int:
        """Room in the free places: what is at a worker or waits for one is bounded, however much there is to do."""
        pool, size = pool_of(kind), self._pace.size
        waiting = sum(len(units) / size(one) for one, units in self._outbox.items() if pool_of(one) == pool)
        return int((max(1, self._places[pool]) - self._taken[pool] - waiting) * size(kind))

    def start(self, unit: WorkUnit) -> None:
        """Put a work where the next ``wait`` sends it from."""
        self._outbox.setdefault(unit.kind, []).append(unit)

    def wait(self, timeout: float) -> UnitResult | None:
        """The next receipt, or None after ``timeout`` seconds; ClusterError when the scheduler is gone."""
        if not self._inbox:
            for kind in list(self._outbox):
                self._send(perform, bundled(self._outbox.pop(kind), self._pace.size(kind)))
            self._collect(timeout)
        return self._inbox.popleft() if self._inbox else None

    # ------------------------------------------------------------ to the scheduler

    def _send(self, function: Callable[[bytes], list[UnitResult]], bundles: list[list[WorkUnit]]) -> None:
        """Works of one kind, in one message; a worker that dies is replaced, and what it had is done again."""
        kind = bundles[0][0].kind
        futures = self._client.map(
            function,
            [b"\n".join(wire.packed(unit, self._recipe_key(unit.slide.recipe)) for unit in units) for units in bundles],
            # Of a few names, whatever the number of slides: the scheduler never forgets one.
            key=[(kind, f"{unit.slide.id} {unit.block[0]}-{unit.block[1]}", self._unique()) for unit, *_ in bundles],
            pure=False,
            retries=1,
            workers=self._fit_workers(),
            resources=self._needs.get(pool_of(kind)),
            priority=FIRST[kind],
        )
        self._taken[pool_of(kind)] += len(bundles)
        for future, units in zip(futures, bundles, strict=True):
            self._flying[future] = units
            future.add_done_callback(self._results.put)

    def _landed(self, future: Future[Any]) -> list[WorkUnit]:
        """The works of a bundle that is on its way no more."""
        units = self._flying.pop(future)
        self._taken[pool_of(units[0].kind)] -= 1
        return units

    def _unique(self) -> str:
        return f"{self._token}-{next(self._number)}"

    def _fit_workers(self) -> list[str] | None:
        """None: all of them."""
        return sorted(self._workers.keys() - self._unfit.keys()) if self._unfit else None

    def _recipe_key(self, recipe: Recipe) -> str:
        """The key of a recipe, which the scheduler knows from now on."""
        if id(recipe) not in self._keys:
            text = wire.recipe_json(recipe)
            self._keys[id(recipe)] = recipe, wire.recipe_key(text)
            self._client.set_metadata([RECIPES, wire.recipe_key(text)], text)
        return self._keys[id(recipe)][1]

    # ------------------------------------------------------------ and back

    def _collect(self, timeout: float) -> None:
        """Fetch the receipts that are ready, all at once."""
        done = self._ready(timeout)
        if self._client.status not in ("running", "connecting") or any(one.cancelled() for one in done):
            raise ClusterError("the connection to the scheduler was lost; run again to resume")
        if self._client.status == "running":
            self._look()
        good = [future for future in done if future.status == "finished"]
        for future, results in zip(good, self._fetched(good), strict=False):
            for result, unit in zip(results, self._landed(future), strict=True):
                self._pace.learn(result)
                self._inbox.append(wire.whole(result, unit.slide))
        for future in done:
            if future.status == "error":
                self._erred(future)
            elif future in self._flying:  # the worker that had the receipt died: the work is done again
                future.add_done_callback(self._results.put)
                continue
            future.release()

    def _ready(self, timeout: float) -> list[Future[Any]]:
        found: list[Future[Any]] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._results.get(timeout=timeout))
            while len(found) < BATCH:
                found.append(self._results.get_nowait())
        return found

    def _fetched(self, futures: list[Future[Any]]) -> list[list[UnitResult]]:
        """The receipts of each; none when some worker that had one is gone."""
        if not futures:
            return []
        loop: Any = self._client.loop
        asking = asyncio.run_coroutine_threadsafe(self._client.gather(futures, asynchronous=True), loop.asyncio_loop)
        try:
            return list(asking.result(GATHER))
        except Exception:  # noqa: BLE001  (whatever is wrong with one of them is told when it is done anew)
            asking.cancel()
            return []

    def _erred(self, future: Future[Any]) -> None:
        """A work that raised by itself has failed; those whose workers died are done in processes of their own."""
        units, error = self._landed(future), future.exception(timeout=10 * GATHER)
        died, names = isinstance(error, KilledWorker), {unit.name for unit in units}
        if len(units) > 1 or (died and not names & self._suspects):
            self._suspects |= names if died else set()
            self._send(perform_alone if died else perform, bundled(units, 1))
            return
        if died:
            error = ClusterError(f"{named(units[0])}: every worker that tried it died; out of memory?")
        self._inbox.append(failure(units[0], error))

    def close(self, *, cancel: bool = False) -> None:
        """Drop what has not begun when cancelling; end the processes this executor started."""
        if cancel and self._flying and self._client.status == "running":
            self._client.cancel(list(self._flying), force=True)
        if self._owned:
            self._client.close()
        if self._cluster is not None:
            self._cluster.close(timeout=20)


def dashboard_of(client: Client) -> str:
    """Where the scheduler shows what goes on; empty where it does not."""
    with contextlib.suppress(KeyError):
        return store.redact(client.dashboard_link or "")
    return ""


def workers_of(client: Client) -> dict[str, WorkerFacts]:
    """The workers that are there now, by address."""
    scheduler: Any = client.scheduler
    found = client.sync(scheduler.identity)["workers"]
    return {name: WorkerFacts(facts["nthreads"], dict(facts.get("resources") or {})) for name, facts in found.items()}


def connect(address: str, timeout: float = 10.0, *, tls: Tls | None = None) -> DaskExecutor:
    """The cluster at ``address``: tcp://host:port; with ``tls``, tls://host:port.

    ClusterError when nobody answers within ``timeout`` seconds; as long again is waited for its first worker.
    """
    client = client_of(address, timeout, tls=tls)
    with contextlib.suppress(TimeoutError):
        client.wait_for_workers(1, timeout=timeout)
    return over(client)


def client_of(cluster: Client | str, timeout: float = 10.0, *, tls: Tls | None = None) -> Client:
    """A client of the scheduler at an address; a client is given back. ClusterError when nobody answers."""
    if not isinstance(cluster, str):
        return cluster
    try:
        kept = {"distributed.admin.low-level-log-length": SAID}
        with dask.config.set({"distributed.comm.timeouts.connect": timeout, **kept}):
            return Client(cluster, timeout=timeout, set_as_default=False, security=_security(cluster, tls))
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {cluster}: {_look_at(cluster)}") from error


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


def over(client: Client, cluster: LocalCluster | None = None) -> DaskExecutor:
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
