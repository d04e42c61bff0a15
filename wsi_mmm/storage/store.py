"""Bytes at a URI: ranges of slides, and whole objects for outputs.

Local paths and ``file://`` (local), ``s3://`` and ``http(s)://`` over obstore (objects), else over fsspec
(fsspec_files). S3 takes the environment of the AWS tools: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_PROFILE with the shared credentials file, AWS_NO_SIGN_REQUEST or AWS_SKIP_SIGNATURE
for public buckets. WSI_MMM_STORAGE_TIMEOUT: seconds until a request is given up (30).
Raises NotFound (reading), TransientError, SlideChanged, OutputError (writing), StorageError; none shows a secret.
"""

from __future__ import annotations

from typing import Protocol

from wsi_mmm.storage import fsspec_files, local, objects
from wsi_mmm.storage.base import ByteStore
from wsi_mmm.storage.buffered import HEAD, BufferedStore, buffered
from wsi_mmm.storage.objects import object_store
from wsi_mmm.storage.retry import retry_transient
from wsi_mmm.storage.translate import translate_errors
from wsi_mmm.storage.uris import is_local, join, local_path, redact
from wsi_mmm.timing import timed

__all__ = [
    "BufferedStore", "ByteStore", "buffered", "delete", "exists", "is_local", "join", "list_uris", "local_path",
    "object_store", "open_store", "read_bytes", "redact", "retry_transient", "translate_errors", "write_bytes",
]  # fmt: skip


def open_store(uri: str) -> ByteStore:
    """Open the object at ``uri`` for reading in ranges. Raises NotFound, StorageError."""
    if is_local(uri):
        return local.open_local(uri)
    if not objects.is_served(uri):
        return fsspec_files.open_file(uri)
    return BufferedStore(*objects.open_object(uri, HEAD))


def read_bytes(uri: str) -> bytes:
    """Return the whole object. Raises NotFound, StorageError."""
    with timed("fetch"):
        return local.read_bytes(uri) if is_local(uri) else _remote_files(uri).read(uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object at once: rename on a file system, one PUT on S3. Raises OutputError."""
    with timed("write"):
        if is_local(uri):
            local.write_bytes(uri, data)
        else:
            _remote_files(uri).write(uri, data)


def exists(uri: str) -> bool:
    """Tell whether there is an object (or, locally, a folder). Raises StorageError when that cannot be found out."""
    if is_local(uri):
        return local_path(uri).exists()
    return _remote_files(uri).exists(uri)


def list_uris(prefix: str) -> list[str]:
    """Return the URIs of all objects below a folder-like prefix, recursive, sorted; empty when there are none."""
    if is_local(prefix):
        return local.list_uris(prefix)
    return _remote_files(prefix).list_uris(prefix)


def list_sizes(prefix: str) -> dict[str, int]:
    """Return the bytes of every object directly in an ``s3://`` prefix, by URI. Raises StorageError."""
    return objects.list_sizes(prefix)


def delete(uri: str) -> None:
    """Delete the object; nothing happens when there is none. Raises OutputError."""
    if is_local(uri):
        local.delete(uri)
    else:
        _remote_files(uri).delete(uri)


class _RemoteFiles(Protocol):
    """Whole objects, as the modules for remote storage serve them."""

    def read(self, uri: str) -> bytes: ...
    def write(self, uri: str, data: bytes) -> None: ...
    def exists(self, uri: str) -> bool: ...
    def list_uris(self, prefix: str) -> list[str]: ...
    def delete(self, uri: str) -> None: ...


def _remote_files(uri: str) -> _RemoteFiles:
    return objects if objects.is_served(uri) else fsspec_files
