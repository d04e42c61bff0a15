"""What lies in a cache, and removing it: for people, not on the way of a run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsi_mmm.cache.quota import drop_empty, stored_shards
from wsi_mmm.errors import InputError, OutputError
from wsi_mmm.storage import store

DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Held:
    """What a cache holds of a slide (its fingerprint): bytes of tiles and of values, and when either was last used."""

    slide: str
    tiles: int
    values: int
    used: float


def inventory(uri: str) -> list[Held]:
    """One row per slide, the largest first. Raises InputError unless ``uri`` is a folder that is a cache."""
    root = _root(uri)
    return sorted((_held(folder) for folder in _slides(root)), key=lambda held: -(held.tiles + held.values))


def clean(uri: str, *, older_than: float = 0.0, values: bool = False) -> int:
    """Remove tiles that were not used for ``older_than`` days; with ``values``, features and maps too (of slides of
    which nothing was used since). Returns the bytes that were freed. Raises InputError, OutputError.
    """
    root, limit = _root(uri), time.time() - older_than * DAY
    freed = 0
    try:
        for held in inventory(uri) if values else ():
            if held.used <= limit:
                shutil.rmtree(root / held.slide)
                freed += held.tiles + held.values
        for shard in stored_shards(root):
            if shard.used <= limit:
                shard.path.unlink(missing_ok=True)
                freed += shard.size
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}") from error
    for folder in _slides(root):
        drop_empty(folder / "pixels")
    return freed


def _root(uri: str) -> Path:
    if not store.is_local(uri):
        raise InputError(f"{store.redact(uri)} is in a bucket: look at it and clean it with the tools of the bucket")
    root = store.local_path(uri)
    if not root.is_dir():
        raise InputError(f"{uri} is no folder: give the one that runs name with --cache")
    return root


def _slides(root: Path) -> Iterator[Path]:
    """Folders named by a fingerprint: nothing else below a cache is touched."""
    for folder in sorted(root.iterdir()):
        name = folder.name
        if folder.is_dir() and len(name) >= 16 and set(name) <= set("0123456789abcdef"):
            yield folder


def _held(folder: Path) -> Held:
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
    return Held(folder.name, tiles, values, used)
