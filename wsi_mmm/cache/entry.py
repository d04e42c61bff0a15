"""Zarr v3: where features and maps rest between steps, runs and workers.

Everything is content-addressed: ``<root>/<slide fingerprint>/<key>/...`` where the key is a hash of what the values
depend on. Writers own whole shards (one shard = one block of the grid) and every writer of a shard writes the same
bytes, so concurrent and repeated writes are harmless; a shard is put whole (temp + rename, or one PUT). A record,
a small JSON object written last, says that all shards of a block are in: a crash leaves either both or a block to redo.
Chunks carry a checksum: what was damaged at rest is an error or is made anew, never other values.

Layout of one entry::

    <entry>/features   float32[rows, columns, D]          one vector per tile of the grid
    <entry>/maps/<task>    uint8[rows, columns, C, h, w]  quantised maps per tile
    <entry>/tables/<task>  uint8[rows, columns, K]        quantised values per tile
    <entry>/receipts/<block>.json
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore, ObjectStore

from wsi_mmm.errors import NotFound, OutputError, StorageError
from wsi_mmm.storage import store as storage
from wsi_mmm.types import I64

T = TypeVar("T")
Array = npt.NDArray[Any]


def ensure_array(uri: str, name: str, **settings: Any) -> zarr.Array[Any]:
    """Open the array ``name`` at ``uri``, made with ``settings`` when absent; never removes what another writer put."""
    store = _zarr_store(uri)

    def ensured() -> zarr.Array[Any]:
        with contextlib.suppress(FileNotFoundError):
            return zarr.open_array(store, path=name, mode="r+")
        try:
            return zarr.create_array(store, name=name, overwrite=False, **settings)
        except ContainsArrayError:
            return zarr.open_array(store, path=name, mode="r+")

    return _access_cache(uri, ensured, writing=True)


def _zarr_store(uri: str) -> LocalStore | ObjectStore[Any]:
    """The Zarr store at ``uri``: a folder, or a prefix on ``s3://`` through obstore."""
    if storage.is_local(uri):
        return LocalStore(storage.local_path(uri))
    return ObjectStore(storage.object_store(uri))


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Shape of one array of an entry: ``item`` is the shape per tile; the shard is ``block`` x ``block`` tiles."""

    name: str
    item: tuple[int, ...]
    dtype: str


@dataclass(slots=True)
class CacheEntry:
    """One content-addressed entry. Arrays are made on first use; opening them is cheap and thread-safe."""

    uri: str
    rows: int
    columns: int
    block: int
    _arrays: dict[str, zarr.Array[Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def array(self, spec: ArraySpec) -> zarr.Array[Any]:
        """The array of ``spec``, created when absent; two creators at once write the same metadata."""
        # Features are small: one chunk a shard. Maps are large: one chunk a tile, so a neighbour can be read alone.
        heavy = int(np.prod(spec.item)) * np.dtype(spec.dtype).itemsize > 16384
        lead = (1, 1) if heavy else (self.block, self.block)
        shuffle: Literal["noshuffle", "bitshuffle"] = "noshuffle" if spec.dtype == "uint8" else "bitshuffle"
        with self._lock:
            if spec.name not in self._arrays:
                self._arrays[spec.name] = ensure_array(
                    self.uri,
                    spec.name,
                    shape=(self.rows, self.columns, *spec.item),
                    chunks=(*lead, *spec.item),
                    shards=(self.block, self.block, *spec.item),
                    dtype=spec.dtype,
                    compressors=[BloscCodec(cname="lz4", clevel=3, shuffle=shuffle), Crc32cCodec()],
                    fill_value=0,
                )
            return self._arrays[spec.name]

    def existing(self, name: str) -> zarr.Array[Any]:
        """An array that some writer has made; StorageError when none has."""

        def opened() -> zarr.Array[Any] | None:
            with contextlib.suppress(FileNotFoundError):
                return zarr.open_array(_zarr_store(self.uri), path=name, mode="r")
            return None

        found = _access_cache(self.uri, opened)
        if found is None:
            raise StorageError(
                f"the cache at {storage.redact(self.uri)} has no {name}; compute it again with the option force"
            )
        return found

    def write_block(self, spec: ArraySpec, index: I64, values: Array) -> None:
        """Write the shard that holds the tiles ``index`` int64[n, 2] (row, column), all of one block, in one put."""
        row, column = (index.min(axis=0) // self.block) * self.block
        high = min(row + self.block, self.rows), min(column + self.block, self.columns)
        dense = np.zeros((high[0] - row, high[1] - column, *spec.item), spec.dtype)
        dense[index[:, 0] - row, index[:, 1] - column] = values
        place = slice(row, high[0]), slice(column, high[1])
        array = self.array(spec)
        _access_cache(self.uri, lambda: _write_shard(self.uri, array, place, dense), writing=True)

    def read(self, spec: ArraySpec, rows: slice, columns: slice) -> Array:
        """Values of a rectangle of tiles; tiles never written are zero."""
        array = self.array(spec)
        return _access_cache(self.uri, lambda: np.asarray(array[rows, columns]))

    def block_record(self, block: str) -> dict[str, Any] | None:
        """Return the record of a block, or None unless all its shards are in."""
        try:
            found = json.loads(storage.read_bytes(f"{self.uri}/receipts/{block}.json"))
        except (NotFound, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_block_record(self, block: str, record: Mapping[str, Any]) -> None:
        """Record that all shards of the block are in: call it last."""
        storage.write_bytes(f"{self.uri}/receipts/{block}.json", json.dumps(dict(record)).encode())


def _write_shard(uri: str, array: zarr.Array[Any], place: tuple[slice, slice], values: Array) -> None:
    """Write the whole shard at ``place``. Zarr reads what is there before: what is damaged is removed first."""
    try:
        array[place] = values
    except (RuntimeError, ValueError):
        sides = array.shards or array.chunks
        corner = tuple(span.start // side for span, side in zip(place, sides, strict=False))
        key = array.metadata.encode_chunk_key((*corner, *[0] * (array.ndim - 2)))
        storage.delete(storage.join(uri, array.path, key))
        array[place] = values


def _access_cache(uri: str, step: Callable[[], T], *, writing: bool = False) -> T:
    """Return ``step()``, its foreign errors in our words; in a bucket it is tried again while these may pass."""
    if storage.is_local(uri):
        return _translate_errors(uri, step, writing)

    def attempt() -> T:
        with storage.translate_errors(uri, writing=writing):
            return _translate_errors(uri, step, writing)

    return storage.retry_transient(attempt)


def _translate_errors(uri: str, step: Callable[[], T], writing: bool) -> T:
    try:
        return step()
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and not storage.is_local(uri):
            raise  # said by the storage
        fail, verb = (OutputError, "write") if writing else (StorageError, "read")
        if isinstance(error, OSError):
            fix = "check the disk, or choose another place (--cache, or --output where none is set)"
            reason = f"{error.strerror or error}; {fix}"
        else:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = f"it is damaged ({first}); delete it and run again"
        raise fail(f"cannot {verb} the cache at {storage.redact(uri)}: {reason}") from error
