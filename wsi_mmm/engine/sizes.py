"""Largest slides first, where many workers share them: a big one that comes last would leave the others idle.

How much work a slide is shows in its plan alone, which is not made yet; the size of its file is known and goes with it.
Results do not depend on the order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from wsi_mmm.engine.units import Executor, SlideTask
from wsi_mmm.errors import WsiError
from wsi_mmm.storage import store

LISTED = 3  # slides of one place in a bucket from which on it is listed


def largest_first(tasks: list[SlideTask], executor: Executor) -> list[SlideTask]:
    """The order to work through slides: as given in one process; on many workers the largest first."""
    if len(tasks) < 2 or getattr(executor, "client", None) is None:
        return tasks
    sizes = sizes_of(task.uri for task in tasks)
    return sorted(tasks, key=lambda task: -sizes.get(task.uri, 0))


def sizes_of(uris: Iterable[str]) -> dict[str, int]:
    """Bytes of each slide, as far as that is known without opening it; folders (DICOM, MIRAX) count as unknown."""
    found: dict[str, int] = {}
    places: dict[str, list[str]] = {}
    for uri in uris:
        if store.is_local(uri):
            with suppress(OSError):
                found[uri] = os.stat(store.local_path(uri)).st_size
        else:
            places.setdefault(uri.rpartition("/")[0], []).append(uri)
    for place, wanted in places.items():
        if len(wanted) >= LISTED and urlsplit(place).scheme == "s3":
            with suppress(WsiError):  # the slides themselves will say what is wrong
                found |= store.list_sizes(place)
    return found
