"""Bytes at a URI: ranges of slides, and whole objects for outputs.

Local paths and ``file://`` (store_local), ``s3://`` and ``http(s)://`` over obstore with ranges, else over fsspec.
S3 takes the environment of the AWS tools: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_PROFILE with the shared credentials file, AWS_NO_SIGN_REQUEST or AWS_SKIP_SIGNATURE
for public buckets.
Errors are SlideNotFound (reading), StorageError, SlideChanged and OutputError (writing); none shows a secret.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from wsi_mmm.errors import MissingPackage, OutputError, SlideChanged, SlideNotFound, StorageError, WsiError
from wsi_mmm.slides import store_local
from wsi_mmm.slides.ranges import Counter, Range, fetch_merged
from wsi_mmm.slides.uris import is_local, join, local_path, redact

__all__ = [
    "ByteStore", "delete", "exists", "is_local", "join", "list_uris", "local_path", "open_store", "read_bytes",
    "redact", "translated", "write_bytes",
]  # fmt: skip

_CONCURRENT = 12
_REMOTE_GAP = 128 << 10  # reading this much too much is cheaper than one more request
_TIMEOUT = "60s"
_NO_RANGES = "the server does not serve byte ranges; copy the file to a local disk or to S3"


Get = Callable[[int, int], tuple[bytes, str | None]]  # start, stop -> bytes, etag


class ByteStore(Protocol):
    """One object, read in ranges; thread-safe."""

    uri: str
    size: int
    etag: str | None
    counter: Counter

    def get_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each (start, length); short where the object ends. StorageError, SlideChanged."""

    def close(self) -> None:
        """Let go of files and connections."""


class RemoteStore:
    """An object behind ``get(start, stop) -> (bytes, etag)``; several ranges are in flight at once."""

    def __init__(self, uri: str, size: int, etag: str | None, get: Get) -> None:
        self.uri, self.size, self.etag = uri, size, etag
        self.counter = Counter()
        self._get = get
        self._pool = ThreadPoolExecutor(_CONCURRENT, thread_name_prefix="fetch")

    def get_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each (start, length); short where the object ends."""
        return fetch_merged(ranges, self.size, gap=_REMOTE_GAP, get=self._get_many)

    def _get_many(self, spans: Sequence[Range]) -> list[bytes]:
        if len(spans) == 1:
            return [self._one(spans[0])]
        return list(self._pool.map(self._one, spans))

    def _one(self, span: Range) -> bytes:
        start, length = span
        data, etag = self._get(start, start + length)
        self.counter.add(len(data))
        if self.etag is not None and etag is not None and etag != self.etag:
            raise SlideChanged(f"{redact(self.uri)} was replaced while it was read; run again")
        if len(data) > length:
            raise StorageError(f"{redact(self.uri)}: {_NO_RANGES}")
        if len(data) < length:
            raise SlideChanged(f"{redact(self.uri)} ended early while it was read: replaced, or cut off; run again")
        return data

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def open_store(uri: str) -> ByteStore:
    """Open the object at ``uri`` for reading in ranges. Raises SlideNotFound, StorageError."""
    if is_local(uri):
        return store_local.open_local(uri)
    if _by_obstore(uri):
        return _open_obstore(uri)
    return _open_fsspec(uri)


def read_bytes(uri: str) -> bytes:
    """Return the whole object. Raises SlideNotFound, StorageError."""
    if is_local(uri):
        return store_local.read_bytes(uri)
    if not _by_obstore(uri):
        with _translate_fsspec(uri):
            return bytes(_fsspec(uri)[0].cat_file(_fsspec(uri)[1]))
    store, path = _object(uri)
    with _translate(uri):
        return bytes(_obstore().get(store, path).bytes())


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object at once: rename on a file system, one PUT on S3. Raises OutputError."""
    if is_local(uri):
        store_local.write_bytes(uri, data)
        return
    if not _by_obstore(uri):
        with _translate_fsspec(uri, writing=True):
            _fsspec(uri)[0].pipe_file(_fsspec(uri)[1], data)
        return
    store, path = _object(uri)
    with _translate(uri, writing=True):
        _obstore().put(store, path, data, use_multipart=False)


def exists(uri: str) -> bool:
    """Tell whether there is an object (or, locally, a folder). Raises StorageError when that cannot be known."""
    if is_local(uri):
        return local_path(uri).exists()
    if not _by_obstore(uri):
        with _translate_fsspec(uri):
            return bool(_fsspec(uri)[0].exists(_fsspec(uri)[1]))
    store, path = _object(uri)
    try:
        with _translate(uri):
            _obstore().head(store, path)
    except SlideNotFound:
        return False
    return True


