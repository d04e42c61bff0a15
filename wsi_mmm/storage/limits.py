"""Limits on the size and depth of input files: a small file that claims to hold much is refused, not read.

Limits on slides are checked by the TIFF parser (slides/tiff).
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, Any

from wsi_mmm.errors import InputError, WsiError

MAX_BYTES = 4 << 30
"""Bytes of an annotation file, unpacked: some eight million outlines."""

MAX_RATIO, FREE = 100, 64 << 20
"""A compressed file may unpack to ``FREE`` bytes, and beyond that to so many times its size: GeoJSON gives 3 to 20."""

MAX_LISTS = 1 << 28
"""Lists and objects in a JSON file: each costs a hundred bytes of memory and more, and two of the file."""

MAX_OBJECTS = 10_000_000
"""Annotated objects of one file."""

_CHUNK = 8 << 20


def unpack_file(data: bytes, name: str, endings: Sequence[str], error: type[WsiError] = InputError) -> bytes:
    """Return ``data``, or its content when it is gzip, or a zip with one file of these ``endings``.

    Raises ``error`` when it is damaged, or unpacks to more than it may.
    """
    try:
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(data)) as stream:
                return _read_stream(stream, len(data), name, error)
        if data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                member = _find_member(archive, name, endings, error)
                with archive.open(member) as stream:
                    return _read_stream(stream, member.compress_size, name, error)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as damage:
        raise error(f"{name}: the compressed file is damaged ({damage}): export or copy it again") from damage
    return _check_size(data, name, error)


def _find_member(archive: zipfile.ZipFile, name: str, endings: Sequence[str], error: type[WsiError]) -> zipfile.ZipInfo:
    members = [m for m in archive.infolist() if m.filename.lower().endswith(tuple(endings))]
    members = [m for m in members if not m.filename.startswith("__MACOSX")]
    if len(members) != 1:
        *some, last = endings
        raise error(f"{name}: the zip holds {len(members)} {', '.join(some)} or {last} files: pack one")
    return members[0]


def _read_stream(stream: IO[bytes] | gzip.GzipFile, packed: int, name: str, error: type[WsiError]) -> bytes:
    """Return the unpacked bytes of a stream of ``packed`` bytes. Raises ``error`` when they are too many for those."""
    most = min(max(FREE, MAX_RATIO * packed), MAX_BYTES)
    parts: list[bytes] = []
    while part := stream.read(_CHUNK):
        parts.append(part)
        if sum(map(len, parts)) > most:
            limit = f"{MAX_BYTES >> 30} GiB" if most == MAX_BYTES else f"{MAX_RATIO} times its size"
            raise error(f"{name}: unpacks to more than {limit}: split it, or give it unpacked")
    return b"".join(parts)


def _check_size(data: bytes, name: str, error: type[WsiError]) -> bytes:
    if len(data) > MAX_BYTES:
        raise error(f"{name}: more than {MAX_BYTES >> 30} GiB: split it")
    return data


def parse_json(
    data: bytes, name: str, error: type[WsiError] = InputError, otherwise: str = "no JSON that can be read"
) -> Any:
    """Return the value of a JSON file. Raises ``error`` (text: ``otherwise``) for none, or one too deep or large."""
    _check_size(data, name, error)
    if data.count(b"[") + data.count(b"{") > MAX_LISTS:
        raise error(f"{name}: more than {MAX_LISTS:,} lists and objects: split it")
    try:
        return json.loads(data)
    except RecursionError as deep:
        raise error(f"{name}: {otherwise} (it is nested too deep): export it again") from deep
    except (ValueError, MemoryError) as wrong:
        raise error(f"{name}: {otherwise} ({wrong}): export it again") from wrong
