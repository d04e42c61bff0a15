"""Dask workers on this machine: processes of the run's own, which end with it."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Sequence
from typing import Any

from distributed import Client, LocalCluster

from wsi_mmm.engine.executors.dask import DaskExecutor, own_executor
from wsi_mmm.errors import ClusterError
from wsi_mmm.host_tuning import cpu_count

MAIN_GUARD = "in a script, call it below: if __name__ == '__main__':"


class _GpuCluster(LocalCluster):
    """Each worker process sees one GPU only, those of ``gpus`` in turn; one that is started anew sees the same."""

    def __init__(self, gpus: Sequence[str], **options: Any) -> None:
        self._turn = itertools.cycle(gpus)
        super().__init__(n_workers=0, **options)

    def new_worker_spec(self) -> dict[Any, dict[str, Any]]:
        """As Dask's own, with a GPU in its environment."""
        return {
            name: {**spec, "options": {**spec["options"], "env": {"CUDA_VISIBLE_DEVICES": next(self._turn)}}}
            for name, spec in super().new_worker_spec().items()
        }


def local_cluster(workers: int, gpus: Sequence[str] = ()) -> DaskExecutor:
    """``workers`` processes on this machine, each with threads enough to read beside the model.

    ``gpus``: as CUDA_VISIBLE_DEVICES names them; where there are several, each worker takes one of them.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ClusterError(f"a worker process has run the script that starts workers; {MAIN_GUARD}")
    # Workers are started by us and talk on loopback. There is no dashboard; what Dask serves in its place takes a port
    # that is free, as several runs may be under way.
    options: dict[str, Any] = {
        "threads_per_worker": max(2, cpu_count() // workers), "processes": True, "dashboard_address": None,
        "host": "127.0.0.1", "silence_logs": 50, "preload": ["wsi_mmm.host_tuning"],
        "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"},
    }  # fmt: skip
    try:
        # Without workers at first, so that there is something to close when the user stops while they start.
        cluster = _GpuCluster(gpus, **options) if len(gpus) > 1 else LocalCluster(n_workers=0, **options)
        client = None
        try:
            client = Client(cluster, set_as_default=False)
            cluster.scale(workers)
            client.wait_for_workers(workers, timeout=60)
        except BaseException:
            _abandon_cluster(cluster, client)
            raise
    except (OSError, RuntimeError, TimeoutError) as error:
        raise ClusterError(f"the {workers} worker processes did not start ({error}); {MAIN_GUARD}") from error
    return own_executor(client, cluster)


def _abandon_cluster(cluster: LocalCluster, client: Client | None) -> None:
    """Close a cluster whose workers may be starting. Dask trips over these, and once more as Python ends; the worker
    processes end with this one, whatever comes."""
    for one in (client, cluster):
        with contextlib.suppress(Exception):
            if one is not None:
                one.close(timeout=5)
    cluster.shutdown_on_close = False
