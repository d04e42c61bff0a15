"""The bytes of one shard of cached pixels: a Zarr v3 shard that any Zarr library reads, written and read whole here.

A general Zarr library takes about a millisecond to find and decode a chunk; a tile of 256 px is copied in 40 µs. So a
shard is packed and unpacked here, without steps between: chunks of 256 px (Blosc LZ4 and CRC-32C each), a note of what
could not be read, which Zarr skips, and the shard's index at the end (sharding-indexed, with CRC-32C).

The note makes a shard complete in itself: no second object says that it is there, or what failed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Literal

import google_crc32c
import numpy as np
from numcodecs import blosc

from wsi_mmm.errors import NotFound, StorageError
from wsi_mmm.storage import store as storage
from wsi_mmm.types import I64, U8

SHARD, CHUNK = 1024, 256
SIDE = SHARD // CHUNK
CODEC: Literal["lz4"] = "lz4"
LEVEL = 1
"""Measured on tissue: Zstandard saves another tenth of the space and takes five times as long to read."""

ShardBytes = bytes | memoryview

_MISSING = (1 << 64) - 1
_INDEX = 16 * SIDE * SIDE + 4
_FAILURES = struct.Struct("<I4sI")  # rectangles, magic, CRC-32C of what stands before it
_MAGIC = b"wsi1"
_RECT = 32
_TAIL = _INDEX + _FAILURES.size + 8 * _RECT
"""Bytes at the end of a shard that hold its index and, unless much of it failed, its note."""


class DamagedShardError(Exception):
    """The bytes are not a whole shard. Never leaves the cache: the shard is made anew."""


def pack(pixels: U8, inside: tuple[int, int], failed: I64) -> bytes:
    """A shard of ``pixels`` uint8[1024, 1024, 3], of which (rows, columns) lie in the slide."""
    parts: list[bytes] = []
    spans = np.full((SIDE * SIDE, 2), _MISSING, np.uint64)
    at = 0
    for number in range(SIDE * SIDE):
        y, x = (CHUNK * n for n in divmod(number, SIDE))
        if y < inside[0] and x < inside[1]:
            chunk = np.ascontiguousarray(pixels[y : y + CHUNK, x : x + CHUNK])
            data = _with_checksum(blosc.compress(chunk, CODEC.encode(), LEVEL, blosc.NOSHUFFLE))
            spans[number] = at, len(data)
            parts.append(data)
            at += len(data)
    failures = failed.astype("<i8").tobytes() + struct.pack("<I4s", len(failed), _MAGIC)
    return b"".join([*parts, _with_checksum(failures), _with_checksum(spans.astype("<u8").tobytes())])


def open_shard(uri: str, numbers: Sequence[int]) -> tuple[I64, list[ShardBytes]]:
    """Rectangles int64[n, 4] that failed, and chunks of a shard. Raises NotFound, DamagedShardError, StorageError."""
    if not storage.is_local(uri):
        data = memoryview(storage.read_bytes(uri))  # one request
        spans, failed = _read_index(data, len(data))
        return failed, [data[a : a + n] for a, n in spans[list(numbers)].tolist()]
    try:
        with open(storage.local_path(uri), "rb", buffering=0) as file:
            return _read_parts(file.fileno(), numbers)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(uri) from error
    except OSError as error:
        raise StorageError(f"cannot read the cache at {uri}: {error.strerror}; check the disk") from error


def _read_parts(file: int, numbers: Sequence[int]) -> tuple[I64, list[ShardBytes]]:
    """Open files outlive their removal by another process, and are never written twice."""
    size = os.fstat(file).st_size
    try:
        spans, failed = _read_index(os.pread(file, _TAIL, max(0, size - _TAIL)), size)
    except IndexError as error:
        length = int(error.args[0])
        spans, failed = _read_index(os.pread(file, length, size - length), size)
    return failed, [os.pread(file, n, a) for a, n in spans[list(numbers)].tolist()]


def _read_index(tail: ShardBytes, size: int) -> tuple[I64, I64]:
    """The index of a shard of ``size`` bytes from its last ``tail``; IndexError when the tail is too short.

    Where its chunks are, int64[16, 2], offset and length (0: blank); and what failed, int64[n, 4]. DamagedShardError.
    """
    table = _verify_checksum(tail[-_INDEX:], _INDEX)
    spans = np.frombuffer(table, "<u8").reshape(-1, 2)
    blank = spans[:, 1] == _MISSING
    failures = tail[: len(tail) - _INDEX]
    if len(failures) < _FAILURES.size:
        raise DamagedShardError("cut")
    count, magic, _ = _FAILURES.unpack(failures[-_FAILURES.size :])
    length = count * _RECT + _FAILURES.size
    if magic != _MAGIC or length + _INDEX > size:
        raise DamagedShardError("no note")
    if length > len(failures):
        raise IndexError(length + _INDEX)
    rects = np.frombuffer(_verify_checksum(failures[-length:], length)[: count * _RECT], "<i8").reshape(-1, 4)
    found = np.where(blank[:, None], 0, spans).astype(np.int64)
    if (found < 0).any() or (found.sum(axis=1) > size).any():
        raise DamagedShardError("a chunk beyond the end")
    return found, rects.astype(np.int64)


def unpack(data: ShardBytes, out: U8) -> None:
    """Write a chunk to ``out`` uint8[256, 256, 3], contiguous; no data: white. Raises DamagedShardError."""
    if not len(data):
        out[...] = 255
        return
    body = _verify_checksum(data, len(data))
    if len(body) < 16 or int.from_bytes(body[4:8], "little") != out.nbytes:
        raise DamagedShardError("a chunk of another size")
    try:
        blosc.decompress(body, out)
    except (RuntimeError, ValueError) as error:
        raise DamagedShardError(str(error)) from error


def _with_checksum(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def _verify_checksum(data: ShardBytes, length: int) -> ShardBytes:
    """Return the bytes before the CRC-32C at the end. Raises DamagedShardError."""
    if len(data) != length or length < 4:
        raise DamagedShardError("cut")
    body = data[:-4]
    if google_crc32c.value(bytes(body)) != int.from_bytes(data[-4:], "little"):
        raise DamagedShardError("other bytes than were written")
    return body