def list_uris(prefix: str) -> list[str]:
    """Return the URIs of all objects below a folder-like prefix, recursive, sorted; empty when there are none."""
    if is_local(prefix):
        return store_local.list_uris(prefix)
    if not _by_obstore(prefix):
        fs, path = _fsspec(prefix)
        with _translate_fsspec(prefix):
            return sorted(str(fs.unstrip_protocol(p)) for p in fs.find(path))
    store, path = _object(prefix)
    root = prefix[: len(prefix) - len(path)] if path else prefix.rstrip("/") + "/"
    with _translate(prefix):
        pages = _obstore().list(store, prefix=path.rstrip("/") or None)
        return sorted(root + str(item["path"]) for page in pages for item in page)


def delete(uri: str) -> None:
    """Delete the object; nothing happens when there is none. Raises OutputError."""
    if is_local(uri):
        store_local.delete(uri)
        return
    if not _by_obstore(uri):
        with _translate_fsspec(uri, writing=True):
            _fsspec(uri)[0].rm_file(_fsspec(uri)[1])
        return
    store, path = _object(uri)
    try:
        with _translate(uri, writing=True):
            _obstore().delete(store, path)
    except SlideNotFound:
        return


def _by_obstore(uri: str) -> bool:
    """Tell whether obstore serves it; signed http URLs have a query, which it would drop."""
    parts = urlsplit(uri)
    return parts.scheme in ("s3", "s3a") or (parts.scheme in ("http", "https") and not parts.query)


def _open_obstore(uri: str) -> ByteStore:
    store, path = _object(uri)
    meta = _meta(uri, store, path)

    def get(start: int, stop: int) -> tuple[bytes, str | None]:
        with _translate(uri):
            answer = _obstore().get(store, path, options={"range": (start, stop)})
            return bytes(answer.bytes()), _version(answer.meta)

    return RemoteStore(uri, int(meta["size"]), _version(meta), get)


def _meta(uri: str, store: Any, path: str) -> Any:
    """Return what the storage says of an object; a web server that refuses HEAD is asked for its first byte."""
    try:
        with _translate(uri):
            return _obstore().head(store, path)
    except SlideNotFound:
        if uri.startswith("s3"):
            raise
        with _translate(uri):
            return _obstore().get(store, path, options={"range": (0, 1)}).meta


def _version(meta: Any) -> str:
    """Return what changes when the object does: its size, and its ETag or else its date."""
    return f"{meta['size']} {meta.get('e_tag') or meta.get('last_modified')}"


def _object(uri: str) -> tuple[Any, str]:
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return _http_store(f"{parts.scheme}://{parts.netloc}"), unquote(parts.path).lstrip("/")
    # A key may hold '#' and '?': it is everything after the bucket, not what a URL parser makes of it.
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return _s3_store(bucket, tuple(sorted(_s3_settings(os.environ).items()))), key


def object_store(uri: str) -> Any:
    """An obstore store whose root is the prefix ``uri`` of an ``s3://`` bucket: what Zarr writes through."""
    if not uri.startswith(("s3://", "s3a://")):
        raise OutputError(f"{redact(uri)}: Zarr is kept in local folders and on s3:// only; choose one of these")
    from obstore.store import S3Store

    bucket, _, key = uri.split("://", 1)[1].partition("/")
    settings = tuple(sorted(_s3_settings(os.environ).items()))
    return S3Store(bucket, prefix=key.strip("/") or None, **_s3_arguments(settings))


@lru_cache(maxsize=16)
def _http_store(base: str) -> Any:
    from obstore.store import HTTPStore

    options: Any = {"allow_http": True, "timeout": _TIMEOUT}
    return HTTPStore.from_url(base, client_options=options, retry_config=_retries())


@lru_cache(maxsize=16)
def _s3_store(bucket: str, settings: tuple[tuple[str, str], ...]) -> Any:
    from obstore.store import S3Store

    return S3Store(bucket, **_s3_arguments(settings))


