"""Many real Dask workers in one process, with units that only take time: `bench_scale` starts this.

    python tests/benchmarks/scale_workers.py ADDRESS COUNT [--speed 20]

What such a process spends on itself is not measured, so what workers do for their own sake is turned down: profiles and
system monitors, which 100 workers in one process would pay for 100 times.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from contextlib import AsyncExitStack

import dask
from distributed import Worker

from benchmarks.scale_units import Fake, durations
from wsi_mmm.engine.stages import perform

QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.interval": "60s",
    "distributed.worker.http.routes": [],
}


async def serve(address: str, count: int, folder: str) -> None:
    """Until the scheduler is gone."""
    async with AsyncExitStack() as stack:
        workers = []
        for number in range(count):
            worker = Worker(
                address, nthreads=1, name=f"fake-{os.getpid()}-{number}", memory_limit=0, dashboard=False,
                local_directory=folder, host="127.0.0.1",
            )  # fmt: skip
            workers.append(await stack.enter_async_context(worker))
        print("fake workers are there", flush=True)
        await asyncio.gather(*(worker.finished() for worker in workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("count", type=int)
    parser.add_argument("--speed", type=float, default=1.0)
    given = parser.parse_args()
    perform.perform = Fake(durations(given.speed)).perform
    with dask.config.set(QUIET), tempfile.TemporaryDirectory() as folder:
        asyncio.run(serve(given.address, given.count, folder))


if __name__ == "__main__":
    main()
