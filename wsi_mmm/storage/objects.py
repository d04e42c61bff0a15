"""``s3://`` over obstore, with the settings of the AWS tools from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

from wsi_mmm.errors import MissingPackage, NotFound, OutputError, StorageError
from wsi_mmm.storage import odd_keys
from wsi_mmm.storage.aws import Settings, find_settings, split_uri
from wsi_mmm.storage.base import HEAD, BufferedStore, redact
from wsi_mmm.storage.ranges import Buffer
from wsi_mmm.storage.remote import WHOLE, OnBegin, check_length, fetch, opened_with, storage_timeout
from wsi_mmm.storage.retry import retry_transient
from wsi_mmm.storage.translate import translate_errors

_NO_XML = "invalid list response"  # control characters in names
_CONNECT = timedelta(seconds=5)
_IDLE = "40"  # connections kept
_runtime: list[int] = []  # the process in which obstore's threads run


def open_file(uri: str) -> BufferedStore:
    """Open an object with its first bytes: its size and version come in the same request."""
    store, path = _find_store(uri, retries=False)
    meta, data = fetch(uri, HEAD, partial(_get_head, redact(uri), store, path))

    async def get(start: int, stop: int, on_begin: OnBegin) -> tuple[Buffer, str | None]:
        answer = await load_obstore().get_async(store, path, options={"range": (start, stop)})
        on_begin()
        return memoryview(await answer.bytes_async()), _object_version(answer.meta)

    return opened_with(data, uri, int(meta["size"]), _object_version(meta), get)


async def _get_head(name: str, store: Any, path: str, on_begin: OnBegin) -> tuple[Any, Buffer]:
    try:
        answer = await load_obstore().get_async(store, path, options={"range": (0, HEAD)})
    except load_obstore().exceptions.GenericError as error:
        if "416" not in str(error):
            raise
        return await load_obstore().head_async(store, path), b""  # no range of an empty object is valid
    on_begin()
    meta, data = answer.meta, memoryview(await answer.bytes_async())
    check_length(name, len(data), min(HEAD, int(meta["size"])))
    return meta, data


def read(uri: str) -> bytes:
    """Return the whole object. Raises NotFound, StorageError."""
    store, path = _find_store(uri, retries=False)

    async def whole(on_begin: OnBegin) -> bytes:
        answer = await load_obstore().get_async(store, path)
        on_begin()
        return bytes(await answer.bytes_async())

    return fetch(uri, WHOLE, whole)


def exists(uri: str) -> bool:
    """Tell whether there is such an object. Raises StorageError when that cannot be found out."""
    store, path = _find_store(uri, retries=False)
    try:
        fetch(uri, 0, lambda on_begin: load_obstore().head_async(store, path))
    except NotFound:
        return False
    return True


def write(uri: str, data: bytes) -> None:
    """Write the whole object in one PUT. Raises OutputError."""
    _change_object(uri, lambda store, path: load_obstore().put(store, path, data, use_multipart=False))


def delete(uri: str) -> None:
    """Delete the object; nothing happens when there is none. Raises OutputError."""

    def delete_object(store: Any, path: str) -> None:
        with suppress(FileNotFoundError):
            load_obstore().delete(store, path)

    _change_object(uri, delete_object)


def _change_object(uri: str, step: Callable[[Any, str], object]) -> None:
    store, path = _find_store(uri, retries=True)

    def attempt() -> None:
        with translate_errors(uri, writing=True):
            step(store, path)

    retry_transient(attempt)


def list_uris(prefix: str) -> list[str]:
    """Return the URIs of all objects below a folder-like prefix, sorted."""
    return sorted(list_sizes(prefix, recursive=True))


def list_folders(prefix: str) -> list[str]:
    """Return the names of the folders directly in a folder-like prefix, sorted: a request for each thousand."""
    store, path = _find_store(prefix, retries=True)

    def list_prefixes() -> list[str] | None:
        with translate_errors(prefix):
            try:
                below = path.rstrip("/") or None
                return list(load_obstore().list_with_delimiter(store, prefix=below)["common_prefixes"])
            except load_obstore().exceptions.InvalidPathError:
                return None

    found = retry_transient(list_prefixes)
    if found is None:
        return odd_keys.list_folders(prefix)
    return sorted(name.rstrip("/").rpartition("/")[2] for name in found)


def list_sizes(prefix: str, *, recursive: bool = False) -> dict[str, int]:
    """Return the bytes of every object in a folder-like prefix, by URI; with ``recursive`` of those below it too.

    obstore cannot list a prefix with a key that it cannot name, and takes the slash from names that end in one, which
    empty ones do: such a prefix is listed by `odd_keys`.
    """
    store, path = _find_store(prefix, retries=True)
    root = prefix[: len(prefix) - len(path)] if path else prefix.rstrip("/") + "/"
    below = path.rstrip("/") or None
    unnamed = load_obstore().exceptions.InvalidPathError, load_obstore().exceptions.GenericError

    def list_objects() -> list[Any] | None:
        with translate_errors(prefix):
            try:
                if recursive:
                    return [item for page in load_obstore().list(store, prefix=below) for item in page]
                return list(load_obstore().list_with_delimiter(store, prefix=below)["objects"])
            except unnamed as error:
                if isinstance(error, unnamed[0]) or _NO_XML in str(error):
                    return None
                raise

    found = retry_transient(list_objects)
    names = {root + str(item["path"]): int(item["size"]) for item in found or ()}
    if found is None or len(names) < len(found) or 0 in names.values():
        return odd_keys.list_sizes(prefix, recursive=recursive)
    return names


def object_store(uri: str) -> Any:
    """An obstore store whose root is the prefix ``uri`` of an ``s3://`` bucket, for Zarr."""
    if not uri.startswith(("s3://", "s3a://")):
        raise OutputError(f"{redact(uri)}: Zarr is kept in local folders and on s3:// only; choose one of these")
    odd_keys.check_writable(uri)
    base, key = split_uri(uri)
    return _make_store(base, find_settings(), storage_timeout(), retries=True, prefix=key.strip("/") or None)


