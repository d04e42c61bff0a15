"""``s3://`` and ``http(s)://`` over obstore, with the settings of the AWS tools from the environment."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from wsi_mmm.errors import ConfigError, MissingPackage, NotFound, OutputError, StorageError
from wsi_mmm.storage.ranges import Buffer
from wsi_mmm.storage.remote import Endpoint, OnBegin, RemoteStore, VersionedBytes, check_length, request, wait_for
from wsi_mmm.storage.retry import retry_transient
from wsi_mmm.storage.translate import translate_errors
from wsi_mmm.storage.uris import redact

Settings = tuple[tuple[str, str], ...]

_TIMEOUT = 30.0  # seconds
_CONNECT = timedelta(seconds=5)
_IDLE = 40  # connections kept
_WHOLE = 8 << 20  # bytes expected of a whole object, whose size is not known yet
_ELSEWHERE = ("sso_session", "sso_start_url", "credential_process", "role_arn", "web_identity_token_file")
_runtime: list[int] = []  # the process in which obstore's threads run


def storage_timeout(env: Mapping[str, str] | None = None, *, otherwise: float = _TIMEOUT) -> float:
    """Return the seconds after which a request is given up: WSI_MMM_STORAGE_TIMEOUT, or 30."""
    value = (os.environ if env is None else env).get("WSI_MMM_STORAGE_TIMEOUT") or otherwise
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"WSI_MMM_STORAGE_TIMEOUT={value} is no number of seconds above 0; give one, such as 30")
    return seconds


def is_served(uri: str) -> bool:
    """Tell whether obstore serves it; signed http URLs have a query, which it would drop."""
    parts = urlsplit(uri)
    return parts.scheme in ("s3", "s3a") or (parts.scheme in ("http", "https") and not parts.query)


def open_object(uri: str, head: int) -> tuple[RemoteStore, Buffer]:
    """Return the opened object and its first ``head`` bytes: size and version come in the same request."""
    store, path, endpoint = _reading_store(uri)
    meta, data = wait_for(request(endpoint, redact(uri), head, partial(_get_head, uri, store, path, head)))
    opened = RemoteStore(uri, int(meta["size"]), _object_version(meta), partial(_get_range, uri, store, path), endpoint)
    opened.counter.add(len(data))
    return opened, data


async def _get_head(uri: str, store: Any, path: str, length: int, on_begin: OnBegin) -> tuple[Any, Buffer]:
    with translate_errors(uri):
        try:
            answer = await load_obstore().get_async(store, path, options={"range": (0, length)})
        except load_obstore().exceptions.GenericError as error:
            if "416" not in str(error):
                raise
            return await load_obstore().head_async(store, path), b""  # no range of an empty object is valid
        on_begin()
        meta, data = answer.meta, memoryview(await answer.bytes_async())
    check_length(redact(uri), len(data), min(length, int(meta["size"])))
    return meta, data


async def _get_range(uri: str, store: Any, path: str, start: int, stop: int, on_begin: OnBegin) -> VersionedBytes:
    with translate_errors(uri):
        answer = await load_obstore().get_async(store, path, options={"range": (start, stop)})
        on_begin()
        return memoryview(await answer.bytes_async()), _object_version(answer.meta)


def read(uri: str) -> bytes:
    """Return the whole object. Raises NotFound, StorageError."""
    store, path, endpoint = _reading_store(uri)

    async def whole(on_begin: OnBegin) -> bytes:
        with translate_errors(uri):
            answer = await load_obstore().get_async(store, path)
            on_begin()
            return bytes(await answer.bytes_async())

    return wait_for(request(endpoint, redact(uri), _WHOLE, whole))


def exists(uri: str) -> bool:
    """Tell whether there is such an object. Raises StorageError when that cannot be found out."""
    store, path, endpoint = _reading_store(uri)

    async def head(on_begin: OnBegin) -> None:
        with translate_errors(uri):
            await load_obstore().head_async(store, path)

    try:
        wait_for(request(endpoint, redact(uri), 0, head))
    except NotFound:
        return False
    return True


def write(uri: str, data: bytes) -> None:
    """Write the whole object in one PUT. Raises OutputError."""
    store, path = _writing_store(uri)

    def put_object() -> None:
        with translate_errors(uri, writing=True):
            load_obstore().put(store, path, data, use_multipart=False)

    retry_transient(put_object)


def delete(uri: str) -> None:
    """Delete the object; nothing happens when there is none. Raises OutputError."""
    store, path = _writing_store(uri)

    def delete_object() -> None:
        with translate_errors(uri, writing=True), suppress(FileNotFoundError):
            load_obstore().delete(store, path)

    retry_transient(delete_object)


def list_uris(prefix: str) -> list[str]:
    """Return the URIs of all objects below a folder-like prefix, sorted."""
    store, path = _writing_store(prefix)
    root = prefix[: len(prefix) - len(path)] if path else prefix.rstrip("/") + "/"

    def list_objects() -> list[str]:
        with translate_errors(prefix):
            pages = load_obstore().list(store, prefix=path.rstrip("/") or None)
            return sorted(root + str(item["path"]) for page in pages for item in page)

    return retry_transient(list_objects)


def list_sizes(prefix: str) -> dict[str, int]:
    """Return the bytes of every object directly in a folder-like prefix, by URI."""
    store, path = _writing_store(prefix)
    root = prefix[: len(prefix) - len(path)] if path else prefix.rstrip("/") + "/"

    def list_objects() -> Any:
        with translate_errors(prefix):
            return load_obstore().list_with_delimiter(store, prefix=path.rstrip("/") or None)

    return {root + str(item["path"]): int(item["size"]) for item in retry_transient(list_objects)["objects"]}


def object_store(uri: str) -> Any:
    """An obstore store whose root is the prefix ``uri`` of an ``s3://`` bucket, for Zarr."""
    if not uri.startswith(("s3://", "s3a://")):
        raise OutputError(f"{redact(uri)}: Zarr is kept in local folders and on s3:// only; choose one of these")
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    arguments = s3_arguments(s3_settings(os.environ), storage_timeout(), retries=True)
    return _load_stores().S3Store(bucket, prefix=key.strip("/") or None, **arguments)


