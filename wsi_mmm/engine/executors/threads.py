"""The executor of one process: a thread for each unit under way, no scheduler process.

The steps of forward units wait for their turn, so that fetching and decoding block n + 1, the network on block n and
writing block n - 1 overlap, and no kind of step has more threads than it can use.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import context
from wsi_mmm.engine.stages.perform import perform
from wsi_mmm.engine.stages.prefetch import UnitPrefetch
from wsi_mmm.engine.units import Capabilities, Kind, PlanResult, UnitResult, WorkUnit, failure_of
from wsi_mmm.errors import Cancelled, WsiError
from wsi_mmm.storage import store
from wsi_mmm.storage.retry import retry_unit
from wsi_mmm.timing import STAGE_OF_STEP, Step

READERS, FINISHERS = 2, 2  # units that are read at once; units that are planned, interpreted or written at once
MODELS = 3  # units inside the Runner at once: it fills its batches with tiles of all of them
FORWARDS, OTHERS = READERS + MODELS + 1, FINISHERS + 1  # units under way: bounded by what memory should hold


class ThreadsExecutor:
    """Runs units in threads of this process, beside the Runner's own model threads."""

    def __init__(self, recipe: Recipe) -> None:
        self.capabilities = Capabilities()
        self._turns = dict.fromkeys(STAGE_OF_STEP, threading.Semaphore(FINISHERS))
        self._turns |= {"read": threading.Semaphore(READERS), "model": threading.Semaphore(MODELS)}
        self._threads = ThreadPoolExecutor(FORWARDS + OTHERS, "wsi-mmm-unit")
        self._results: queue.SimpleQueue[UnitResult] = queue.SimpleQueue()
        self._running: Counter[Kind] = Counter()
        self._stopped = threading.Event()
        self._prefetch = UnitPrefetch()
        self._recipe: Recipe | None = recipe

    def room(self, kind: Kind) -> int:
        """Free places: forwards are bounded by what memory should hold, the rest by the finishers."""
        forwards = self._running["forward"]
        return FORWARDS - forwards if kind == "forward" else OTHERS + forwards - self._running.total()

    def start(self, unit: WorkUnit) -> None:
        """Begin a unit; returns at once."""
        self._running[unit.kind] += 1
        # The model loads while the tissue of the first slide is found; slides that seem to be done need none.
        if self._recipe is not None and not _has_results(unit):
            recipe, self._recipe = self._recipe, None
            self._threads.submit(_load_model, recipe)
        self._prefetch.start_unit(unit)
        self._threads.submit(self._run_unit, unit)

    def _run_unit(self, unit: WorkUnit) -> None:
        step = partial(perform, fetches=self._prefetch.fetches, turn=self._wait_turn)
        try:
            result: UnitResult = retry_unit(step, unit, stopped=self._stopped)
            if isinstance(result, PlanResult) and result.plan is not None:
                self._prefetch.add_plan(result.plan)
        except BaseException as error:  # noqa: BLE001  (a unit that raises is a Failure: no thread ends unseen)
            self._prefetch.drop_slide(unit.slide.id)
            result = failure_of(unit, error)
        self._results.put(result)

    @contextmanager
    def _wait_turn(self, step: Step) -> Iterator[None]:
        """Wait until one more thread may do this step; Cancelled once the executor is closed."""
        with self._turns[step]:
            if self._stopped.is_set():
                raise Cancelled("the executor is closed")
            yield

    def wait(self, timeout: float) -> UnitResult | None:
        """The next result, or None after ``timeout`` seconds."""
        try:
            result = self._results.get(timeout=timeout)
        except queue.Empty:
            return None
        self._running[result.facts.kind] -= 1
        return result

    def close(self, *, cancel: bool = False) -> None:
        """End the threads once the steps that run now have ended; close open slides."""
        self._stopped.set()
        self._prefetch.close()
        self._threads.shutdown(wait=True, cancel_futures=cancel)
        context.release(models=False)


def _has_results(unit: WorkUnit) -> bool:
    done = store.join(unit.slide.output, "slide.json")
    return unit.kind == "plan" and store.is_local(done) and store.exists(done)


def _load_model(recipe: Recipe) -> None:
    with suppress(WsiError):  # a model that does not load fails the first unit that needs it
        context.load_runner(recipe)
