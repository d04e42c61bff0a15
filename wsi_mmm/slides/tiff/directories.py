"""Parsing TIFF and BigTIFF directories from ranges, in few requests, trusting nothing the file claims.

Formats: TIFF 6.0 section 2; BigTIFF as in libtiff's design notes (version 43, 8-byte offsets).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from wsi_mmm.errors import NotASlide, SlideDamaged
from wsi_mmm.storage.store import BufferedStore, ByteStore, buffered, redact
from wsi_mmm.types import I64

_MAX_DIRECTORIES = 1024
_MAX_TAGS, _MAX_ALL_TAGS = 4096, 1 << 16  # of one directory, of all
_MAX_VALUES = 4096  # of one tag
_MAX_TILES = 1 << 23  # of one directory
_TEXTS = (270, 271, 305, 700)  # description, make, software, XMP: of the first directory alone
_NUMBERS = (
    254, 256, 257, 258, 259, 262, 266, 277, 278, 282, 283, 284, 292, 296, 317, 320, 322, 323, 330, 332, 338, 339, 347,
    529, 530, 532, 32997, 50674,
)  # fmt: skip
_MAX_TEXT, _MAX_NUMBERS = 16 << 20, 64 << 10  # larger values are not loaded, nor is what nobody asks for
_MAX_LOADED = 64 << 20  # bytes of the values of all tags
_TYPES = {1: "u1", 2: "S1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4", 11: "f4", 12: "f8",
          13: "u4", 16: "u8", 17: "i8", 18: "u8"}  # fmt: skip
_UNSIGNED = {1: 1, 3: 2, 4: 4, 7: 1, 13: 4, 16: 8, 18: 8}  # bytes of each
_PAIRS = (5, 10)  # rationals: two numbers per value

SUBIFDS = 330
OFFSET_TAGS = (324, 325, 273, 279)  # tile and strip tables: big, read only for the levels in use


@dataclass(frozen=True, slots=True)
class TagEntry:
    """One tag: where its ``count`` values of TIFF type ``kind`` lie in the file, or the values themselves."""

    kind: int
    count: int
    offset: int
    inline: bytes | None

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return self.count * np.dtype(_TYPES[self.kind]).itemsize * (2 if self.kind in _PAIRS else 1)


@dataclass(frozen=True, slots=True)
class Directory:
    """One image of the file: its tags, small values loaded."""

    offset: int
    entries: Mapping[int, TagEntry]
    values: Mapping[int, bytes]
    endian: str
    sub: tuple[Directory, ...] = field(default=())

    def numbers(self, tag: int) -> list[float]:
        """Return the numbers of a tag, rationals divided; empty when absent or of another type."""
        entry, raw = self.entries.get(tag), self.values.get(tag)
        if entry is None or raw is None or entry.kind == 2:
            return []
        with np.errstate(invalid="ignore"):  # numbers that are none: 0 below
            flat = np.frombuffer(raw, self.endian + _TYPES[entry.kind])[:_MAX_VALUES].astype(np.float64)
        if entry.kind in _PAIRS:
            return [float(a / b) if b else 0.0 for a, b in flat.reshape(-1, 2)]
        return [float(v) if np.isfinite(v) else 0.0 for v in flat]

    def number(self, tag: int, default: int) -> int:
        """Return the first number of a tag as int."""
        entry, raw = self.entries.get(tag), self.values.get(tag)
        if entry is None or not raw:
            return default
        if entry.kind in _UNSIGNED:
            return int.from_bytes(raw[: _UNSIGNED[entry.kind]], "little" if self.endian == "<" else "big")
        found = self.numbers(tag)
        return int(found[0]) if found else default

    def text(self, tag: int) -> str:
        """Return a text tag, without the ending zeros."""
        return self.values.get(tag, b"").split(b"\0")[0].decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class _TiffFile:
    """A file and how it is laid out. Bytes behind what is read are kept: neighbouring directories are one request.

    ``seen``: offsets of directories; ``read``: bytes of values and numbers of tags that were read until now.
    """

    store: BufferedStore
    endian: str
    entry: struct.Struct
    pointer: struct.Struct
    counter: struct.Struct
    seen: set[int] = field(default_factory=set)
    read: Counter[str] = field(default_factory=Counter)

    def count(self, what: Literal["bytes", "tags"], more: int, most: int) -> None:
        """Add to what was read. Raises NotASlide beyond ``most``: the work for one file is bounded."""
        self.read[what] += more
        if self.read[what] > most:
            name = redact(self.store.uri)
            raise NotASlide(f"the directories of {name} hold more than {most} {what}, the most that is read of a TIFF")


def _read_exactly(store: BufferedStore, start: int, length: int) -> bytes:
    """Return exactly these bytes. Raises SlideDamaged when the file ends before."""
    if start < 0 or start + length > store.size:
        raise SlideDamaged(
            f"{redact(store.uri)} is truncated: it has {store.size} bytes, a directory lies at {start}; copy it again"
        )
    data = bytes(store.read_ahead(start, length))
    if len(data) < length:
        raise SlideDamaged(f"{redact(store.uri)} is truncated at byte {start}; copy it again")
    return data


def is_tiff(head: bytes) -> bool:
    """Tell by the first 4 bytes."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_directories(store: ByteStore) -> list[Directory]:
    """Return the directories of the main chain, each with its SubIFDs. Raises NotASlide, SlideDamaged."""
    if store.size < 16:
        raise NotASlide(f"{redact(store.uri)} is no TIFF: it has only {store.size} bytes")
    head = _read_exactly(ahead := buffered(store), 0, 16)
    if not is_tiff(head):
        raise NotASlide(f"{redact(store.uri)} is no TIFF; check that this is a slide")
    endian, big = "<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+")
    forms = ("HHQ8s", "Q", "Q") if big else ("HHI4s", "I", "H")
    entry, pointer, counter = (struct.Struct(endian + form) for form in forms)
    file = _TiffFile(ahead, endian, entry, pointer, counter)
    chain = _read_chain(file, file.pointer.unpack_from(head, 8 if big else 4)[0])
    if not chain:
        raise SlideDamaged(f"{redact(store.uri)} is a TIFF without any image; copy it again")
    if 270 in chain[0].entries and chain[0].entries[270].size > _MAX_TEXT:
        size = chain[0].entries[270].size
        raise NotASlide(f"{redact(store.uri)} has a description of {size} bytes; at most {_MAX_TEXT} are read")
    first = _load_values(file, chain[0], _TEXTS + _NUMBERS)
    # PerkinElmer says in the text of each directory what it is; other texts of later directories are not needed.
    wanted = (270, *_NUMBERS) if b"<PerkinElmer-QPI" in first.values.get(270, b"")[:4096] else _NUMBERS
    found = [first, *(_load_values(file, directory, wanted) for directory in chain[1:])]
    return [_with_sub(file, d) for d in found]


