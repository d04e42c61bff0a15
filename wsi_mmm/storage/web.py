"""``http(s)://`` over aiohttp: answers that are checked, and redirects that never lead to an inner address.

Where a redirect leads is decided by a stranger, and an inner address (this machine, its network, the service that
gives machines of a cloud their keys) answers whoever asks from here. So one is followed to public addresses, and to an
inner one only when the address that the user gave is of the same kind; see `addresses`.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import quote, urljoin

from wsi_mmm.errors import NotFound, OutputError, StorageError, TransientCause, TransientError
from wsi_mmm.storage.addresses import Kinds, checked_socket, kinds_of
from wsi_mmm.storage.base import HEAD, BufferedStore, redact, split_address
from wsi_mmm.storage.limits import MAX_BYTES, unpack_file
from wsi_mmm.storage.ranges import Buffer
from wsi_mmm.storage.remote import (
    WHOLE,
    OnBegin,
    VersionedBytes,
    check_length,
    close_with_loop,
    fetch,
    opened_with,
)
from wsi_mmm.storage.translate import NO_RANGES, SHORT, status_error

if TYPE_CHECKING:
    import aiohttp
    import yarl

_REDIRECTS = 5
_REDIRECT = (301, 302, 303, 307, 308)
_CONNECT = 5.0  # seconds
_CLIENT = "aiohttp"
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)
_COPY = "copy the file to a local disk or to S3"
_PAGE = "the server answers with a web page, not with a file; log in and download it, or correct the address"
_OTHER_RANGE = f"the server answers with other bytes than were asked for (Content-Range {{}}); {_COPY}"
_COMPRESSED = f"the server compresses its answers ({{}}), although asked not to; {_COPY}"

_sessions: dict[tuple[int, Kinds | None], aiohttp.ClientSession] = {}


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of an object; ``size``: of the whole object, None when the server does not say it."""

    data: Buffer
    size: int | None
    version: str


def open_file(uri: str) -> BufferedStore:
    """Open the object with its first bytes. Raises NotFound, StorageError."""
    part = fetch(uri, HEAD, partial(_get_head, uri), _CLIENT)
    size = part.size
    if size is None:
        raise StorageError(f"{redact(uri)}: the server does not say the size; {_COPY}")

    async def get(start: int, stop: int, on_begin: OnBegin) -> VersionedBytes:
        found = await _get_part(uri, start, stop, on_begin)
        if found.size not in (None, size):
            return found.data, f"of {found.size} bytes"  # another version
        return found.data, found.version

    return opened_with(part.data, uri, size, part.version, get)


def read(uri: str) -> bytes:
    """Return the whole object. Raises NotFound, StorageError."""
    return fetch(uri, WHOLE, partial(_get_whole, uri), _CLIENT)


def exists(uri: str) -> bool:
    """Tell whether there is such an object. Raises StorageError when that cannot be found out."""

    async def look(on_begin: OnBegin) -> None:
        async with _send_request(uri, "HEAD") as answer:
            status = answer.status
        if status in (400, 403, 405, 501):  # of servers that know GET only, or of a signature for GET only
            async with _send_request(uri, "GET", {"Range": "bytes=0-0"}) as answer:
                status = 206 if answer.status == 416 else answer.status
        if status >= 300:
            raise status_error(status, uri)

    try:
        fetch(uri, 0, look, _CLIENT)
    except NotFound:
        return False
    return True


def list_uris(prefix: str) -> list[str]:
    """Raise StorageError: web servers have no listing."""
    raise StorageError(f"{redact(prefix)}: a web server cannot be searched; name each file, or list them in a manifest")


def list_folders(prefix: str) -> list[str]:
    """Raise StorageError: web servers have no listing."""
    return list_uris(prefix)


def write(uri: str, data: bytes) -> NoReturn:
    """Raise OutputError: web servers are read only."""
    raise OutputError(f"{redact(uri)}: http and https are for reading; choose a folder or s3:// to write to")


def delete(uri: str) -> None:
    """Raise OutputError: web servers are read only."""
    write(uri, b"")


# ---------------------------------------------------------------- requests