def load_obstore() -> Any:
    """Return the library. Raises StorageError in a process forked after its first use, which lacks its threads."""
    try:
        import obstore
        import obstore.exceptions
    except ImportError as error:  # pragma: no cover - a core dependency
        raise MissingPackage("reading s3:// and http:// needs the package obstore; pip install obstore") from error
    if not _runtime:
        _runtime.append(os.getpid())
    elif _runtime[0] != os.getpid():
        raise StorageError("this process was forked from one that used s3:// or http://; start workers with 'spawn'")
    return obstore


def _load_stores() -> Any:
    load_obstore()
    from obstore import store

    return store


def _object_version(meta: Any) -> str:
    """Return the version of an object: its size, and its ETag or else its date."""
    return f"{meta['size']} {meta.get('e_tag') or meta.get('last_modified')}"


def _reading_store(uri: str) -> tuple[Any, str, Endpoint]:
    """Return a store that does not retry (remote.py does), the path in it, and the endpoint."""
    base, path = _split_uri(uri)
    store, endpoint = _kept_reading_store(base, _store_settings(base), storage_timeout())
    return store, path, endpoint


def _writing_store(uri: str) -> tuple[Any, str]:
    base, path = _split_uri(uri)
    return _kept_writing_store(base, _store_settings(base), storage_timeout()), path


def _split_uri(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.netloc}", unquote(parts.path).lstrip("/")
    # A key may hold '#' and '?': it is everything after the bucket, not what a URL parser makes of it.
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return f"s3://{bucket}", key


def _store_settings(base: str) -> Settings:
    return tuple(sorted(s3_settings(os.environ).items())) if base.startswith("s3://") else ()


@lru_cache(maxsize=16)
def _kept_reading_store(base: str, settings: Settings, seconds: float) -> tuple[Any, Endpoint]:
    return _make_store(base, settings, seconds, retries=False), Endpoint(seconds)


@lru_cache(maxsize=16)
def _kept_writing_store(base: str, settings: Settings, seconds: float) -> Any:
    return _make_store(base, settings, seconds, retries=True)


def _make_store(base: str, settings: Settings, seconds: float, *, retries: bool) -> Any:
    stores = _load_stores()
    if base.startswith("s3://"):
        return stores.S3Store(base.removeprefix("s3://"), **s3_arguments(dict(settings), seconds, retries=retries))
    options, retry = _client_options(seconds) | {"allow_http": True}, _retry_config(seconds, retries=retries)
    return stores.HTTPStore.from_url(base, client_options=options, retry_config=retry)


def s3_arguments(settings: Mapping[str, str], seconds: float, *, retries: bool) -> dict[str, Any]:
    """Return the arguments of an S3Store."""
    options = _client_options(seconds)
    if settings.get("endpoint", "").startswith("http://"):
        options["allow_http"] = True
    return {
        "config": dict(settings),
        "client_options": options,
        "retry_config": _retry_config(seconds, retries=retries),
    }


def _client_options(seconds: float) -> dict[str, Any]:
    wait = timedelta(seconds=seconds)
    return {"timeout": wait, "connect_timeout": min(wait, _CONNECT), "pool_max_idle_per_host": str(_IDLE)}


def _retry_config(seconds: float, *, retries: bool) -> dict[str, Any]:
    return {"max_retries": 4 if retries else 0, "retry_timeout": timedelta(seconds=seconds)}


def s3_settings(env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of obstore, from the environment of the AWS tools."""
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    settings = {"region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"}
    if endpoint:
        settings["endpoint"] = endpoint
    if any(env.get(name, "").lower() in ("1", "true", "yes") for name in ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE")):
        return settings | {"skip_signature": "true"}
    if not env.get("AWS_ACCESS_KEY_ID") or env.get("AWS_PROFILE"):
        return settings | _shared_credentials(env)
    # obstore reads them itself, but stores are cached by their settings, and keys may change.
    names = {"AWS_ACCESS_KEY_ID": "access_key_id", "AWS_SECRET_ACCESS_KEY": "secret_access_key",
             "AWS_SESSION_TOKEN": "session_token"}  # fmt: skip
    return settings | {new: env[old] for old, new in names.items() if env.get(old)}


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
    names = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
             "aws_session_token": "session_token", "region": "region", "endpoint_url": "endpoint"}  # fmt: skip
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
