"""The executor of one process: a few threads, no scheduler process.

A forward unit passes three pools (read, model, finish), so that fetching and decoding block n + 1, the network on
block n and writing block n - 1 overlap; plan, interpret and publish run in the finish pool.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import context, forward
from wsi_mmm.engine.stages.context import UnitContext
from wsi_mmm.engine.stages.perform import perform
from wsi_mmm.engine.stages.prefetch import UnitPrefetch
from wsi_mmm.engine.units import Capabilities, Kind, PlanResult, UnitResult, WorkUnit, failure_of
from wsi_mmm.errors import WsiError
from wsi_mmm.storage.retry import retry_unit
from wsi_mmm.types import Batch

T = TypeVar("T")


class ThreadsExecutor:
    """Runs units in this process: two readers, the Runner's own model threads, and two finishers."""

    def __init__(self, recipe: Recipe, *, readers: int = 2, finishers: int = 2) -> None:
        self.capabilities = Capabilities()
        models = 3  # units inside the Runner at once: it fills its micro-batches with tiles of all of them
        self._readers = ThreadPoolExecutor(max(1, readers), "read")
        self._models = ThreadPoolExecutor(models, "model")
        self._finishers = ThreadPoolExecutor(max(1, finishers), "finish")
        self._results: queue.SimpleQueue[UnitResult] = queue.SimpleQueue()
        self._running: dict[str, int] = {"forward": 0, "other": 0}
        self._limits = {"forward": models + max(1, readers) + 1, "other": max(1, finishers) + 1}
        self._stopped = threading.Event()
        self._prefetch = UnitPrefetch()
        self._recipe: Recipe | None = recipe

    def room(self, kind: Kind) -> int:
        """Free places: forwards are bounded by what memory should hold, the rest by the finishers."""
        name = "forward" if kind == "forward" else "other"
        return self._limits[name] - self._running[name]

    def start(self, unit: WorkUnit) -> None:
        """Begin a unit; returns at once."""
        self._running["forward" if unit.kind == "forward" else "other"] += 1
        if self._recipe is not None:  # the model loads while the tissue of the first slide is found
            recipe, self._recipe = self._recipe, None
            self._models.submit(_load_model, recipe)
        self._prefetch.start_unit(unit)
        if unit.kind == "forward":
            self._start_forward(UnitContext(unit, self._prefetch.fetches))
        else:
            self._submit_step(self._finishers, unit, lambda: self._run_unit(unit))

    def _run_unit(self, unit: WorkUnit) -> None:
        result = self._retry_step(lambda: perform(unit))
        if isinstance(result, PlanResult) and result.plan is not None:
            self._prefetch.add_plan(result.plan)
        self._results.put(result)

    def _start_forward(self, ctx: UnitContext) -> None:
        """Read, compute and write a block, each step in its own pool; the context is closed by the last one."""

        def read() -> None:
            batch = self._retry_step(lambda: forward.read_tiles(ctx))
            if batch is None:
                finish(partial(forward.cached_result, ctx))
            else:
                self._submit_step(self._models, ctx.unit, partial(compute, batch), ctx)

        def compute(batch: Batch) -> None:
            output = self._retry_step(lambda: forward.compute(ctx, batch))
            self._submit_step(
                self._finishers, ctx.unit, lambda: finish(lambda: forward.write_values(ctx, batch, output)), ctx
            )

        def finish(step: Callable[[], UnitResult]) -> None:
            result = self._retry_step(step)
            ctx.close()
            self._results.put(result)

        self._submit_step(self._readers, ctx.unit, read, ctx)

    def _submit_step(
        self, pool: ThreadPoolExecutor, unit: WorkUnit, step: Callable[[], None], ctx: UnitContext | None = None
    ) -> None:
        """Run ``step`` in ``pool``; when it raises, the unit's result is a Failure."""

        def guarded() -> None:
            if self._stopped.is_set():
                return
            try:
                step()
            except BaseException as error:  # noqa: BLE001  (a unit that raises is a Failure: no thread ends unseen)
                if ctx is not None:
                    ctx.close()
                self._prefetch.drop_slide(unit.slide.id)
                self._results.put(failure_of(unit, error))

        if not self._stopped.is_set():
            pool.submit(guarded)

    def _retry_step(self, step: Callable[[], T]) -> T:
        """The value of a step, which is tried again while storage is away."""
        return retry_unit(lambda _: step(), None, stopped=self._stopped)

    def wait(self, timeout: float) -> UnitResult | None:
        """The next result, or None after ``timeout`` seconds."""
        try:
            result = self._results.get(timeout=timeout)
        except queue.Empty:
            return None
        self._running["forward" if result.facts.kind == "forward" else "other"] -= 1
        return result

    def close(self, *, cancel: bool = False) -> None:
        """End the pools once the steps that run now have ended; close open slides."""
        self._stopped.set()
        self._prefetch.close()
        for pool in (self._readers, self._models, self._finishers):
            pool.shutdown(wait=True, cancel_futures=cancel)
        context.release(models=False)


def _load_model(recipe: Recipe) -> None:
    with suppress(WsiError):  # a model that does not load fails the first unit that needs it
        context.load_runner(recipe)
