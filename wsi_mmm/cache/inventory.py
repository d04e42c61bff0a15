"""List and remove the content of a cache: for the command line, not used by runs."""

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
        raise InputError(f"{uri} is no folder: give the one that runs name with --cache")
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
