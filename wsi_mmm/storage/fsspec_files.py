"""Any other scheme over fsspec, whose blocking functions run in threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from wsi_mmm.errors import MissingPackage, NotFound, StorageError
from wsi_mmm.storage.base import redact
from wsi_mmm.storage.remote import OnBegin, RemoteStore, endpoint_for, fetch
from wsi_mmm.storage.translate import NO_RANGES, translate_errors

T = TypeVar("T")

_THREADS = 16


def open_file(uri: str) -> RemoteStore:
    """Open the object. Raises NotFound, StorageError."""
    fs, path = _file_system(uri)
    info = _run_request(uri, lambda: fs.info(path))
    if info.get("size") is None:
        raise StorageError(f"{redact(uri)}: the server does not say the size; copy the file to a local disk or to S3")
    if info.get("partial") is False:
        raise StorageError(f"{redact(uri)}: {NO_RANGES}")

    async def get(start: int, stop: int, on_begin: OnBegin) -> tuple[bytes, None]:
        return await _in_thread(lambda: bytes(fs.cat_file(path, start=start, end=stop))), None

    return RemoteStore(uri, int(info["size"]), None, get, endpoint_for(uri))


def read(uri: str) -> bytes:
    """Return the whole object."""
    fs, path = _file_system(uri)
    return _run_request(uri, lambda: bytes(fs.cat_file(path)))


def exists(uri: str) -> bool:
    """Tell whether there is such an object."""
    fs, path = _file_system(uri)
    return _run_request(uri, lambda: bool(fs.exists(path)))


def list_uris(prefix: str) -> list[str]:
    """Return the URIs of all objects below a prefix, sorted."""
    fs, path = _file_system(prefix)
    return _run_request(prefix, lambda: sorted(str(fs.unstrip_protocol(p)) for p in fs.find(path)))


def list_folders(prefix: str) -> list[str]:
    """Return the names of the folders directly in a prefix, sorted."""
    fs, path = _file_system(prefix)

    def list_names() -> list[str]:
        try:
            found = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(str(one["name"]).rstrip("/").rpartition("/")[2] for one in found if one["type"] == "directory")

    return _run_request(prefix, list_names)


def write(uri: str, data: bytes) -> None:
    """Write the whole object. Raises OutputError."""
    fs, path = _file_system(uri)
    with translate_errors(uri, writing=True):
        fs.pipe_file(path, data)


def delete(uri: str) -> None:
    """Delete the object if it is there. Raises OutputError."""
    fs, path = _file_system(uri)
    with translate_errors(uri, writing=True):
        if fs.exists(path):
            fs.rm_file(path)


def _run_request(uri: str, operation: Callable[[], T]) -> T:
    return fetch(uri, 0, lambda on_begin: _in_thread(operation))


async def _in_thread(operation: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_thread_pool(os.getpid()), operation)


@lru_cache(maxsize=1)
def _thread_pool(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix=f"fsspec-{pid}")


def _file_system(uri: str) -> tuple[Any, str]:
    with translate_errors(uri):  # such as ftp:// and sftp:// connect at once
        try:
            import fsspec

            fs, path = fsspec.url_to_fs(uri)
        except ImportError as error:
            raise MissingPackage(f"{redact(uri)}: reading this needs one more package of the fsspec family") from error
        except ValueError as error:
            raise NotFound(
                f"{redact(uri)}: no storage is known by this scheme; use a path, s3://, http:// or https://"
            ) from error
    return fs, str(path)
