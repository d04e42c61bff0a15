"""What foreign libraries of storage raise, said in our words: once, here. No text of theirs is passed on.

Errors of obstore come with the server's answer and sometimes with request headers in their text, so causes are
recognised by words in it, and what is shown is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from wsi_mmm.errors import OutputError, SlideChanged, SlideNotFound, StorageError, WsiError
from wsi_mmm.storage.uris import redact

NO_RANGES = "the server does not serve byte ranges; copy the file to a local disk or to S3"
# Phrases that remote.py recognises: the rest of a cause is for people.
UNREACHABLE = "the server cannot be reached; check AWS_ENDPOINT_URL or the host name, and the network"
SILENT = "the server did not answer in time; try again, or raise WSI_MMM_STORAGE_TIMEOUT (seconds)"
SHORT = "answers end early, again and again; check the server and what lies between, or copy the file to a local disk"
_BROKEN = "the connection broke; check the network and try again"
_ADDRESS = re.compile(r"https?://[^\s'\"]*")
_NETWORK = ("aiohttp", "botocore", "urllib3", "requests", "httpx", "httpcore", "aiobotocore", "asyncssh", "paramiko")

# Word in the foreign text -> what it means, and whether trying again may help. The first that fits counts.
_NO_KEYS = "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_NO_SIGN_REQUEST"
_NO_NAME = "the server's name cannot be resolved; check AWS_ENDPOINT_URL or the host name"
_CAUSES: tuple[tuple[str, str, bool], ...] = (
    ("credential", _NO_KEYS, False),
    ("nosuchbucket", "no such bucket; check its name", False),
    ("requesttimetooskewed", "this machine's clock is wrong; set it", False),
    ("dns error", _NO_NAME, True),
    ("failed to lookup address", _NO_NAME, True),
    ("certificate", "the server's certificate is not trusted; check the address, and SSL_CERT_FILE", False),
    ("connectionrefused", UNREACHABLE, True),
    ("connection refused", UNREACHABLE, True),
    ("kind: connect", UNREACHABLE, True),
    ("tcp connect error", UNREACHABLE, True),
    ("cannot connect", UNREACHABLE, True),
    ("status code: 429", "the server asks for fewer requests (429); try again later", True),
    ("status code: 408", SILENT, True),
    ("status code: 500", "the server failed (500); try again", True),
    ("status code: 502", "the server cannot be reached through its gateway (502); try again", True),
    ("status code: 503", "the server is overloaded (503); try again", True),
    ("status code: 504", "the server did not answer its gateway in time (504); try again", True),
    ("status code: 5", "the server failed; try again", True),
    ("notpartial", NO_RANGES, False),
    ("range request not supported", NO_RANGES, False),
    ("416 range", "the file is shorter than it was; run again", False),
    ("status code: 4", "the server refuses the request; check the address and the credentials", False),
    ("timedout", SILENT, True),
    ("timed out", SILENT, True),
    ("kind: timeout", SILENT, True),
    ("error sending request", _BROKEN, True),
    ("body error", SHORT, True),
    ("kind: interrupted", SHORT, True),
    ("kind: decode", SHORT, True),
)  # fmt: skip


class PassingError(StorageError):
    """A failed try that another one may mend. Never leaves this room."""


@contextmanager
def translated(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn errors of obstore and of fsspec's file systems into ours; passing ones too."""
    try:
        yield
    except WsiError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign file system raises is a storage error here
        raise _known(error, uri, writing=writing) from None


@contextmanager
def final(uri: str, *, writing: bool = False) -> Iterator[None]:
    """As ``translated``, where nothing is tried again: a passing error is a StorageError."""
    try:
        with translated(uri, writing=writing):
            yield
    except PassingError as error:
        raise passing(StorageError(str(error))) from None


def passing(error: StorageError) -> StorageError:
    """The same, marked as one that may be gone in a minute."""
    error.passing = True
    return error


def _known(error: Exception, uri: str, *, writing: bool) -> WsiError:
    name, kind = redact(uri), type(error).__name__
    status = getattr(error, "status", None)
    fail = OutputError if writing else StorageError
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError" or status == 404:
        return (OutputError if writing else SlideNotFound)(f"{name}: no such object; check bucket, key or address")
    if kind in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError") or status in (401, 403):
        return fail(f"{name}: access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE")
    if kind == "PreconditionError" or status == 412:
        return SlideChanged(f"{name} was replaced while it was read; run again")
    say, again = reason(error)
    if again:
        return passing(OutputError(f"{name}: {say}")) if writing else PassingError(f"{name}: {say}")
    return fail(f"{name}: {say}")


def reason(error: Exception) -> tuple[str, bool]:
    """Return the cause in words, and whether trying again may help."""
    status = getattr(error, "status", None)
    text = (f"status code: {status} " if isinstance(status, int) else "") + f"{type(error).__name__} {error}"
    if "169.254.169.254" in text:  # where keys are looked for when none are set
        return _NO_KEYS, False
    # Addresses may hold any word; a setting that every error of obstore tells is no time-out.
    lower = _ADDRESS.sub("", text).lower().replace("retry_timeout", "")
    for word, say, again in _CAUSES:
        if word in lower:
            return say, again
    if isinstance(error, (TimeoutError, ConnectionError, EOFError)) or type(error).__module__.startswith(_NETWORK):
        return _BROKEN, True
    return "the storage answered with an error; try again", False
