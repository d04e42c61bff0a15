"""Errors of remote storage libraries, translated into ours: once, here. None of their text is passed on.

A status of HTTP means the same whichever client saw it. Errors of obstore come with the server's answer and sometimes
with request headers in their text, so causes are recognised by words in it, and what is shown is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from wsi_mmm.errors import NotFound, OutputError, SlideChanged, StorageError, TransientCause, TransientError, WsiError
from wsi_mmm.storage.base import redact, scheme_of

NO_RANGES = "the server does not serve byte ranges; copy the file to a local disk or to S3"
UNREACHABLE = "the server cannot be reached; check {host}, and the network"
SILENT = "the server did not answer in time; try again, or raise WSI_MMM_STORAGE_TIMEOUT (seconds)"
SHORT = "answers end early, again and again; check the server and what lies between, or copy the file to a local disk"
_BROKEN = "the connection broke; check the network and try again"
_ADDRESS = re.compile(r"https?://[^\s'\"]*")
_NETWORK = ("aiohttp", "botocore", "urllib3", "requests", "httpx", "httpcore", "aiobotocore", "asyncssh", "paramiko")

# Word in the foreign text -> text of our error, and why trying again may help (None: it does not). The first counts.
_NO_KEYS = "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_NO_SIGN_REQUEST"
_NO_NAME = "the server's name cannot be resolved; check {host}"
_NO_TLS = "the server does not speak TLS at this port; check the address"
_CAUSES: tuple[tuple[str, str, TransientCause | None], ...] = (
    ("credential", _NO_KEYS, None),
    ("nosuchbucket", "no such bucket; check its name", None),
    ("requesttimetooskewed", "this machine's clock is wrong; set it", None),
    ("dns error", _NO_NAME, TransientCause.UNREACHABLE),
    ("failed to lookup address", _NO_NAME, TransientCause.UNREACHABLE),
    ("clientconnectordnserror", _NO_NAME, TransientCause.UNREACHABLE),
    ("certificate", "the server's certificate is not trusted; check the address, and SSL_CERT_FILE", None),
    ("clientconnectorsslerror", _NO_TLS, None),
    ("connectionrefused", UNREACHABLE, TransientCause.UNREACHABLE),
    ("connection refused", UNREACHABLE, TransientCause.UNREACHABLE),
    ("kind: connect", UNREACHABLE, TransientCause.UNREACHABLE),
    ("tcp connect error", UNREACHABLE, TransientCause.UNREACHABLE),
    ("cannot connect", UNREACHABLE, TransientCause.UNREACHABLE),
    ("endpointconnectionerror", UNREACHABLE, TransientCause.UNREACHABLE),
    ("connectiontimeouterror", UNREACHABLE, TransientCause.UNREACHABLE),
    ("status code: 429", "the server asks for fewer requests (429); try again later", TransientCause.TOO_MANY_REQUESTS),
    ("status code: 408", SILENT, TransientCause.TIMEOUT),
    ("status code: 500", "the server failed (500); try again", TransientCause.SERVER_ERROR),
    ("status code: 502", "the server's gateway cannot reach it (502); try again", TransientCause.OVERLOADED),
    ("status code: 503", "the server is overloaded (503); try again", TransientCause.OVERLOADED),
    ("status code: 504", "the server did not answer its gateway in time (504); try again", TransientCause.OVERLOADED),
    ("status code: 5", "the server failed ({status}); try again", TransientCause.SERVER_ERROR),
    ("notpartial", NO_RANGES, None),
    ("range request not supported", NO_RANGES, None),
    ("416 range", "the file is shorter than it was; run again", None),
    ("status code: 4", "the server refuses the request ({status}); check the address and the credentials", None),
    ("timedout", SILENT, TransientCause.TIMEOUT),
    ("timed out", SILENT, TransientCause.TIMEOUT),
    ("kind: timeout", SILENT, TransientCause.TIMEOUT),
    ("error sending request", _BROKEN, TransientCause.BROKEN_CONNECTION),
    ("body error", SHORT, TransientCause.SHORT_ANSWER),
    ("kind: interrupted", SHORT, TransientCause.SHORT_ANSWER),
    ("kind: decode", SHORT, TransientCause.SHORT_ANSWER),
    ("clientpayloaderror", SHORT, TransientCause.SHORT_ANSWER),
)  # fmt: skip

_FINAL = (401, 403, 404, 410, 412)


@contextmanager
def translate_errors(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn errors of obstore and of fsspec's file systems into ours."""
    try:
        yield
    except WsiError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign file system raises is a storage error here
        raise _translate_error(error, uri, writing=writing) from None


