"""The Dask executor: units run on worker processes, here or on a cluster.

Only units and results travel (see ``wire``); workers open slides and models themselves, with the credentials of their
own environment. Workers run `perform`, the function of the serial executor, so both give the same files.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import itertools
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import dask
from distributed import Client, Future, LocalCluster, Security, get_worker
from distributed.scheduler import KilledWorker
from distributed.utils import sync

from wsi_mmm import timing
from wsi_mmm._version import __version__
from wsi_mmm.engine.events import Listener
from wsi_mmm.engine.executors import isolated, wire
from wsi_mmm.engine.executors.bundles import (
    LABEL_RESOURCE,
    MODELS,
    POOLS,
    PRIORITY_OF_KIND,
    READERS,
    Pool,
    UnitPace,
    WorkerFacts,
    make_bundles,
    pool_of,
    workers_with,
)
from wsi_mmm.engine.executors.isolated import describe_unit
from wsi_mmm.engine.executors.job_registry import JobRegistry, JobStatus, LiveJobs, new_job_id, publishing_status
from wsi_mmm.engine.executors.tls import Tls
from wsi_mmm.engine.executors.wire import SentResult
from wsi_mmm.engine.job import JobProgress
from wsi_mmm.engine.monitoring.metrics import count_here
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import perform
from wsi_mmm.engine.stages.prefetch import UnitPrefetch
from wsi_mmm.engine.units import Capabilities, Kind, UnitResult, WorkUnit, failure_of
from wsi_mmm.errors import ClusterError, WsiError
from wsi_mmm.storage import store
from wsi_mmm.storage.retry import retry_unit

AHEAD = 2  # units waiting at each worker thread, so that none waits for the client
CHECK_EVERY = 2.0  # seconds between looks at which workers and which other jobs there are: they come and go
NO_WORKER_SECONDS = 300.0  # seconds that a cluster may be without any worker in the middle of a run
GATHER_SECONDS = 5.0  # seconds to wait for results that are ready
GATHER_COUNT = 512  # results fetched at once
LOG_LENGTH = 20  # messages that a client keeps for debugging; Dask's 1,000 are 50 MB of units

RECIPES = "wsi-mmm-recipes"  # where the scheduler keeps them, by key


SentFuture = Future[list[SentResult]]


def run_bundle(bundle: bytes, *, isolate: bool = False) -> list[SentResult]:
    """Run units on a worker; ``bundle``: a unit a line. Our errors become Failures; on others Dask tries once more.

    With ``isolate`` each unit runs in a process of its own: when that dies the worker lives, and the unit is a Failure.
    """
    units = [wire.unpack_unit(line, _recipe_from_scheduler) for line in bundle.split(b"\n")]
    if isolate:
        return [_pack_result(isolated.perform, unit) for unit in units]
    with contextlib.closing(UnitPrefetch()) as prefetch:
        prefetch.announce_bundle(units)
        step = partial(perform.perform, fetches=prefetch.fetches)
        return [_pack_result(partial(retry_unit, step), unit) for unit in units]


def _pack_result(step: Callable[[WorkUnit], UnitResult], unit: WorkUnit) -> SentResult:
    try:
        result = step(unit)
    except WsiError as error:
        return failure_of(unit, error)
    count_here(result)
    return wire.pack_result(result)


def _recipe_from_scheduler(key: str) -> str | None:
    worker = get_worker()
    found = sync(worker.loop, worker.scheduler.get_metadata, keys=[RECIPES, key], default=None)
    return None if found is None else str(found)


class DaskExecutor:
    """Runs units on the workers of ``client``. Several such jobs share a cluster evenly.

    ``jobs``: gives how many there are now, this one included. None: this one announces itself to the others while it
    runs; on a ``cluster`` of its own it need not.
    """

    def __init__(
        self,
        client: Client,
        *,
        cluster: LocalCluster | None = None,
        owned: bool = False,
        jobs: Callable[[], int] | None = None,
    ) -> None:
        self._client = client
        self._jobs = jobs or (lambda: 1)
        self._cluster, self._owned = cluster, owned
        self._token, self._number = uuid.uuid4().hex[:8], itertools.count()
        self._results: queue.SimpleQueue[SentFuture] = queue.SimpleQueue()
        self._outbox: dict[Kind, list[WorkUnit]] = {}
        self._inbox: deque[UnitResult] = deque()
        self._flying: dict[SentFuture, list[WorkUnit]] = {}
        self._pace = UnitPace()
        self._suspects: set[str] = set()
        self._taken = dict.fromkeys(POOLS, 0)
        self._keys: dict[int, tuple[Recipe, str]] = {}
        self._looked = self._alive = time.monotonic()
        self._workers = workers_of(client)
        self._unfit = self._find_unfit(self._workers)
        warnings = tuple(f"worker {name} cannot be used: {reason}" for name, reason in sorted(self._unfit.items()))
        alone, dashboard = jobs is not None or cluster is not None, ""
        with contextlib.suppress(KeyError):  # raised where there is none
            dashboard = store.redact(client.dashboard_link or "")
        self.capabilities = Capabilities(True, dashboard, warnings, None if alone else self._announce_run)
        self._places = self._count_places()
        if not self._workers:
            raise ClusterError("the scheduler has no workers: start some with 'dask worker ADDRESS'")
        if not self._places["rest"]:
            wanted = f"install wsi-mmm {__version__} and its dependencies on the workers"
            raise ClusterError(f"no worker can run models: {warnings[0]}; {wanted}")

    @contextlib.contextmanager
    def _announce_run(self, output: str, slides: int, stop: threading.Event) -> Iterator[Listener]:
        """Publish this run on the cluster: other jobs see it, share the workers with it, and may stop it."""
        registry, progress = JobRegistry(self._client), JobProgress()
        status = JobStatus(new_job_id(), store.redact(output), slides_total=slides, where=timing.worker_name())
        self._jobs = LiveJobs(registry, status.id)
        with publishing_status(registry, status, progress, stop):
            yield progress.hear

    def _find_unfit(self, workers: Iterable[str]) -> dict[str, str]:
        """The workers among these that cannot run units, with the reason."""
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

    def _count_places(self) -> dict[Pool, int]:
        """Places of each pool: enough to keep this job's share of the worker threads fed, and no more."""
        fit = {name: facts for name, facts in self._workers.items() if name not in self._unfit}
        models = workers_with(fit.values(), MODELS)
        readers = workers_with(fit.values(), READERS)
        self._needs = {
            "model": {MODELS: LABEL_RESOURCE} if models else None,
            "read": {READERS: LABEL_RESOURCE} if readers else None,
        }
        chosen = {"model": models or fit.values(), "read": readers or fit.values(), "rest": fit.values()}
        threads = {pool: sum(worker.threads for worker in chosen[pool]) for pool in POOLS}
        jobs = max(1, self._jobs())
        return {pool: -(-AHEAD * threads[pool] // jobs) for pool in POOLS}

    def _check_workers(self) -> None:
        """Every now and then: count workers and jobs anew. ClusterError when there has been no worker for long."""
        now = time.monotonic()
        if now - self._looked < CHECK_EVERY:
            return
        self._looked = now
        with contextlib.suppress(OSError, TimeoutError):  # a scheduler that is busy, a worker that just died: next time
            self._update_workers()
        if self._places["model"]:
            self._alive = now
        elif now - self._alive > NO_WORKER_SECONDS:
            raise ClusterError(
                f"no worker has been there for {NO_WORKER_SECONDS:.0f} s; start some, then run again to resume"
            )

    def _update_workers(self) -> None:
        found = workers_of(self._client)
        new = found.keys() - self._workers.keys()
        unfit = {name: why for name, why in self._unfit.items() if name in found}
        unfit |= self._find_unfit(new) if new else {}
        self._workers, self._unfit = found, unfit
        self._places = self._count_places()

    def room(self, kind: Kind) -> int:
        """Free places for units of a kind: bounded, however much there is to do."""
        pool, size = pool_of(kind), self._pace.size
        waiting = sum(len(units) / size(one) for one, units in self._outbox.items() if pool_of(one) == pool)
        return int((max(1, self._places[pool]) - self._taken[pool] - waiting) * size(kind))

    def start(self, unit: WorkUnit) -> None:
        """Begin a unit: the next ``wait`` sends it."""
        self._outbox.setdefault(unit.kind, []).append(unit)

    def wait(self, timeout: float) -> UnitResult | None:
        """The next result, or None after ``timeout`` seconds; ClusterError when the scheduler is gone."""
        if not self._inbox:
            for kind in list(self._outbox):
                self._send_bundles(make_bundles(self._outbox.pop(kind), self._pace.size(kind)))
            self._collect_results(timeout)
        return self._inbox.popleft() if self._inbox else None

    # ------------------------------------------------------------ to the scheduler

    def _send_bundles(self, bundles: list[list[WorkUnit]], *, isolate: bool = False) -> None:
        """Send units of one kind in one message; a worker that dies is replaced, and its units are run again."""
        kind = bundles[0][0].kind
        futures = self._client.map(
            partial(run_bundle, isolate=True) if isolate else run_bundle,
            [
                b"\n".join(wire.pack_unit(unit, self._recipe_key(unit.slide.recipe)) for unit in units)
                for units in bundles
            ],
            # Keys begin with a few names, whatever the number of slides: Dask never forgets such a prefix.
            key=[
                (kind, f"{unit.slide.id} {unit.block[0]}-{unit.block[1]}", f"{self._token}-{next(self._number)}")
                for unit, *_ in bundles
            ],
            pure=False,
            retries=1,
            workers=sorted(self._workers.keys() - self._unfit.keys()) if self._unfit else None,  # None: all of them
            resources=self._needs.get(pool_of(kind)),
            priority=PRIORITY_OF_KIND[kind],
        )
        self._taken[pool_of(kind)] += len(bundles)
        for future, units in zip(futures, bundles, strict=True):
            self._flying[future] = units
            future.add_done_callback(self._results.put)

    def _take_back(self, future: SentFuture) -> list[WorkUnit]:
        """The units of a bundle that has ended."""
        units = self._flying.pop(future)
        self._taken[pool_of(units[0].kind)] -= 1
        return units

    def _recipe_key(self, recipe: Recipe) -> str:
        """The key of a recipe; the scheduler keeps the recipe from now on."""
        if id(recipe) not in self._keys:
            text = wire.recipe_json(recipe)
            self._keys[id(recipe)] = recipe, wire.recipe_key(text)
            self._client.set_metadata([RECIPES, wire.recipe_key(text)], text)
        return self._keys[id(recipe)][1]

    # ------------------------------------------------------------ and back

    def _collect_results(self, timeout: float) -> None:
        """Fetch the results that are ready, all at once."""
        done = self._done_futures(timeout)
        if self._client.status not in ("running", "connecting") or any(one.cancelled() for one in done):
            raise ClusterError("the connection to the scheduler was lost; run again to resume")
        if self._client.status == "running":
            self._check_workers()
        good = [future for future in done if future.status == "finished"]
        for future, results in zip(good, self._gather_results(good), strict=False):
            for result, unit in zip(results, self._take_back(future), strict=True):
                whole = wire.unpack_result(result, unit.slide)
                self._pace.learn(whole)
                self._inbox.append(whole)
        for future in done:
            if future.status == "error":
                self._handle_error(future)
            elif future in self._flying:  # the worker that had the result died: the units run again
                future.add_done_callback(self._results.put)
                continue
            future.release()

    def _done_futures(self, timeout: float) -> list[SentFuture]:
        found: list[SentFuture] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._results.get(timeout=timeout))
            while len(found) < GATHER_COUNT:
                found.append(self._results.get_nowait())
        return found

    def _gather_results(self, futures: list[SentFuture]) -> list[list[SentResult]]:
        """The results of each; none when some worker that had one is gone."""
        if not futures:
            return []
        loop: Any = self._client.loop
        asking = asyncio.run_coroutine_threadsafe(self._client.gather(futures, asynchronous=True), loop.asyncio_loop)
        try:
            return list(asking.result(GATHER_SECONDS))
        except Exception:  # noqa: BLE001  (the fault of one of them shows when it is run again)
            asking.cancel()
            return []

    def _handle_error(self, future: SentFuture) -> None:
        """A unit that raised has failed; units whose worker died are run again, each in a process of its own."""
        units, error = self._take_back(future), future.exception(timeout=10 * GATHER_SECONDS)
        died, names = isinstance(error, KilledWorker), {unit.name for unit in units}
        if len(units) > 1 or (died and not names & self._suspects):
            self._suspects |= names if died else set()
            self._send_bundles(make_bundles(units, 1), isolate=died)
            return
        if died:
            error = ClusterError(f"{describe_unit(units[0])}: every worker that tried it died; out of memory?")
        self._inbox.append(failure_of(units[0], error))

    def close(self, *, cancel: bool = False) -> None:
        """Drop what has not begun when cancelling; end the processes this executor started."""
        if cancel and self._flying and self._client.status == "running":
            self._client.cancel(list(self._flying), force=True)
        if self._owned:
            self._client.close()
        if self._cluster is not None:
            self._cluster.close(timeout=20)


def workers_of(client: Client) -> dict[str, WorkerFacts]:
    """The present workers, by address."""
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
    return own_executor(client)


def client_of(cluster: Client | str, timeout: float = 10.0, *, tls: Tls | None = None) -> Client:
    """A client of the scheduler at an address; a client is given back. ClusterError when nobody answers."""
    if not isinstance(cluster, str):
        return cluster
    try:
        kept = {"distributed.admin.low-level-log-length": LOG_LENGTH}
        with dask.config.set({"distributed.comm.timeouts.connect": timeout, **kept}):
            return Client(cluster, timeout=timeout, set_as_default=False, security=_make_security(cluster, tls))
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {cluster}: {_connection_hint(cluster)}") from error


def _make_security(address: str, tls: Tls | None) -> Security | None:
    """None leaves it to Dask's own configuration, such as DASK_DISTRIBUTED__COMM__TLS__CA_FILE."""
    if tls is None:
        if address.startswith("tls://") and Security().get_connection_args("client")["ssl_context"] is None:
            raise ClusterError(
                f"no Dask scheduler answers at {address} without certificates: give their folder with --tls "
                "(environment: WSI_MMM_TLS)"
            )
        return None
    return Security(
        tls_ca_file=tls.ca, tls_client_cert=tls.certificate, tls_client_key=tls.key, require_encryption=True
    )


_TLS = "--tls (environment: WSI_MMM_TLS)"


def _connection_hint(address: str) -> str:
    """What to check when a scheduler does not answer."""
    if not address.startswith("tls://"):
        return f"is it running, is the port open? One that speaks TLS has an address of tls://, and wants {_TLS}"
    return f"is it running, is the port open, did one authority sign its certificate and that of {_TLS}?"


def own_executor(client: Client, cluster: LocalCluster | None = None) -> DaskExecutor:
    """An executor that owns ``client``; when it cannot be had, nothing is left open."""
    try:
        return DaskExecutor(client, cluster=cluster, owned=True)
    except BaseException:
        client.close()
        if cluster is not None:
            cluster.close(timeout=20)
        raise