async def _get_head(uri: str, on_begin: OnBegin) -> _Part:
    part = await _get_part(uri, 0, HEAD, on_begin)
    if part.size is None:
        async with _send_request(uri, "HEAD") as answer:
            length = answer.headers.get("Content-Length", "")
            size = int(length) if answer.status == 200 and re.fullmatch(r"\d{1,18}", length) else None
        part = _Part(part.data, size, part.version)
    if part.size is not None:
        check_length(redact(uri), len(part.data), min(HEAD, part.size))
    return part


async def _get_part(uri: str, start: int, stop: int, on_begin: OnBegin) -> _Part:
    """Return the bytes from ``start`` to ``stop``, fewer where the object ends. Raises StorageError, NotFound."""
    async with _send_request(uri, "GET", {"Range": f"bytes={start}-{stop - 1}"}) as answer:
        said = answer.headers.get("Content-Range", "")
        if answer.status == 416 and start == 0 and said.replace(" ", "").lower() in ("bytes*/0", ""):
            return _Part(b"", 0, _version_of(answer))  # no range of an empty object is valid
        _check_answer(answer, uri, wanted=206)
        found = _RANGE.fullmatch(said.strip())
        first, last = (int(found[1]), int(found[2])) if found else (-1, -1)
        size = int(found[3]) if found and found[3] != "*" else None
        expected = stop if size is None else min(stop, size)
        if first != start or not start <= last < expected:
            raise StorageError(f"{redact(uri)}: {_OTHER_RANGE.format(said or 'missing')}")
        on_begin()
        data = await _read_body(answer, last - first + 1)
        if len(data) > last - first + 1:
            raise StorageError(f"{redact(uri)}: {_OTHER_RANGE.format(f'{said}, and more bytes')}")
        if len(data) <= last - first:
            raise TransientError(f"{redact(uri)}: {SHORT}", TransientCause.SHORT_ANSWER)
        return _Part(data, size, _version_of(answer))


async def _get_whole(uri: str, on_begin: OnBegin) -> bytes:
    async with _send_request(uri, "GET") as answer:
        packed = answer.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip")
        _check_answer(answer, uri, wanted=200, packed=packed)
        on_begin()
        data = await _read_body(answer, MAX_BYTES)
        if len(data) > MAX_BYTES:
            raise StorageError(f"{redact(uri)}: more than {MAX_BYTES >> 30} GiB; {_COPY}")
        return unpack_file(data, redact(uri), (), StorageError) if packed and data[:2] == b"\x1f\x8b" else data


def _check_answer(answer: aiohttp.ClientResponse, uri: str, *, wanted: int, packed: bool = False) -> None:
    """Raise StorageError unless an answer is as ``wanted``, and not compressed (``packed``: that is undone)."""
    coding = answer.headers.get("Content-Encoding", "identity").lower()
    if answer.status == wanted and coding not in ("identity", "") and not packed:
        raise StorageError(f"{redact(uri)}: {_COMPRESSED.format(coding)}")
    if answer.status == wanted:
        return
    if not 200 <= answer.status < 300:
        raise status_error(answer.status, uri)
    page = answer.headers.get("Content-Type", "").lower().startswith("text/html")
    raise StorageError(f"{redact(uri)}: {_PAGE if page else NO_RANGES}")


