"""Decoded native tiles, bounded in bytes; a tile that one thread is decoding is waited for, never decoded twice."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

TileKey = TypeVar("TileKey", bound=Hashable)
Value = TypeVar("Value")

LoadMissing = Callable[[Sequence[TileKey]], Iterator[tuple[TileKey, Value, int]]]  # keys -> (key, value, bytes)


class TileCache(Generic[TileKey, Value]):
    """Least recently used goes first; *cold* values (unlikely to be asked again) go before all others."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._hot: OrderedDict[TileKey, tuple[Value, int]] = OrderedDict()
        self._cold: OrderedDict[TileKey, tuple[Value, int]] = OrderedDict()
        self._loading: set[TileKey] = set()
        self._changed = threading.Condition()

    def visit(
        self,
        keys: Sequence[TileKey],
        load: LoadMissing[TileKey, Value],
        use: Callable[[TileKey, Value], None],
        cold: Callable[[TileKey], bool],
    ) -> None:
        """Call ``use`` once with every key's value; ``load`` is asked only for what nobody has or is loading.

        What ``load`` raises goes to the caller; other threads that waited for those keys then load them themselves.
        """
        left = list(keys)
        while left:
            have, mine, theirs = self._claim_keys(left)
            for key, value in have:
                use(key, value)
            if mine:
                with self._release_keys(mine):
                    for key, value, size in load(mine):
                        use(key, value)
                        self._store_value(key, value, size, cold=cold(key))
            elif theirs and not have:
                self._wait_for(theirs)
            left = theirs

    def missing(self, keys: Sequence[TileKey]) -> list[TileKey]:
        """Return which of ``keys`` are not here at this moment."""
        with self._changed:
            return [key for key in keys if key not in self._hot and key not in self._cold]

    def clear(self) -> None:
        """Forget everything."""
        with self._changed:
            self._hot.clear()
            self._cold.clear()
            self.used = 0

    def _claim_keys(self, keys: Sequence[TileKey]) -> tuple[list[tuple[TileKey, Value]], list[TileKey], list[TileKey]]:
        have: list[tuple[TileKey, Value]] = []
        mine: list[TileKey] = []
        theirs: list[TileKey] = []
        with self._changed:
            for key in keys:
                found = self._find_value(key)
                if found is not None:
                    have.append((key, found[0]))
                elif key in self._loading:
                    theirs.append(key)
                else:
                    mine.append(key)
            self._loading.update(mine)
        return have, mine, theirs

    def _wait_for(self, keys: Sequence[TileKey]) -> None:
        """Return when at least one of ``keys`` has landed or was given up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._loading.issuperset(keys))

    def _find_value(self, key: TileKey) -> tuple[Value, int] | None:
        for shelf in (self._hot, self._cold):
            if key in shelf:
                shelf.move_to_end(key)
                return shelf[key]
        return None

    @contextmanager
    def _release_keys(self, keys: Sequence[TileKey]) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._loading.difference_update(keys)
                self._changed.notify_all()

    def _store_value(self, key: TileKey, value: Value, size: int, *, cold: bool) -> None:
        with self._changed:
            self._loading.discard(key)
            (self._cold if cold else self._hot)[key] = (value, size)
            self.used += size
            while self.used > self.limit and (self._cold or self._hot):
                _, (_, freed) = (self._cold or self._hot).popitem(last=False)
                self.used -= freed
            self._changed.notify_all()
