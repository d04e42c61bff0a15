"""How much of a disk cached tiles may take: shards that were used least recently go first, whole.

Only tiles are removed: they can be read from the slide again at any time. Features and maps are results of a run.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LOW = 0.9
"""Share of the quota that is left in use when shards had to go, so that not every new one removes an old one."""


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A shard of tiles on a disk: ``used`` is when it was last used, seconds since the epoch."""

    path: Path
    size: int
    used: float


def stored_shards(root: Path) -> Iterator[StoredShard]:
    """Every shard of tiles below a cache's folder; what other processes remove meanwhile is left out."""
    for path in root.glob("*/pixels/*/pixels/c/*/*/0"):
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        yield StoredShard(path, facts.st_size, max(facts.st_atime, facts.st_mtime))


@dataclass(slots=True)
class Quota:
    """Keeps the tiles below ``root`` within ``limit`` bytes, together with the other processes that write there.

    Each process counts what it writes and looks at the disk after every twentieth of the quota: between looks, n
    processes exceed it by at most n twentieths.
    """

    root: Path
    limit: int
    _unseen: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wrote(self, count: int) -> None:
        """Note ``count`` new bytes; remove shards when the quota is exceeded."""
        with self._lock:
            self._unseen = self.limit if self._unseen is None else self._unseen + count
            if self._unseen <= self.limit // 20:
                return
            self._unseen = 0
            trim(self.root, self.limit)


def trim(root: Path, limit: int) -> int:
    """Remove the least recently used shards of tiles until ``limit`` holds; return the bytes that were freed.

    One process at a time: a second one leaves it to the first.
    """
    with (root / ".trim").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        found = sorted(stored_shards(root), key=lambda shard: shard.used)
        total, freed = sum(shard.size for shard in found), 0
        if total <= limit:
            return 0
        for shard in found:
            if total - freed <= LOW * limit:
                break
            shard.path.unlink(missing_ok=True)
            freed += shard.size
        return freed


def drop_empty(folder: Path) -> None:
    """Remove folders below (and including) ``folder`` that hold nothing any more."""
    for path, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(path)
        except OSError:  # not empty, or filled again by a run
            continue