async def _read_body(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the body, or its first bytes when it is longer than ``most``."""
    parts, size = [], 0
    async for part in answer.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > most:
            break
    return b"".join(parts)


def _version_of(answer: aiohttp.ClientResponse) -> str:
    """Return the ETag of an object, or else its date."""
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


# ---------------------------------------------------------------- connections and redirects


@asynccontextmanager
async def _send_request(
    uri: str, method: str, headers: dict[str, str] | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request and give its answer, after at most `_REDIRECTS` redirects. Raises StorageError."""
    import aiohttp

    begun = url = _parse_url(uri, redact(uri))
    inner: Kinds | None = None
    for _ in range(_REDIRECTS + 1):
        proxy = _proxy_of(url)
        session = _open_session(None if proxy else inner)
        try:
            # Refusing compression: a range of compressed bytes is none of the object.
            options = {"Accept-Encoding": "identity", **(headers or {})}
            answer = await session.request(method, url, headers=options, allow_redirects=False, proxy=proxy)
        except aiohttp.ClientResponseError as error:
            text = f"{redact(uri)}: the answer is no HTTP that can be read; check the address"
            raise TransientError(text, TransientCause.BROKEN_CONNECTION) from error
        async with answer:
            if answer.status not in _REDIRECT:
                yield answer
                return
            url = _redirect_target(answer, uri, begun, url)
        inner = await _allowed_kinds(uri, begun, url)
    raise StorageError(f"{redact(uri)}: more than {_REDIRECTS} redirects; correct the address, or {_COPY}")


def _redirect_target(answer: aiohttp.ClientResponse, uri: str, begun: yarl.URL, url: yarl.URL) -> yarl.URL:
    """Return the address that an answer of ``url`` names. A login stays with the server that the user gave it for."""
    place = answer.headers.get("Location", "")
    if not place:
        raise StorageError(f"{redact(uri)}: the server has moved it ({answer.status}) and does not say where to")
    try:
        target = urljoin(str(url), place)
    except ValueError:
        target = place  # no address, which is said below
    name = f"{redact(uri)}, redirected to {redact(target)},"
    if split_address(target).scheme not in ("http", "https"):
        raise StorageError(f"{name} leads to something else than a web server; correct the address")
    found = _parse_url(target, name).with_user(None)
    if url.scheme == "https" and found.scheme != "https":
        raise StorageError(f"{name} would leave TLS; give that address if you trust it")
    if found.origin() == begun.origin():
        return found.with_user(begun.user).with_password(begun.password) if begun.user else found
    return found


async def _allowed_kinds(uri: str, begun: yarl.URL, target: yarl.URL) -> Kinds:
    """Return the kinds of inner addresses that a redirect may reach. Raises StorageError when ``target`` is another."""
    loop = asyncio.get_running_loop()
    allowed, found = [await loop.run_in_executor(None, kinds_of, url.host or "") for url in (begun, target)]
    if found - allowed:
        raise StorageError(
            f"{redact(uri)}: redirected to an inner address ({', '.join(sorted(found - allowed))}) at {target.host}, "
            "which is not followed; give that address itself if you trust it"
        )
    return allowed


def _open_session(inner: Kinds | None) -> aiohttp.ClientSession:
    """Return this process's connections, called in the loop: to any address, or of redirects, to public and ``inner``.

    The addresses of redirects are looked at when they are connected to: a name may mean another one by then.
    """
    key = os.getpid(), inner
    if key not in _sessions:
        import aiohttp

        factory = None if inner is None else partial(checked_socket, inner)
        # No cookies and no netrc, on purpose: only what the address holds is sent.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context(), socket_factory=factory,
                                           keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT),
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, read_bufsize=1 << 20,
        )  # fmt: skip
        _sessions[key] = session
        close_with_loop(session.close)
    return _sessions[key]


def _parse_url(uri: str, name: str) -> yarl.URL:
    """Return the address with what may not stand in one quoted, and the rest as it is: a signature covers it."""
    import yarl

    parts = split_address(uri)
    try:
        base = yarl.URL(f"{parts.scheme}://{parts.netloc}")
        host = base.host
    except ValueError:
        host = None
    if not host:
        raise StorageError(f"{name} is no address; write it as http://HOST/FILE or https://HOST/FILE")
    stray = re.compile(r"%(?![0-9A-Fa-f]{2})")
    path, query = [quote(stray.sub("%25", text), safe="%/:?@!$&'()*+,;=-._~") for text in (parts.path, parts.query)]
    return yarl.URL(f"{str(base).rstrip('/')}{path or '/'}{'?' if query else ''}{query}", encoded=True)


def _proxy_of(url: yarl.URL) -> str | None:
    """Return the proxy that the environment names for an address."""
    names = (f"{url.scheme}_proxy", f"{url.scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    if not any(map(os.environ.get, names)):
        return None
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    found = proxies.get(url.scheme) or proxies.get("all") or ""
    return found if found.startswith(("http://", "https://")) and not proxy_bypass(url.host or "") else None