def _read_chain(file: _TiffFile, offset: int) -> list[Directory]:
    found: list[Directory] = []
    while offset:
        if offset in file.seen:
            raise SlideDamaged(f"{redact(file.store.uri)} is damaged: its directories form a loop; copy it again")
        _remember_offset(file, offset)
        directory, offset = _read_directory(file, offset)
        found.append(directory)
    return found


def _remember_offset(file: _TiffFile, offset: int) -> None:
    file.seen.add(offset)
    if len(file.seen) > _MAX_DIRECTORIES:
        raise NotASlide(
            f"{redact(file.store.uri)} holds more than {_MAX_DIRECTORIES} images, the most that is read of a TIFF: a "
            "stack, or damaged; convert the wanted one to a pyramidal TIFF"
        )


def _read_directory(file: _TiffFile, offset: int) -> tuple[Directory, int]:
    counter, entry, pointer = file.counter, file.entry, file.pointer
    number = counter.unpack(_read_exactly(file.store, offset, counter.size))[0]
    if not 0 < number <= _MAX_TAGS:
        raise SlideDamaged(
            f"{redact(file.store.uri)} is damaged: a directory claims {number} tags, where 1 to {_MAX_TAGS} are read"
        )
    file.count("tags", number, _MAX_ALL_TAGS)
    raw = _read_exactly(file.store, offset + counter.size, number * entry.size + pointer.size)
    entries: dict[int, TagEntry] = {}
    for tag, kind, count, value in entry.iter_unpack(raw[: number * entry.size]):
        if kind in _TYPES and tag not in entries:
            entries[tag] = _check_entry(file, tag, (kind, count, value))
    following: int = pointer.unpack_from(raw, number * entry.size)[0]
    return Directory(offset, entries, {}, file.endian), following


