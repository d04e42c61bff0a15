"""Pieces of an object held while it is opened, so that reading its directories here and there costs few requests."""

from __future__ import annotations

from wsi_mmm.storage.base import ByteStore
from wsi_mmm.storage.ranges import Buffer, Ranges

HEAD = 256 << 10  # bytes: the header, and in most slides the tables of tiles behind it
_WINDOW = 256 << 10
_REST = 1 << 20  # when no more than this is left behind a piece, all of it is read
_MOST = 4 << 20  # bytes held


class HeldStore:
    """A ByteStore that holds what ``piece`` brought, more than was asked for, and serves ranges from it."""

    def __init__(self, inner: ByteStore, head: Buffer = b"") -> None:
        self.uri, self.size, self.etag, self.counter = inner.uri, inner.size, inner.etag, inner.counter
        self.remote = inner.remote
        self._inner = inner
        self._held: list[tuple[int, memoryview]] = [(0, memoryview(head))] if len(head) else []

    def piece(self, start: int, length: int) -> Buffer:
        """Return the bytes, short where the object ends; what lies behind them is read along and held."""
        found = self._find(start, length)
        if found is not None:
            return found
        rest = self.size - start
        reach = max(length, rest if rest <= _REST else _WINDOW)
        data = memoryview(self._inner.get_ranges([(start, reach)])[0])
        if sum(len(d) for _, d in self._held) + len(data) <= _MOST:
            self._held.append((start, data))
        return data[:length]

    def get_ranges(self, ranges: Ranges) -> list[Buffer]:
        """Return the bytes of each (start, length); short where the object ends."""
        if not self._held:
            return self._inner.get_ranges(ranges)
        found = [self._find(start, length) for start, length in ranges]
        missing = [r for r, data in zip(ranges, found, strict=True) if data is None]
        fetched = iter(self._inner.get_ranges(missing) if missing else [])
        return [next(fetched) if data is None else data for data in found]

    def _find(self, start: int, length: int) -> Buffer | None:
        length = max(0, min(length, self.size - start))
        for begin, data in self._held:
            if begin <= start and start + length <= begin + len(data):
                return data[start - begin : start - begin + length]
        return None if length else b""

    def release(self) -> None:
        """Forget the pieces: the object is open."""
        self._held = []

    def close(self) -> None:
        """Let go of pieces, files and connections."""
        self._held = []
        self._inner.close()


def held(store: ByteStore) -> HeldStore:
    """Return a store that holds pieces: itself when it does."""
    return store if isinstance(store, HeldStore) else HeldStore(store)
