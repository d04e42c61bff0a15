"""Errors of remote storage libraries, translated into ours: once, here. None of their text is passed on.

Errors of obstore come with the server's answer and sometimes with request headers in their text, so causes are
recognised by words in it, and what is shown is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from wsi_mmm.errors import NotFound, OutputError, SlideChanged, StorageError, TransientCause, TransientError, WsiError
from wsi_mmm.storage.base import redact

NO_RANGES = "the server does not serve byte ranges; copy the file to a local disk or to S3"
UNREACHABLE = "the server cannot be reached; check AWS_ENDPOINT_URL or the host name, and the network"
SILENT = "the server did not answer in time; try again, or raise WSI_MMM_STORAGE_TIMEOUT (seconds)"
SHORT = "answers end early, again and again; check the server and what lies between, or copy the file to a local disk"
_BROKEN = "the connection broke; check the network and try again"
_ADDRESS = re.compile(r"https?://[^\s'\"]*")
_NETWORK = ("aiohttp", "botocore", "urllib3", "requests", "httpx", "httpcore", "aiobotocore", "asyncssh", "paramiko")

# Word in the foreign text -> text of our error, and why trying again may help (None: it does not). The first counts.
_NO_KEYS = "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_NO_SIGN_REQUEST"
_NO_NAME = "the server's name cannot be resolved; check AWS_ENDPOINT_URL or the host name"
_CAUSES: tuple[tuple[str, str, TransientCause | None], ...] = (
    ("credential", _NO_KEYS, None),
    ("nosuchbucket", "no such bucket; check its name", None),
    ("requesttimetooskewed", "this machine's clock is wrong; set it", None),
    ("dns error", _NO_NAME, TransientCause.UNREACHABLE),
    ("failed to lookup address", _NO_NAME, TransientCause.UNREACHABLE),
    ("certificate", "the server's certificate is not trusted; check the address, and SSL_CERT_FILE", None),
    ("connectionrefused", UNREACHABLE, TransientCause.UNREACHABLE),
    ("connection refused", UNREACHABLE, TransientCause.UNREACHABLE),
    ("kind: connect", UNREACHABLE, TransientCause.UNREACHABLE),
    ("tcp connect error", UNREACHABLE, TransientCause.UNREACHABLE),
    ("cannot connect", UNREACHABLE, TransientCause.UNREACHABLE),
    ("status code: 429", "the server asks for fewer requests (429); try again later", TransientCause.TOO_MANY_REQUESTS),
    ("status code: 408", SILENT, TransientCause.TIMEOUT),
    ("status code: 500", "the server failed (500); try again", TransientCause.SERVER_ERROR),
    ("status code: 502", "the server's gateway cannot reach it (502); try again", TransientCause.OVERLOADED),
    ("status code: 503", "the server is overloaded (503); try again", TransientCause.OVERLOADED),
    ("status code: 504", "the server did not answer its gateway in time (504); try again", TransientCause.OVERLOADED),
    ("status code: 5", "the server failed; try again", TransientCause.SERVER_ERROR),
    ("notpartial", NO_RANGES, None),
    ("range request not supported", NO_RANGES, None),
    ("416 range", "the file is shorter than it was; run again", None),
    ("status code: 4", "the server refuses the request; check the address and the credentials", None),
    ("timedout", SILENT, TransientCause.TIMEOUT),
    ("timed out", SILENT, TransientCause.TIMEOUT),
    ("kind: timeout", SILENT, TransientCause.TIMEOUT),
    ("error sending request", _BROKEN, TransientCause.BROKEN_CONNECTION),
    ("body error", SHORT, TransientCause.SHORT_ANSWER),
    ("kind: interrupted", SHORT, TransientCause.SHORT_ANSWER),
    ("kind: decode", SHORT, TransientCause.SHORT_ANSWER),
)  # fmt: skip


@contextmanager
def translate_errors(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn errors of obstore and of fsspec's file systems into ours."""
    try:
        yield
    except WsiError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign file system raises is a storage error here
        raise _translate_error(error, uri, writing=writing) from None


def _translate_error(error: Exception, uri: str, *, writing: bool) -> WsiError:
    name, kind = redact(uri), type(error).__name__
    status = getattr(error, "status", None)
    fail = OutputError if writing else StorageError
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError" or status == 404:
        return (OutputError if writing else NotFound)(f"{name}: no such object; check bucket, key or address")
    if kind in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError") or status in (401, 403):
        return fail(f"{name}: access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE")
    if kind == "PreconditionError" or status == 412:
        return SlideChanged(f"{name} was replaced while it was read; run again")
    text, cause = _explain_error(error)
    return fail(f"{name}: {text}") if cause is None else TransientError(f"{name}: {text}", cause)


def _explain_error(error: Exception) -> tuple[str, TransientCause | None]:
    """Return the text for an error of ours, and why trying again may help (None: it does not)."""
    status = getattr(error, "status", None)
    text = (f"status code: {status} " if isinstance(status, int) else "") + f"{type(error).__name__} {error}"
    if "169.254.169.254" in text:  # the metadata address, asked for keys when none are set
        return _NO_KEYS, None
    # Addresses may hold any word, and every error of obstore names its setting retry_timeout.
    lower = _ADDRESS.sub("", text).lower().replace("retry_timeout", "")
    for word, meaning, cause in _CAUSES:
        if word in lower:
            return meaning, cause
    if isinstance(error, (TimeoutError, ConnectionError, EOFError)) or type(error).__module__.startswith(_NETWORK):
        return _BROKEN, TransientCause.BROKEN_CONNECTION
    return "the storage answered with an error; try again", None
