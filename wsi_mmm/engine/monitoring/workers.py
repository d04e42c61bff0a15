"""Metrics of the workers of a cluster: counters that join those which distributed serves at a worker's ``/metrics``."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from wsi_mmm.engine.units import Receipt

if TYPE_CHECKING:
    from wsi_mmm.engine.monitoring.metrics import Book

_lock = threading.Lock()
_books: list[Book] = []


def count_here(receipt: Receipt) -> None:
    """On a worker that serves metrics: count a unit among them. Elsewhere this does nothing, and loads nothing."""
    if "prometheus_client" not in sys.modules or "distributed.worker" not in sys.modules:
        return
    with _lock:
        if not _books:
            from wsi_mmm.engine.monitoring.metrics import process_book

            _books.append(process_book())
        _books[0].receive(receipt)
