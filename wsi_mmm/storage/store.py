"""Bytes at a URI: ranges of slides, whole objects, and places to write files and folders for outputs.

Local paths and ``file://`` (local), ``s3://`` over obstore (objects; odd_keys for names that it cannot say),
``http(s)://`` over aiohttp (web), else over fsspec (fsspec_files). S3 takes the environment of the AWS tools:
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_PROFILE with the shared credentials file, AWS_NO_SIGN_REQUEST or AWS_SKIP_SIGNATURE
for public buckets. WSI_MMM_STORAGE_TIMEOUT: seconds until a request is given up (30).
Raises NotFound (reading), TransientError, SlideChanged, OutputError (writing), StorageError; none shows a secret.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from wsi_mmm.storage import fsspec_files, local, objects, odd_keys, web
from wsi_mmm.storage.base import (
    BufferedStore,
    ByteStore,
    buffered,
    is_local,
    join,
    local_path,
    redact,
    scheme_of,
)
from wsi_mmm.storage.objects import list_sizes, object_store
from wsi_mmm.storage.retry import retry_transient
from wsi_mmm.storage.translate import translate_errors
from wsi_mmm.timing import timed

__all__ = [
    "BufferedStore", "ByteStore", "buffered", "delete", "exists", "is_local", "join", "list_folders", "list_sizes",
    "list_uris", "local_path", "object_store", "open_store", "published_file", "published_folder", "read_bytes",
    "redact", "retry_transient", "scheme_of", "translate_errors", "write_bytes",
]  # fmt: skip


class _Backend(Protocol):
    """Objects of some schemes, as local, objects, odd_keys, web and fsspec_files serve them."""

    def open_file(self, uri: str) -> ByteStore: ...
    def read(self, uri: str) -> bytes: ...
    def write(self, uri: str, data: bytes) -> None: ...
    def exists(self, uri: str) -> bool: ...
    def list_uris(self, prefix: str) -> list[str]: ...
    def list_folders(self, prefix: str) -> list[str]: ...
    def delete(self, uri: str) -> None: ...


def _backend_of(uri: str) -> _Backend:
    if is_local(uri):
        return local
    scheme = scheme_of(uri)
    if scheme in ("http", "https"):
        return web
    if scheme in ("s3", "s3a"):
        return odd_keys if odd_keys.is_odd(uri) else objects
    return fsspec_files


def open_store(uri: str) -> ByteStore:
    """Open the object at ``uri`` for reading in ranges. Raises NotFound, StorageError."""
    return _backend_of(uri).open_file(uri)


def read_bytes(uri: str) -> bytes:
    """Return the whole object. Raises NotFound, StorageError."""
    with timed("fetch"):
        return _backend_of(uri).read(uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object at once: rename on a file system, one PUT on S3. Raises OutputError."""
    with timed("write"):
        _backend_of(uri).write(uri, data)


def exists(uri: str) -> bool:
    """Tell whether there is an object (or, locally, a folder). Raises StorageError when that cannot be found out."""
    return _backend_of(uri).exists(uri)


def list_uris(prefix: str) -> list[str]:
    """Return the URIs of all objects below a folder-like prefix, recursive, sorted; empty when there are none."""
    return _backend_of(prefix.rstrip("/")).list_uris(prefix)


def list_folders(prefix: str) -> list[str]:
    """Return the names of the folders directly in a folder-like prefix, sorted; empty when there are none."""
    return _backend_of(prefix).list_folders(prefix)


def delete(uri: str) -> None:
    """Delete the object; nothing happens when there is none. Raises OutputError."""
    _backend_of(uri).delete(uri)


@contextmanager
def published_file(uri: str) -> Iterator[Path]:
    """A path to write ``uri`` at: its own when local, else a temporary one, uploaded when the block ends well."""
    if is_local(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="wsi-mmm-") as folder:
        path = Path(folder) / uri.rsplit("/", 1)[-1]
        yield path
        write_bytes(uri, path.read_bytes())


@contextmanager
def published_folder(uri: str) -> Iterator[str]:
    """A folder to write in, which becomes ``uri`` when the block ends well. Raises OutputError.

    In a bucket the old objects are deleted first, and zarr.json is uploaded last: half a folder is no Zarr.
    """
    if is_local(uri):
        with local.atomic_folder(local_path(uri)) as place:
            yield str(place)
        return
    with (
        local.local_errors(tempfile.gettempdir(), writing=True),
        tempfile.TemporaryDirectory(prefix="wsi-mmm-") as folder,
    ):
        yield folder
        for old in list_uris(uri):
            delete(old)
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
        for name in sorted(names, key=lambda name: (name == "zarr.json", name)):
            write_bytes(join(uri, name), (Path(folder) / name).read_bytes())
