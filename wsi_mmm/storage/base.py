"""The ground of this folder: URIs (arithmetic, no I/O), and the port: one object, read in ranges.

A read-ahead buffer stands in front of an object while it is opened, so that small reads of its directories cost few
requests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from wsi_mmm.errors import StorageError, printable
from wsi_mmm.storage.ranges import Buffer, Counter, Ranges

HEAD = 256 << 10  # bytes: the header, and in most slides the tables of tiles behind it
_WINDOW = 256 << 10
_TAIL = 1 << 20  # when no more than this follows a read, all of it is read
_MOST = 4 << 20  # bytes kept
_SERVED = re.compile(r"(/[^?#]*)?/v3/slides/[^/]+/?")
_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


# ---------------------------------------------------------------- URIs


def is_local(uri: str) -> bool:
    """Tell whether ``uri`` is a path or a ``file://`` URI (a Windows drive letter is a path)."""
    return not _SCHEME.match(uri) or uri.startswith("file://")


def scheme_of(uri: str) -> str:
    """Return the scheme in small letters; empty for a path."""
    return uri.partition("://")[0].lower() if _SCHEME.match(uri) else ""


def is_service(uri: str) -> bool:
    """Tell whether ``uri`` is a slide of a WSI service: ``wsi://``, or http(s) whose path ends in ``/v3/slides/ID``.

    Over http(s) an ID with a dot means a file.
    """
    parts = split_address(uri)
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


def split_address(uri: str) -> SplitResult:
    """Return the parts of a URI. Raises StorageError for one whose host cannot be read."""
    try:
        return urlsplit(uri)
    except ValueError as error:
        raise StorageError(f"{redact(uri)} is no address: its host cannot be read; correct it") from error


def redact(uri: str) -> str:
    """Return ``uri`` without user, password, query and fragment, fit to be shown: control characters as \\x0a, and see
    `printable`."""
    uri = printable(uri)
    if is_local(uri):
        return uri
    scheme, rest = uri.split("://", 1)
    host, slash, path = rest.partition("/")
    if scheme_of(uri) not in ("s3", "s3a", "gs"):  # whose keys may hold '?' and '#'
        cut = re.match(r"([^?#]*)", rest)
        host, slash, path = (cut[1] if cut else "").partition("/")
    shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", shown)


# ---------------------------------------------------------------- objects


class ByteStore(Protocol):
    """One object, read in ranges; thread-safe. ``remote``: reading waits for a network."""

    uri: str
    size: int
    etag: str | None
    counter: Counter
    remote: bool

    def get_ranges(self, ranges: Ranges) -> list[Buffer]:
        """Return the bytes of each (start, length); short where the object ends. StorageError, SlideChanged.

        ``ranges`` may be int64[n, 2]. Views, not copies: one of them keeps its whole span in memory.
        """

    def close(self) -> None:
        """Close files and connections."""


class BufferedStore:
    """A ByteStore that keeps what ``read_ahead`` fetched and serves ranges from it."""

    def __init__(self, inner: ByteStore, head: Buffer = b"") -> None:
        self.uri, self.size, self.etag, self.counter = inner.uri, inner.size, inner.etag, inner.counter
        self.remote = inner.remote
        self._inner = inner
        self._buffers: list[tuple[int, memoryview]] = [(0, memoryview(head))] if len(head) else []

    def read_ahead(self, start: int, length: int) -> Buffer:
        """Return the bytes, short where the object ends; the bytes after them are fetched too and kept."""
        found = self._find_held(start, length)
        if found is not None:
            return found
        rest = self.size - start
        reach = max(length, rest if rest <= _TAIL else _WINDOW)
        data = memoryview(self._inner.get_ranges([(start, reach)])[0])
        if sum(len(d) for _, d in self._buffers) + len(data) <= _MOST:
            self._buffers.append((start, data))
        return data[:length]

    def get_ranges(self, ranges: Ranges) -> list[Buffer]:
        """Return the bytes of each (start, length); short where the object ends."""
        if not self._buffers:
            return self._inner.get_ranges(ranges)
        found = [self._find_held(start, length) for start, length in ranges]
        missing = [r for r, data in zip(ranges, found, strict=True) if data is None]
        fetched = iter(self._inner.get_ranges(missing) if missing else [])
        return [next(fetched) if data is None else data for data in found]

    def _find_held(self, start: int, length: int) -> Buffer | None:
        length = max(0, min(length, self.size - start))
        for begin, data in self._buffers:
            if begin <= start and start + length <= begin + len(data):
                return data[start - begin : start - begin + length]
        return None if length else b""

    def drop_buffers(self) -> ByteStore:
        """Drop the buffers once the object is open, and return it."""
        self._buffers = []
        return self._inner

    def close(self) -> None:
        """Drop the buffers and close files and connections."""
        self.drop_buffers().close()


def buffered(store: ByteStore) -> BufferedStore:
    """Return ``store`` with a read-ahead buffer; itself when it has one."""
    return store if isinstance(store, BufferedStore) else BufferedStore(store)
