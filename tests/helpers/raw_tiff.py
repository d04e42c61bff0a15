"""Write TIFFs of any tags over any stored tiles: what libraries cannot write, legal or not."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {2: "s", 3: "H", 4: "I", 5: "I", 7: "s"}
Tag = tuple[int, Any]  # type of TIFF, and a value, values or bytes


def write_raw(path: Path, tags: Mapping[int, Tag], tiles: Sequence[bytes], *, order: str = "<") -> Path:
    """Write one directory of ``tags`` over ``tiles``, in strips where no tag says how wide tiles are."""
    out = bytearray((b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 0))
    offsets = []
    for tile in tiles:
        offsets.append(len(out))
        out += tile + bytes(len(tile) % 2)
    tables = (324, 325) if 322 in tags else (273, 279)
    every = dict(tags) | {tables[0]: (4, offsets), tables[1]: (4, [len(tile) for tile in tiles])}
    rows = b""
    for tag, (kind, value) in sorted(every.items()):
        values = [value] if isinstance(value, int) else value
        raw = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{KINDS[kind]}", *values)
        count = len(values) // (2 if kind == 5 else 1)
        if len(raw) > 4:
            out += bytes(-len(out) % 4)
            out, raw = out + raw, struct.pack(order + "I", len(out))
        rows += struct.pack(order + "HHI", tag, kind, count) + raw.ljust(4, b"\0")
    out += bytes(-len(out) % 4)
    struct.pack_into(order + "I", out, 4, len(out))
    path.write_bytes(bytes(out) + struct.pack(order + "H", len(every)) + rows + bytes(4))
    return path


def picture_tags(
    size: tuple[int, int], tile: tuple[int, int] | None, *, compression: int = 1, photometric: int = 2,
    samples: int = 3, bits: int = 8, more: Mapping[int, Tag] | None = None,
) -> dict[int, Tag]:  # fmt: skip
    """Tags of a picture; ``size``, ``tile``: width and height, None for one strip. ``more`` replaces any."""
    tags: dict[int, Tag] = {256: (4, size[0]), 257: (4, size[1]), 258: (3, [bits] * samples), 259: (3, compression),
                            262: (3, photometric), 277: (3, samples), 284: (3, 1)}  # fmt: skip
    tags |= {278: (4, size[1])} if tile is None else {322: (4, tile[0]), 323: (4, tile[1])}
    return tags | dict(more or {})


def tiles_of(image: np.ndarray, tile: tuple[int, int], *, cut: bool = False) -> list[np.ndarray]:
    """Tiles of ``image`` row by row, filled up beyond its edges unless ``cut``."""
    found = []
    for y in range(0, image.shape[0], tile[1]):
        for x in range(0, image.shape[1], tile[0]):
            part = image[y : y + tile[1], x : x + tile[0]]
            if not cut:
                room = [(0, tile[1] - part.shape[0]), (0, tile[0] - part.shape[1])] + [(0, 0)] * (image.ndim - 2)
                part = np.pad(part, room, constant_values=40)
            found.append(np.ascontiguousarray(part))
    return found
