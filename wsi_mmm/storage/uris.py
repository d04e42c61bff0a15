"""Arithmetic of URIs; no I/O."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

_SERVED = re.compile(r"(/[^?#]*)?/v3/slides/[^/]+/?")
_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


def is_local(uri: str) -> bool:
    """Tell whether ``uri`` is a path or a ``file://`` URI (a Windows drive letter is a path)."""
    return not _SCHEME.match(uri) or uri.startswith("file://")


def is_service(uri: str) -> bool:
    """Tell whether ``uri`` is a slide of a WSI service: ``wsi://``, or http(s) whose path ends in ``/v3/slides/ID``.

    Over http(s) an ID with a dot means a file.
    """
    parts = urlsplit(uri)
    if parts.scheme == "wsi":
        return _SERVED.fullmatch(parts.path) is not None
    served = parts.scheme in ("http", "https") and _SERVED.fullmatch(parts.path) is not None
    return served and "." not in parts.path.rstrip("/").rpartition("/")[2]


def local_path(uri: str) -> Path:
    """Return the path of a local URI."""
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file://") else Path(uri)


def join(uri: str, *parts: str) -> str:
    """Return ``uri`` with ``parts`` below it, '/' between them."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def redact(uri: str) -> str:
    """Return ``uri`` without user, password, query and fragment, fit to be shown."""
    if is_local(uri):
        return uri
    parts = urlsplit(uri)
    if parts.scheme in ("s3", "s3a", "gs"):
        scheme, rest = uri.split("://", 1)
        bucket, slash, key = rest.partition("/")
        return f"{scheme}://{bucket.rpartition('@')[2]}{slash}{key}"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
