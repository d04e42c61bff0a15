"""Bytes at a URI: ranges of slides, and whole objects for outputs.

Local paths and ``file://`` (store_local), ``s3://`` and ``http(s)://`` over obstore (store_objects), else over fsspec
(store_fsspec). S3 takes the environment of the AWS tools: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_PROFILE with the shared credentials file, AWS_NO_SIGN_REQUEST or AWS_SKIP_SIGNATURE
for public buckets. WSI_MMM_STORAGE_TIMEOUT: seconds until a request is given up (30).
Errors are NotFound (reading), StorageError, SlideChanged and OutputError (writing); none shows a secret.
"""

from __future__ import annotations

from typing import Protocol

from wsi_mmm.storage import fsspec_files, local, objects
from wsi_mmm.storage.base import ByteStore
from wsi_mmm.storage.held import HEAD, HeldStore, held
from wsi_mmm.storage.objects import object_store
from wsi_mmm.storage.retry import retry_transient
from wsi_mmm.storage.translate import translated
from wsi_mmm.storage.uris import is_local, join, local_path, redact
from wsi_mmm.timing import spent

__all__ = [
    "ByteStore", "HeldStore", "delete", "exists", "held", "is_local", "join", "list_uris", "local_path",
    "object_store", "open_store", "read_bytes", "redact", "retry_transient", "translated", "write_bytes",
]  # fmt: skip


def open_store(uri: str) -> ByteStore:
    """Open the object at ``uri`` for reading in ranges. Raises NotFound, StorageError."""
    if is_local(uri):
        return local.open_local(uri)
    if not objects.serves(uri):
        return fsspec_files.open_file(uri)
    return HeldStore(*objects.open_object(uri, HEAD))


def read_bytes(uri: str) -> bytes:
    """Return the whole object. Raises NotFound, StorageError."""
    with spent("fetch"):
        return local.read_bytes(uri) if is_local(uri) else _remote(uri).read(uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object at once: rename on a file system, one PUT on S3. Raises OutputError."""
    with spent("write"):
        if is_local(uri):
            local.write_bytes(uri, data)
        else:
            _remote(uri).write(uri, data)


def exists(uri: str) -> bool:
    """Tell whether there is an object (or, locally, a folder). Raises StorageError when that cannot be known."""
    if is_local(uri):
        return local_path(uri).exists()
    return _remote(uri).exists(uri)


def list_uris(prefix: str) -> list[str]:
    """Return the URIs of all objects below a folder-like prefix, recursive, sorted; empty when there are none."""
    if is_local(prefix):
        return local.list_uris(prefix)
    return _remote(prefix).list_uris(prefix)


def sizes(prefix: str) -> dict[str, int]:
    """Return the bytes of every object that lies in an ``s3://`` prefix itself, by URI. Raises StorageError."""
    return objects.sizes(prefix)


def delete(uri: str) -> None:
    """Delete the object; nothing happens when there is none. Raises OutputError."""
    if is_local(uri):
        local.delete(uri)
    else:
        _remote(uri).delete(uri)


class _Remote(Protocol):
    """Whole objects: what the modules for remote storage offer."""

    def read(self, uri: str) -> bytes: ...
    def write(self, uri: str, data: bytes) -> None: ...
    def exists(self, uri: str) -> bool: ...
    def list_uris(self, prefix: str) -> list[str]: ...
    def delete(self, uri: str) -> None: ...


def _remote(uri: str) -> _Remote:
    return objects if objects.serves(uri) else fsspec_files
