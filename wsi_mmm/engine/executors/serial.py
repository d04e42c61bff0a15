"""The serial executor: one thread, one unit at a time, run where it is started.

It is the specification that every other executor is tested against, and the debugger: a breakpoint in any stage stops
the caller's own thread.

    from wsi_mmm import api
    from wsi_mmm.engine.executors.serial import SerialExecutor
    from wsi_mmm.engine.run import run_slides

    run_slides(api.run_request("slide.svs", output="out"), SerialExecutor(), print)
"""

from __future__ import annotations

from wsi_mmm.engine.stages import context
from wsi_mmm.engine.stages.perform import perform
from wsi_mmm.engine.units import Capabilities, Kind, UnitResult, WorkUnit, failure_of


class SerialExecutor:
    """Runs each unit in ``start``, and gives its result to the next ``wait``."""

    def __init__(self) -> None:
        self.capabilities = Capabilities()
        self._result: UnitResult | None = None

    def room(self, kind: Kind) -> int:
        """One unit, when the result of the last one has been taken."""
        return 1 if self._result is None else 0

    def start(self, unit: WorkUnit) -> None:
        """Run a unit to its end."""
        try:
            self._result = perform(unit)
        except Exception as error:  # noqa: BLE001  (a unit that raises is a Failure; Ctrl-C and pdb's quit are not)
            self._result = failure_of(unit, error)

    def wait(self, timeout: float) -> UnitResult | None:
        """The result of the unit that was started last; None when there is none."""
        result, self._result = self._result, None
        return result

    def close(self, *, cancel: bool = False) -> None:
        """Close open slides."""
        context.release(models=False)
