"""The files of a cache in a folder: list and remove them, and keep tiles within a quota.

Shards of tiles that were used least recently go first, whole: they can be read from the slide again at any time.
Features and maps are results of a run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wsi_mmm.errors import InputError, OutputError
from wsi_mmm.storage import store

DAY = 86400.0
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
        with contextlib.suppress(OSError):  # not empty, or filled again by a run
            os.rmdir(path)


@dataclass(frozen=True, slots=True)
class CachedSlide:
    """A slide (its fingerprint) in a cache: bytes of its tiles and of its values, and when either was last used."""

    slide: str
    tiles: int
    values: int
    used: float


def inventory(uri: str) -> list[CachedSlide]:
    """One row per slide, the largest first. Raises InputError unless ``uri`` is a folder that is a cache."""
    found = [_slide_contents(folder) for folder in _slide_folders(_cache_folder(uri))]
    return sorted(found, key=lambda slide: -(slide.tiles + slide.values))


def clean(uri: str, *, older_than: float = 0.0, values: bool = False) -> int:
    """Remove tiles that were not used for ``older_than`` days; with ``values``, features and maps too (of slides of
    which nothing was used since). Returns the bytes that were freed. Raises InputError, OutputError.
    """
    root, limit = _cache_folder(uri), time.time() - older_than * DAY
    freed = 0
    try:
        for found in inventory(uri) if values else ():
            if found.used <= limit:
                shutil.rmtree(root / found.slide)
                freed += found.tiles + found.values
        for shard in stored_shards(root):
            if shard.used <= limit:
                shard.path.unlink(missing_ok=True)
                freed += shard.size
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}") from error
    for folder in _slide_folders(root):
        drop_empty(folder / "pixels")
    return freed


def _cache_folder(uri: str) -> Path:
    if not store.is_local(uri):
        raise InputError(f"{store.redact(uri)} is in a bucket: look at it and clean it with the tools of the bucket")
    root = store.local_path(uri)
    if not root.is_dir():
        raise InputError(f"{uri} is no folder: give the one of 'wsi-mmm run --cache'")
    return root


def _slide_folders(root: Path) -> Iterator[Path]:
    """Folders named by a fingerprint: nothing else below a cache is touched."""
    for folder in sorted(root.iterdir()):
        name = folder.name
        if folder.is_dir() and len(name) >= 16 and set(name) <= set("0123456789abcdef"):
            yield folder


def _slide_contents(folder: Path) -> CachedSlide:
    tiles = values = 0
    used = 0.0
    for path in folder.rglob("*"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # evicted meanwhile
            continue
        if path.is_file():
            used = max(used, facts.st_atime, facts.st_mtime)
            if path.relative_to(folder).parts[0] == "pixels":
                tiles += facts.st_size
            else:
                values += facts.st_size
    return CachedSlide(folder.name, tiles, values, used)
