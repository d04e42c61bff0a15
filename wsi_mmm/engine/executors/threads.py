"""The serial executor: one process, a few threads, no scheduler. It is the specification and the debugger.

A forward work passes three pools (read, model, finish), so that fetching and decoding block n + 1, the network on
block n and writing block n - 1 overlap; plan, interpret and publish run in the finish pool.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import context, steps
from wsi_mmm.engine.units import Kind, UnitResult, WorkUnit
from wsi_mmm.errors import WsiError
from wsi_mmm.storage.retry import retry_unit


class ThreadsExecutor:
    """Works run here and now, by two readers, the Runner's own model threads, and two finishers."""

    def __init__(self, recipe: Recipe, *, readers: int = 2, finishers: int = 2) -> None:
        self.models = 3  # units inside the Runner at once: it fills up its micro-batches from one with another
        self._reading = ThreadPoolExecutor(max(1, readers), "read")
        self._computing = ThreadPoolExecutor(self.models, "model")
        self._finishing = ThreadPoolExecutor(max(1, finishers), "finish")
        self._results: queue.SimpleQueue[UnitResult] = queue.SimpleQueue()
        self._flying: dict[str, int] = {"forward": 0, "other": 0}
        self._limits = {"forward": self.models + max(1, readers) + 1, "other": max(1, finishers) + 1}
        self._stopped = threading.Event()
        self._recipe: Recipe | None = recipe

    def room(self, kind: Kind) -> int:
        """Free places: forwards are bounded by what memory should hold, the rest by the finishers."""
        name = "forward" if kind == "forward" else "other"
        return self._limits[name] - self._flying[name]

    def start(self, unit: WorkUnit) -> None:
        """Send a work on its way through the pools."""
        self._flying["forward" if unit.kind == "forward" else "other"] += 1
        self._load()
        if unit.kind == "forward":
            stations = [(self._reading, steps.read), (self._computing, steps.compute), (self._finishing, steps.write)]
            self._chain(unit, unit, stations)
        else:
            self._chain(unit, unit, [(self._finishing, steps.perform)])

    def _load(self) -> None:
        """Load the model, which takes as long as finding the tissue of the first slide: do both at once."""
        if self._recipe is not None:
            recipe, self._recipe = self._recipe, None
            self._computing.submit(_quietly, context.runner_of, recipe)

    def _chain(self, unit: WorkUnit, value: Any, stations: list[tuple[ThreadPoolExecutor, Any]]) -> None:
        (pool, step), rest = stations[0], stations[1:]

        def station() -> None:
            if self._stopped.is_set():
                return
            try:
                result = retry_unit(step, value, stopped=self._stopped)
            except BaseException as error:  # noqa: BLE001  (a failed work is a receipt: no thread ends unseen)
                self._results.put(failure(unit, error))
                return
            if rest:
                self._chain(unit, result, rest)
            else:
                self._results.put(result)

        if not self._stopped.is_set():
            pool.submit(station)

    def wait(self, timeout: float) -> UnitResult | None:
        """The next receipt, or None after ``timeout`` seconds."""
        try:
            result = self._results.get(timeout=timeout)
        except queue.Empty:
            return None
        self._flying["forward" if result.kind == "forward" else "other"] -= 1
        return result

    def close(self, *, cancel: bool = False) -> None:
        """End the pools; what runs now is let to its end."""
        self._stopped.set()
        for pool in (self._reading, self._computing, self._finishing):
            pool.shutdown(wait=True, cancel_futures=cancel)
        context.release(models=False)


def failure(unit: WorkUnit, error: BaseException) -> UnitResult:
    """The receipt of a work that raised. Our own errors speak for themselves; others bring their traceback."""
    known = isinstance(error, WsiError)
    text = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
    detail = "" if known else "".join(traceback.format_exception(error))
    return UnitResult(unit.kind, unit.slide.id, unit.block, "failed", text, pid=os.getpid(), payload=detail)


def _quietly(call: Any, *arguments: Any) -> None:
    # A model that does not load is told by the first work that needs it.
    try:
        call(*arguments)
    except WsiError:
        return
