"""GET requests to a slide service: verified TLS, a bearer token that is never shown, answers of bounded size.

They run in the event loop of `remote`, which retries broken connections and 502, 503, 504.
Every other answer but 2xx is an error at once (429 one that may pass). No redirect is followed: the token goes to the
named host only.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from wsi_mmm.errors import NotFound, StorageError, TransientCause, TransientError, WsiError
from wsi_mmm.storage.ranges import Counter
from wsi_mmm.storage.remote import Endpoint, OnBegin, close_with_loop, request, wait_for
from wsi_mmm.storage.translate import SHORT
from wsi_mmm.timing import timed

if TYPE_CHECKING:
    import aiohttp

_CONCURRENT = 8  # requests to one service: each makes it decode and encode a picture
_CONNECT = 5.0  # seconds
_MOST_JSON = 1 << 20  # bytes of a description
_AGAIN = (502, 503, 504)
_NOWHERE = "the host cannot be resolved or reached; check its name and port, and the network"
_BROKEN = "the connection broke; check the network and try again"
_TRUST = "the service's certificate is not trusted; check the address, and SSL_CERT_FILE"
_NO_TLS = "the service does not speak TLS at this port; check the address, or give it as http://"
_STATUS = {
    400: "the service refuses the request (400); is the slide one that it can open?",
    404: "no such slide (404); check its id and the address",
    413: "the service refuses pictures of this size (413); ask who runs it to allow 1 megapixel",
    422: "the service refuses the request (422); check the slide's id, and that it is a WSI service of v3",
    429: "the service asks for fewer requests (429); try again later",
}


class ServiceClient:
    """The token and the connections of one service. Thread-safe; lives as long as the process."""

    def __init__(self, token: str | None, seconds: float, *, tls: bool, advice: str) -> None:
        """``seconds`` until a request and its retries are given up; ``advice``: how to give a (new) token."""
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls, self._advice = tls, advice
        # After 429 a service needs a longer rest than the pauses between retries here.
        self._endpoint = Endpoint(seconds, _CONCURRENT, doubles=False, final={TransientCause.TOO_MANY_REQUESTS})
        self._held: tuple[int, aiohttp.ClientSession] | None = None

    def get_many(self, urls: Sequence[str], most: Sequence[int], *, name: str, counter: Counter) -> list[bytes]:
        """Return the answers in order, at most ``most`` bytes each. Raises NotFound, StorageError."""
        with timed("fetch"):
            return wait_for(self._fetch_all(urls, most, name, counter))

    def get_json(self, url: str, *, name: str) -> Any:
        """Return the JSON value of an answer of at most 1 MB; None when it is no JSON. Raises as `get_many`."""
        try:
            return json.loads(self.get_many([url], [_MOST_JSON], name=name, counter=Counter())[0])
        except (ValueError, RecursionError):
            return None

    async def _fetch_all(self, urls: Sequence[str], most: Sequence[int], name: str, counter: Counter) -> list[bytes]:
        sends = [partial(self._send_request, url, size, name, counter) for url, size in zip(urls, most, strict=True)]
        tasks = [asyncio.create_task(request(self._endpoint, name, 0, send)) for send in sends]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _send_request(self, url: str, most: int, name: str, counter: Counter, on_begin: OnBegin) -> bytes:
        import yarl

        with _translate_errors(name):
            address = yarl.URL(url, encoded=True)
            async with self._open_session().get(address, headers=self._headers, allow_redirects=False) as answer:
                on_begin()
                if not 200 <= answer.status < 300:
                    raise _refusal_error(answer.status, name, self._advice, sent=bool(self._headers))
                data = await _read_body(answer, most, name)
                counter.add(len(data))
                return data

    def _open_session(self) -> aiohttp.ClientSession:
        """Return this process's connections; called in the loop."""
        if self._held is None or self._held[0] != os.getpid():
            session = _new_session(tls=self._tls)
            close_with_loop(session.close)
            self._held = (os.getpid(), session)
        return self._held[1]


@cache
def service_client(origin: str, token: str | None, seconds: float, advice: str) -> ServiceClient:
    """Return the client of a service at ``scheme://host:port``, the same for the same arguments."""
    return ServiceClient(token, seconds, tls=origin.startswith("https://"), advice=advice)


def _new_session(*, tls: bool) -> aiohttp.ClientSession:
    import aiohttp

    # No proxies, cookies or netrc, on purpose: only what is set here is sent.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=ssl.create_default_context() if tls else True, limit=2 * _CONCURRENT),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def _read_body(answer: aiohttp.ClientResponse, most: int, name: str) -> bytes:
    parts, size = [], 0
    async for part in answer.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > most:
            raise StorageError(f"{name}: the service sent more than the {most} bytes expected; is it a WSI service?")
    return b"".join(parts)


def _refusal_error(status: int, name: str, advice: str, *, sent: bool) -> WsiError:
    if status == 401:
        return StorageError(f"{name}: the service {'refuses the token' if sent else 'wants a token'} (401); {advice}")
    if status == 403:
        return StorageError(f"{name}: access denied (403); ask for access to this slide, or {advice}")
    if status in _AGAIN:
        text = f"{name}: the service is overloaded or cannot be reached ({status}); try again"
        return TransientError(text, TransientCause.OVERLOADED)
    if status >= 500:
        return StorageError(f"{name}: the service failed ({status}); ask who runs it, its log says why")
    if 300 <= status < 400:
        return StorageError(f"{name}: the service has moved ({status}); give its new address")
    text = f"{name}: {_STATUS.get(status, f'the service refuses the request ({status}); check the address')}"
    if status == 429:
        return TransientError(text, TransientCause.TOO_MANY_REQUESTS)
    return (NotFound if status == 404 else StorageError)(text)


@contextmanager
def _translate_errors(name: str) -> Iterator[None]:
    """Turn errors of aiohttp into ours; none of their text is passed on."""
    import aiohttp

    try:
        yield
    except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError):
        raise StorageError(f"{name}: {_TRUST}") from None
    except aiohttp.ClientSSLError:
        raise StorageError(f"{name}: {_NO_TLS}") from None
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        raise TransientError(f"{name}: {_NOWHERE}", TransientCause.UNREACHABLE) from None
    except aiohttp.ClientPayloadError:
        raise TransientError(f"{name}: {SHORT}", TransientCause.SHORT_ANSWER) from None
    except aiohttp.InvalidURL:
        raise StorageError(f"{name} is no address; give wsi://HOST/v3/slides/ID") from None
    except (aiohttp.ClientError, OSError, EOFError):
        raise TransientError(f"{name}: {_BROKEN}", TransientCause.BROKEN_CONNECTION) from None
