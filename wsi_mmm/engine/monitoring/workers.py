"""Metrics of the workers of a cluster: counters beside those that distributed serves at a worker's ``/metrics``."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from wsi_mmm.engine.units import UnitResult

if TYPE_CHECKING:
    from wsi_mmm.engine.monitoring.metrics import MetricsRecorder

_lock = threading.Lock()
_recorders: list[MetricsRecorder] = []


def count_here(result: UnitResult) -> None:
    """Count a unit in the metrics of this worker; does nothing, and loads nothing, where none are served."""
    if "prometheus_client" not in sys.modules or "distributed.worker" not in sys.modules:
        return
    with _lock:
        if not _recorders:
            from wsi_mmm.engine.monitoring.metrics import process_recorder

            _recorders.append(process_recorder())
        _recorders[0].receive(result)
