"""Metrics of the workers of a cluster: counters that join those which distributed serves at a worker's ``/metrics``."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from wsi_mmm.engine.units import UnitResult

if TYPE_CHECKING:
    from wsi_mmm.engine.monitoring.metrics import MetricsRecorder

_lock = threading.Lock()
_books: list[MetricsRecorder] = []


def count_here(result: UnitResult) -> None:
    """On a worker that serves metrics: count a unit among them. Elsewhere this does nothing, and loads nothing."""
    if "prometheus_client" not in sys.modules or "distributed.worker" not in sys.modules:
        return
    with _lock:
        if not _books:
            from wsi_mmm.engine.monitoring.metrics import process_recorder

            _books.append(process_recorder())
        _books[0].receive(result)