def load_obstore() -> Any:
    """Return the library. Raises StorageError in a process forked after its first use, which lacks its threads."""
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError as error:  # pragma: no cover - a core dependency
        raise MissingPackage("reading s3:// and http:// needs the package obstore; pip install obstore") from error
    if not _runtime:
        _runtime.append(os.getpid())
    elif _runtime[0] != os.getpid():
        raise StorageError("this process was forked from one that used s3:// or http://; start workers with 'spawn'")
    return obstore


def _object_version(meta: Any) -> str:
    """Return the version of an object: its size, and its ETag or else its date."""
    return f"{meta['size']} {meta.get('e_tag') or meta.get('last_modified')}"


def _find_store(uri: str, *, retries: bool) -> tuple[Any, str]:
    """Return a store and the path in it; without ``retries`` it does not try again itself (remote.py does)."""
    base, path = split_uri(uri)
    return _kept_store(base, find_settings(), storage_timeout(), retries), path


def _make_store(base: str, settings: Settings, seconds: float, retries: bool, prefix: str | None = None) -> Any:
    wait = timedelta(seconds=seconds)
    client = {"timeout": wait, "connect_timeout": min(wait, _CONNECT), "pool_max_idle_per_host": _IDLE}
    if dict(settings).get("endpoint", "").startswith("http://"):
        client["allow_http"] = True
    options = {"client_options": client, "retry_config": {"max_retries": 4 if retries else 0, "retry_timeout": wait}}
    config = dict(settings)
    return load_obstore().store.S3Store(base.removeprefix("s3://"), prefix=prefix, config=config, **options)


_kept_store = lru_cache(maxsize=32)(_make_store)