def status_error(status: int, uri: str, *, writing: bool = False) -> WsiError:
    """Return the error that a status of HTTP other than success means; a TransientError when it may pass."""
    name, fail = redact(uri), OutputError if writing else StorageError
    if status in (404, 410):
        return (OutputError if writing else NotFound)(f"{name}: no such object; check bucket, key or address")
    if status in (401, 403):
        keys = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
        remedy = keys if _is_bucket(uri) else "the address, and that its login or signature is valid"
        return fail(f"{name}: access denied ({status}); check {remedy}")
    if status == 412:
        return SlideChanged(f"{name} was replaced while it was read; run again")
    text, cause = _find_cause(f"status code: {status} ", uri)
    return fail(f"{name}: {text}") if cause is None else TransientError(f"{name}: {text}", cause)


def _translate_error(error: Exception, uri: str, *, writing: bool) -> WsiError:
    name, kind, status = redact(uri), type(error).__name__, _find_status(error)
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError":
        status = 404
    elif kind in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError"):
        status = status or (401 if kind == "UnauthenticatedError" else 403)
    elif kind == "PreconditionError":
        status = 412
    if status in _FINAL and kind != "NoSuchBucket":
        return status_error(status, uri, writing=writing)
    text, cause = _explain_error(error, uri, status)
    if cause is not None:
        return TransientError(f"{name}: {text}", cause)
    return (OutputError if writing else StorageError)(f"{name}: {text}")


def _is_bucket(uri: str) -> bool:
    return scheme_of(uri) in ("s3", "s3a")


def _find_status(error: Exception) -> int | None:
    """Return the status that an error of aiohttp, requests, httpx or botocore came with, if any."""
    answer = getattr(error, "response", None)
    metadata = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
    found = (
        getattr(error, "status", None), getattr(error, "status_code", None),
        getattr(answer, "status_code", None), metadata.get("HTTPStatusCode"),
    )  # fmt: skip
    return next((status for status in found if isinstance(status, int) and 400 <= status < 600), None)


def _explain_error(error: Exception, uri: str, status: int | None) -> tuple[str, TransientCause | None]:
    """Return the text for an error of ours, and why trying again may help (None: it does not)."""
    text = (f"status code: {status} " if status else "") + f"{type(error).__name__} {error}"
    if "169.254.169.254" in text and _is_bucket(uri):  # the metadata address, asked for keys when none are set
        return _NO_KEYS, None
    # Addresses may hold any word, and every error of obstore names its setting retry_timeout.
    found, cause = _find_cause(_ADDRESS.sub("", text).lower().replace("retry_timeout", ""), uri)
    if found:
        return found, cause
    if isinstance(error, (TimeoutError, ConnectionError, EOFError)) or type(error).__module__.startswith(_NETWORK):
        return _BROKEN, TransientCause.BROKEN_CONNECTION
    return "the storage answered with an error; try again", None


def _find_cause(lower: str, uri: str) -> tuple[str, TransientCause | None]:
    """Return text and cause of the first row of `_CAUSES` whose word is in a foreign text; empty when none is."""
    number = re.search(r"status code: (\d+)", lower)
    host = "AWS_ENDPOINT_URL or the host name" if _is_bucket(uri) else "the host name"
    for word, meaning, cause in _CAUSES:
        if word in lower:
            return meaning.format(host=host, status=number[1] if number else ""), cause
    return "", None
