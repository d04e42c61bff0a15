"""Locks on the slides of an output folder: two runs at once must not remove each other's files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from hashlib import sha256

from wsi_mmm.storage import store

LOCK = ".wsi-mmm.lock"
TAKEN = "another run is working on it in the same output folder; wait for that run, or choose another --output"


@contextlib.contextmanager
def claimed(output: str, slides: Iterable[str]) -> Iterator[set[str]]:
    """Claim slide ids under a local ``output`` while the context lasts; gives those that another run holds.

    Each id is one byte of a lock file, locked by the system: a run that dies, by whatever cause, holds nothing. Where
    there are no such locks (object stores, some network file systems) nothing is claimed and nothing is held.
    """
    descriptor = _open_lock_file(output)
    if descriptor is None:
        yield set()
        return
    try:
        yield {slide for slide in slides if not _lock_slide(descriptor, slide)}
    finally:
        os.close(descriptor)


def _open_lock_file(output: str) -> int | None:
    if not store.is_local(output) or not hasattr(fcntl, "F_OFD_SETLK"):
        return None
    try:
        return os.open(os.path.join(store.local_path(output), LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return None  # that the folder cannot be written is said elsewhere


def _lock_slide(descriptor: int, slide: str) -> bool:
    """Whether the byte of ``slide`` is ours now, or cannot be anybody's."""
    offset = int.from_bytes(sha256(slide.encode()).digest()[:7], "big")
    # struct flock; "open file description" locks belong to the descriptor, so two runs in one process differ too.
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True
