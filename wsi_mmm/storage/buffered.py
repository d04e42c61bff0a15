"""A read-ahead buffer used while an object is opened, so that small reads of its directories cost few requests."""

from __future__ import annotations

from wsi_mmm.storage.base import ByteStore
from wsi_mmm.storage.ranges import Buffer, Ranges

HEAD = 256 << 10  # bytes: the header, and in most slides the tables of tiles behind it
_WINDOW = 256 << 10
_TAIL = 1 << 20  # when no more than this follows a read, all of it is read
_MOST = 4 << 20  # bytes kept


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
        self._buffers = []
        self._inner.close()


def buffered(store: ByteStore) -> BufferedStore:
    """Return ``store`` with a read-ahead buffer; itself when it has one."""
    return store if isinstance(store, BufferedStore) else BufferedStore(store)
