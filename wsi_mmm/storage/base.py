"""The port of this folder: one object, read in ranges."""

from __future__ import annotations

from typing import Protocol

from wsi_mmm.storage.ranges import Buffer, Counter, Ranges


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