def _s3_arguments(settings: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    config: dict[str, Any] = dict(settings)
    options: dict[str, Any] = {"timeout": _TIMEOUT}
    if config.get("endpoint", "").startswith("http://"):
        options["allow_http"] = True
    return {"config": config, "client_options": options, "retry_config": _retries()}


def _retries() -> Any:
    from datetime import timedelta

    return {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}


def _s3_settings(env: Any) -> dict[str, str]:
    """Return what obstore needs, from the environment of the AWS tools."""
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    settings = {"region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"}
    if endpoint:
        settings["endpoint"] = endpoint
    if any(env.get(name, "").lower() in ("1", "true", "yes") for name in ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE")):
        return settings | {"skip_signature": "true"}
    if not env.get("AWS_ACCESS_KEY_ID") or env.get("AWS_PROFILE"):
        return settings | _shared_credentials(env)
    # Said here too, though obstore reads them itself: a store is remembered by its settings, and keys may be replaced.
    names = {"AWS_ACCESS_KEY_ID": "access_key_id", "AWS_SECRET_ACCESS_KEY": "secret_access_key",
             "AWS_SESSION_TOKEN": "session_token"}  # fmt: skip
    return settings | {new: env[old] for old, new in names.items() if env.get(old)}


def _shared_credentials(env: Any) -> dict[str, str]:
    """Return the keys of AWS_PROFILE (default: 'default') in the shared credentials and config files."""
    profile = env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE") or "default"
    home = Path(env.get("HOME") or "~").expanduser() / ".aws"
    parser = configparser.ConfigParser(interpolation=None)
    named = env.get("AWS_SHARED_CREDENTIALS_FILE"), env.get("AWS_CONFIG_FILE")
    parser.read([named[0] or home / "credentials", named[1] or home / "config"])
    found: dict[str, str] = {}
    for section in (f"profile {profile}", profile):
        if parser.has_section(section):
            found |= dict(parser.items(section))
    if env.get("AWS_PROFILE") and not found:
        raise StorageError(f"AWS_PROFILE={profile} is in no credentials file; run 'aws configure --profile {profile}'")
    names = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
             "aws_session_token": "session_token", "region": "region", "endpoint_url": "endpoint"}  # fmt: skip
    return {new: found[old] for old, new in names.items() if old in found}


@contextmanager
def translated(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what the library behind a remote ``uri`` raises into our errors: for Zarr, which calls it by itself."""
    with (_translate if _by_obstore(uri) else _translate_fsspec)(uri, writing=writing):
        yield


@contextmanager
def _translate(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn obstore's errors into ours, once; the texts are ours, so no key or signature can leak."""
    from obstore import exceptions as foreign

    name, fail = redact(uri), OutputError if writing else StorageError
    try:
        yield
    except (foreign.NotFoundError, FileNotFoundError):
        raise (OutputError if writing else SlideNotFound)(f"{name}: no such object; check bucket and key") from None
    except (foreign.PermissionDeniedError, foreign.UnauthenticatedError):
        raise fail(f"{name}: access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE") from None
    except (foreign.BaseError, OSError, ValueError) as error:
        raise fail(f"{name}: {_reason(str(error))}") from None


def _reason(text: str) -> str:
    """Name the cause in words; a foreign text is not passed on, since it can hold request headers."""
    causes = {
        "169.254.169.254": "no AWS credentials; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_NO_SIGN_REQUEST",
        "credential": "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_NO_SIGN_REQUEST",
        "nosuchbucket": "no such bucket; check its name",
        "connect": "the server cannot be reached; check AWS_ENDPOINT_URL or the host name, and the network",
        "dns": "the server's name cannot be resolved; check AWS_ENDPOINT_URL or the host name",
        "timed out": "the server did not answer in time; try again",
        "timeout": "the server did not answer in time; try again",
        "range": _NO_RANGES,
        "403": "access denied; check the credentials",
        "500": "the server failed (500); try again",
        "503": "the server is overloaded (503); try again",
    }
    lower = text.lower().replace("retry_timeout", "")  # a setting that every error of obstore tells
    return next((say for word, say in causes.items() if word in lower), "the storage answered with an error; try again")


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:  # pragma: no cover - a core dependency
        raise MissingPackage("reading s3:// and http:// needs the package obstore; pip install obstore") from error
    return obstore


def _open_fsspec(uri: str) -> ByteStore:
    fs, path = _fsspec(uri)
    with _translate_fsspec(uri):
        detail = fs.info(path)
    if not detail.get("size"):
        raise StorageError(f"{redact(uri)}: the server does not say the size; copy the file to a local disk or to S3")

    if detail.get("partial") is False:
        raise StorageError(f"{redact(uri)}: {_NO_RANGES}")
    tag = str(detail.get("ETag") or "")
    # A server that keeps to RFC 9110 then refuses to serve parts of another version; weak tags cannot be asked for.
    asked = {"headers": {"If-Match": tag}} if tag.startswith('"') and uri.startswith("http") else {}

    def get(start: int, stop: int) -> tuple[bytes, str | None]:
        with _translate_fsspec(uri):
            return bytes(fs.cat_file(path, start=start, end=stop, **asked)), None

    return RemoteStore(uri, int(detail["size"]), None, get)


def _fsspec(uri: str) -> tuple[Any, str]:
    try:
        import fsspec

        fs, path = fsspec.url_to_fs(uri)
    except ImportError as error:
        raise MissingPackage(f"{redact(uri)}: reading this needs one more package of the fsspec family") from error
    except ValueError as error:
        raise SlideNotFound(
            f"{redact(uri)}: no storage is known by this scheme; use a path, s3://, http:// or https://"
        ) from error
    return fs, str(path)


@contextmanager
def _translate_fsspec(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn fsspec's errors into ours, once; each of its file systems raises what its own library raises."""
    try:
        yield
    except FileNotFoundError:
        fail = OutputError if writing else SlideNotFound
        raise fail(f"{redact(uri)}: no such object; check the address") from None
    except WsiError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever an fsspec file system raises is a storage error here
        if getattr(error, "status", None) == 412:
            raise SlideChanged(f"{redact(uri)} was replaced while it was read; run again") from None
        raise (OutputError if writing else StorageError)(f"{redact(uri)}: {_reason(str(error))}") from None
