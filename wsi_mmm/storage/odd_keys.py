"""S3 keys that obstore cannot name, over aiobotocore: with empty parts, '.' and '..', or control characters.

They are read, not written. A prefix that holds one is listed here, too, with the exact names of all its keys.
"""

from __future__ import annotations

import asyncio
import os
import re
from functools import partial
from typing import Any, NoReturn

from wsi_mmm.errors import NotFound, OutputError, StorageError
from wsi_mmm.storage.aws import Settings, find_settings, split_uri
from wsi_mmm.storage.base import HEAD, BufferedStore, redact
from wsi_mmm.storage.remote import (
    WHOLE,
    OnBegin,
    VersionedBytes,
    check_length,
    close_with_loop,
    fetch,
    opened_with,
    storage_timeout,
)

_ODD = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")
_CONNECT = 5.0  # seconds
_CLIENT = "aiobotocore.session"
_clients: dict[tuple[int, Settings, float], asyncio.Task[Any]] = {}


def is_odd(uri: str) -> bool:
    """Tell whether the key of an ``s3://`` URI is one of these; none at all is not."""
    key = split_uri(uri)[1]
    return bool(key) and _ODD.search(key) is not None


def check_writable(uri: str) -> None:
    """Raise OutputError for a key that is not written."""
    if is_odd(uri.rstrip("/")):
        write(uri, b"")


def open_file(uri: str) -> BufferedStore:
    """Open an object with its first bytes: its size and version come in the same request."""

    async def get(start: int, stop: int, on_begin: OnBegin) -> VersionedBytes:
        data, _, version = await _get_part(uri, start, stop, on_begin)
        return data, version

    data, size, version = fetch(uri, HEAD, partial(_get_part, uri, 0, HEAD), _CLIENT)
    check_length(redact(uri), len(data), min(HEAD, size))
    return opened_with(data, uri, size, version, get)


def read(uri: str) -> bytes:
    """Return the whole object. Raises NotFound, StorageError."""

    async def get(on_begin: OnBegin) -> bytes:
        answer = await _ask_server(uri, "get_object")
        on_begin()
        async with answer["Body"] as body:
            return bytes(await body.read())

    return fetch(uri, WHOLE, get, _CLIENT)


def exists(uri: str) -> bool:
    """Tell whether there is such an object. Raises StorageError when that cannot be found out."""
    try:
        fetch(uri, 0, lambda on_begin: _ask_server(uri, "head_object"), _CLIENT)
    except NotFound:
        return False
    return True


def list_uris(prefix: str) -> list[str]:
    """Return the URIs of all objects below a folder-like prefix, sorted."""
    return sorted(list_sizes(prefix, recursive=True))


def list_folders(prefix: str) -> list[str]:
    """Return the names of the folders directly in a folder-like prefix, sorted."""
    root = prefix.rstrip("/") + "/"
    below = (uri.removeprefix(root) for uri in list_sizes(prefix, recursive=True))
    return sorted({name.partition("/")[0] for name in below if "/" in name})


def list_sizes(prefix: str, *, recursive: bool = False) -> dict[str, int]:
    """Return the bytes of every object in a folder-like prefix, by URI; with ``recursive`` of those below it too.

    Empty objects whose name ends in a slash only stand for folders and are left out.
    """
    key = split_uri(prefix)[1]
    root = prefix[: len(prefix) - len(key)] if key else prefix.rstrip("/") + "/"
    wanted: dict[str, Any] = {"Prefix": f"{key}/" if key and not key.endswith("/") else key}
    wanted |= {} if recursive else {"Delimiter": "/"}
    sizes: dict[str, int] = {}
    more: dict[str, Any] = {}
    while True:
        page = fetch(prefix, 0, lambda on_begin, more=more: _list_page(prefix, wanted | more), _CLIENT)  # type: ignore[misc]
        found = {root + str(item["Key"]): int(item["Size"]) for item in page.get("Contents", ())}
        sizes |= {uri: size for uri, size in found.items() if size or not uri.endswith("/")}
        token = page.get("NextContinuationToken")
        if not page.get("IsTruncated") or not token:
            return sizes
        if token == more.get("ContinuationToken"):
            raise StorageError(f"{redact(prefix)}: the server's listing does not end; ask who runs it")
        more = {"ContinuationToken": token}


def write(uri: str, data: bytes) -> NoReturn:
    """Raise OutputError: most tools could not read what is written there."""
    raise OutputError(
        f"{redact(uri)}: nothing is written to keys with empty parts, '.', '..' or control characters; choose another"
    )


def delete(uri: str) -> None:
    """Raise OutputError: these keys are read only."""
    write(uri, b"")


async def _get_part(uri: str, start: int, stop: int, on_begin: OnBegin) -> tuple[bytes, int, str]:
    """Return bytes, the size of the whole object and its version."""
    try:
        answer = await _ask_server(uri, "get_object", Range=f"bytes={start}-{stop - 1}")
    except Exception as error:
        if start or "InvalidRange" not in str(error):
            raise
        answer = await _ask_server(uri, "head_object")  # no range of an empty object is valid
        return b"", int(answer["ContentLength"]), _version_of(answer)
    on_begin()
    said = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange", ""))
    if said is None or int(said[1]) != start:
        raise StorageError(f"{redact(uri)}: the server answers with other bytes than were asked for; copy the file")
    async with answer["Body"] as body:
        return bytes(await body.read()), int(said[2]), _version_of(answer)


def _version_of(answer: dict[str, Any]) -> str:
    return str(answer.get("ETag") or answer.get("LastModified"))


async def _list_page(prefix: str, options: dict[str, Any]) -> dict[str, Any]:
    client, bucket = await _open_client(), split_uri(prefix)[0].removeprefix("s3://")
    page: dict[str, Any] = await client.list_objects_v2(Bucket=bucket, **options)
    return page


async def _ask_server(uri: str, method: str, **options: Any) -> dict[str, Any]:
    base, key = split_uri(uri)
    ask = getattr(await _open_client(), method)
    answer: dict[str, Any] = await ask(Bucket=base.removeprefix("s3://"), Key=key, **options)
    return answer


async def _open_client() -> Any:
    """Return this process's client of S3 for the settings of now; called in the loop."""
    key = os.getpid(), find_settings(), storage_timeout()
    if key not in _clients:
        _clients[key] = asyncio.create_task(_make_client(dict(key[1]), key[2]))
    return await asyncio.shield(_clients[key])


async def _make_client(settings: dict[str, str], seconds: float) -> Any:
    from aiobotocore.config import AioConfig
    from aiobotocore.session import AioSession
    from botocore import UNSIGNED

    more: dict[str, Any] = {"signature_version": UNSIGNED} if settings.get("skip_signature") else {}
    config = AioConfig(
        connect_timeout=min(seconds, _CONNECT), read_timeout=seconds, retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"}, **more,
    )  # fmt: skip
    keys = {f"aws_{name}": settings.get(name) for name in ("access_key_id", "secret_access_key", "session_token")}
    session = AioSession(session_vars={"profile": (None, None, None, None)})  # `settings` are those of the profile
    opened = session.create_client(
        "s3", region_name=settings["region"], endpoint_url=settings.get("endpoint"), config=config, **keys
    )
    client = await opened.__aenter__()
    close_with_loop(lambda: opened.__aexit__(None, None, None))
    return client
