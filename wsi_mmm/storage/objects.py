"""``s3://`` and ``http(s)://`` over obstore, with the settings of the AWS tools from the environment."""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from wsi_mmm.errors import ConfigError, MissingPackage, NotFound, OutputError, StorageError
from wsi_mmm.storage.base import HEAD, BufferedStore, redact
from wsi_mmm.storage.ranges import Buffer
from wsi_mmm.storage.remote import OnBegin, RemoteStore, check_length, endpoint_for, fetch, storage_timeout
from wsi_mmm.storage.retry import retry_transient
from wsi_mmm.storage.translate import translate_errors

Settings = tuple[tuple[str, str], ...]

_CONNECT = timedelta(seconds=5)
_IDLE = "40"  # connections kept
_WHOLE = 8 << 20  # bytes expected of a whole object, whose size is not known yet
_ELSEWHERE = ("sso_session", "sso_start_url", "credential_process", "role_arn", "web_identity_token_file")
_KEYS = {  # name in the files of the AWS tools, and in their environment in capitals -> name of obstore
    "aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}  # fmt: skip
_runtime: list[int] = []  # the process in which obstore's threads run


def is_served(uri: str) -> bool:
    """Tell whether obstore serves it; signed http URLs have a query, which it would drop."""
    parts = urlsplit(uri)
    return parts.scheme in ("s3", "s3a") or (parts.scheme in ("http", "https") and not parts.query)


def open_file(uri: str) -> BufferedStore:
    """Open an object with its first bytes: its size and version come in the same request."""
    store, path = _find_store(uri, retries=False)
    meta, data = fetch(uri, HEAD, partial(_get_head, redact(uri), store, path))

    async def get(start: int, stop: int, on_begin: OnBegin) -> tuple[Buffer, str | None]:
        answer = await load_obstore().get_async(store, path, options={"range": (start, stop)})
        on_begin()
        return memoryview(await answer.bytes_async()), _object_version(answer.meta)

    opened = RemoteStore(uri, int(meta["size"]), _object_version(meta), get, endpoint_for(uri))
    opened.counter.add(len(data))
    return BufferedStore(opened, data)


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

    return fetch(uri, _WHOLE, whole)


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

    def list_prefixes() -> list[str]:
        with translate_errors(prefix):
            return list(load_obstore().list_with_delimiter(store, prefix=path.rstrip("/") or None)["common_prefixes"])

    return sorted(found.rstrip("/").rpartition("/")[2] for found in retry_transient(list_prefixes))


def list_sizes(prefix: str, *, recursive: bool = False) -> dict[str, int]:
    """Return the bytes of every object in a folder-like prefix, by URI; with ``recursive`` of those below it too."""
    store, path = _find_store(prefix, retries=True)
    root = prefix[: len(prefix) - len(path)] if path else prefix.rstrip("/") + "/"
    below = path.rstrip("/") or None

    def list_objects() -> list[Any]:
        with translate_errors(prefix):
            if recursive:
                return [item for page in load_obstore().list(store, prefix=below) for item in page]
            return list(load_obstore().list_with_delimiter(store, prefix=below)["objects"])

    return {root + str(item["path"]): int(item["size"]) for item in retry_transient(list_objects)}


def object_store(uri: str) -> Any:
    """An obstore store whose root is the prefix ``uri`` of an ``s3://`` bucket, for Zarr."""
    if not uri.startswith(("s3://", "s3a://")):
        raise OutputError(f"{redact(uri)}: Zarr is kept in local folders and on s3:// only; choose one of these")
    base, key = _split_uri(uri)
    return _make_store(base, _store_settings(base), storage_timeout(), retries=True, prefix=key.strip("/") or None)


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
    base, path = _split_uri(uri)
    return _kept_store(base, _store_settings(base), storage_timeout(), retries), path


def _split_uri(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.netloc}", unquote(parts.path).lstrip("/")
    # A key may hold '#' and '?': it is everything after the bucket, not what a URL parser makes of it.
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return f"s3://{bucket}", key


def _store_settings(base: str) -> Settings:
    return tuple(sorted(s3_settings(os.environ).items())) if base.startswith("s3://") else ()


def _make_store(base: str, settings: Settings, seconds: float, retries: bool, prefix: str | None = None) -> Any:
    wait = timedelta(seconds=seconds)
    client = {"timeout": wait, "connect_timeout": min(wait, _CONNECT), "pool_max_idle_per_host": _IDLE}
    if not settings or dict(settings).get("endpoint", "").startswith("http://"):
        client["allow_http"] = True
    options = {"client_options": client, "retry_config": {"max_retries": 4 if retries else 0, "retry_timeout": wait}}
    stores = load_obstore().store
    if base.startswith("s3://"):
        return stores.S3Store(base.removeprefix("s3://"), prefix=prefix, config=dict(settings), **options)
    return stores.HTTPStore.from_url(base, **options)


_kept_store = lru_cache(maxsize=32)(_make_store)


def s3_settings(env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of obstore, from the environment of the AWS tools."""
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    settings = {"region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"}
    if endpoint:
        settings["endpoint"] = _check_endpoint(endpoint)
    if any(env.get(name, "").lower() in ("1", "true", "yes") for name in ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE")):
        return settings | {"skip_signature": "true"}
    if not env.get("AWS_ACCESS_KEY_ID") or env.get("AWS_PROFILE"):
        return settings | _shared_credentials(env)
    # obstore reads them itself, but stores are cached by their settings, and keys may change.
    return settings | {new: env[old.upper()] for old, new in _KEYS.items() if env.get(old.upper())}


def _check_endpoint(address: str) -> str:
    """Return ``address`` if it is one of an http(s) server; ConfigError says what it lacks."""
    parts = urlsplit(address)
    try:
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if not whole or any(letter.isspace() for letter in address):
        shown = redact(address) if "://" in address else address.rpartition("@")[2]
        raise ConfigError(f"the S3 endpoint {shown!r} is no address; write it as http://HOST:PORT or https://HOST")
    return address


def _shared_credentials(env: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of AWS_PROFILE (default: 'default') in the shared credentials and config files."""
    profile = env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE") or "default"
    found = _read_profile(profile, env)
    if env.get("AWS_PROFILE") and not found:
        raise ConfigError(f"AWS_PROFILE={profile} is in no credentials file; run 'aws configure --profile {profile}'")
    elsewhere = next((name for name in _ELSEWHERE if name in found), None)
    if elsewhere and "aws_access_key_id" not in found:
        raise ConfigError(
            f"the AWS profile {profile} takes its keys from elsewhere ({elsewhere}), which is not followed here; "
            f'export them first: eval "$(aws configure export-credentials --profile {profile} --format env)"; '
            "unset AWS_PROFILE"
        )
    names = {**_KEYS, "region": "region", "endpoint_url": "endpoint"}
    if "endpoint_url" in found:
        _check_endpoint(found["endpoint_url"])
    return {new: found[old] for old, new in names.items() if old in found}


def _read_profile(profile: str, env: Mapping[str, str]) -> dict[str, str]:
    home = Path(env.get("HOME") or "~").expanduser() / ".aws"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([env.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials",
                     env.get("AWS_CONFIG_FILE") or home / "config"])  # fmt: skip
    except (configparser.Error, OSError, UnicodeDecodeError):
        # Not chained: the parser's error quotes the line, which may hold a key.
        raise ConfigError("the AWS credentials or config file cannot be read; check its lines") from None
    found: dict[str, str] = {}
    for section in (f"profile {profile}", profile):
        if parser.has_section(section):
            found |= dict(parser.items(section))
    return found