def _check_entry(file: _TiffFile, tag: int, found: tuple[int, int, bytes]) -> TagEntry:
    kind, count, value = found
    entry = TagEntry(kind, count, 0, None)
    size = entry.size
    if size <= len(value):
        return TagEntry(kind, count, 0, value[:size])
    offset = file.pointer.unpack(value)[0]
    if offset + size > file.store.size and (tag in OFFSET_TAGS or tag in _NUMBERS):
        raise SlideDamaged(
            f"{redact(file.store.uri)} is truncated or damaged: tag {tag} claims {size} bytes at {offset}, "
            f"the file has {file.store.size}"
        )
    return TagEntry(kind, count, offset, None)


def _load_values(file: _TiffFile, directory: Directory, wanted: Sequence[int] = _NUMBERS) -> Directory:
    """Load the values of the ``wanted`` tags; the tables of tiles are big, and asked for of the levels in use only."""
    values: dict[int, bytes] = {}
    for tag, entry in directory.entries.items():
        if entry.inline is not None:
            values[tag] = entry.inline
        elif tag in wanted and entry.size <= (_MAX_TEXT if tag in _TEXTS else _MAX_NUMBERS):
            values[tag] = _read_value(file, entry)
    return replace(directory, values=values)


def _read_value(file: _TiffFile, entry: TagEntry) -> bytes:
    file.count("bytes", entry.size, _MAX_LOADED)
    return _read_exactly(file.store, entry.offset, entry.size) if entry.offset + entry.size <= file.store.size else b""


def table(store: ByteStore, directories: Sequence[Directory], tags: Sequence[int]) -> list[I64]:
    """Return one integer table per (directory, tag), all fetched together. NotASlide when one has too many entries."""
    entries = [d.entries[t] for d, t in zip(directories, tags, strict=True)]
    if (count := max((entry.count for entry in entries), default=0)) > _MAX_TILES:
        raise NotASlide(
            f"{redact(store.uri)} has an image of {count} tiles or strips; at most {_MAX_TILES} are read: convert it "
            "to larger tiles"
        )
    far = [e for e in entries if e.inline is None]
    parts = iter(store.get_ranges([(e.offset, e.size) for e in far]) if far else [])
    out: list[I64] = []
    for directory, entry in zip(directories, entries, strict=True):
        raw = entry.inline if entry.inline is not None else next(parts)
        if len(raw) < entry.size or entry.kind not in (3, 4, 13, 16, 18):
            raise SlideDamaged(f"{redact(store.uri)} is truncated inside its table of tiles; copy it again")
        out.append(np.frombuffer(raw, directory.endian + _TYPES[entry.kind]).astype(np.int64))
    return out


def _with_sub(file: _TiffFile, directory: Directory) -> Directory:
    """Add the SubIFDs, each on its own: some writers chain them too, so what follows one is not followed."""
    sub = []
    for offset in dict.fromkeys(int(v) for v in directory.numbers(SUBIFDS)):
        if offset and offset not in file.seen:
            _remember_offset(file, offset)
            sub.append(_load_values(file, _read_directory(file, offset)[0]))
    return replace(directory, sub=tuple(sub))
