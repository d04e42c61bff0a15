"""Writing small pyramidal TIFFs for demonstrations and tests, each variant as real scanners and converters write it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.errors import OptionError
from wsi_mmm.storage import store
from wsi_mmm.types import U8

Encode = Callable[[U8], bytes]
_CODES = {"jpeg": 7, "rgb": 7, "jpeg2000": 33005, "jpeg2000-ycc": 33003, "lzw": 5, "deflate": 8, "zstd": 50000,
          "none": 1}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TiffForm:
    """How to store; ``compression`` 'rgb' is JPEG of RGB without a marker that says so, as Aperio writes."""

    compression: str = "jpeg"
    tile: int = 256
    quality: int = 90
    big: bool = False
    strips: bool = False
    sub_ifds: bool = False
    mpp: float | None = None
    description: str = ""


def write_tiff(path: str | Path, levels: Sequence[U8], form: TiffForm) -> None:
    """Write ``levels`` (uint8[h, w, 3], finest first) as one TIFF. Raises OutputError, OptionError."""
    if form.compression not in _CODES:
        raise OptionError(f"there is no TIFF compression {form.compression!r}; choose one of {', '.join(_CODES)}")
    store.write_bytes(str(path), _Writer(form).file(levels))


class _Writer:
    def __init__(self, form: TiffForm) -> None:
        self.form = form
        self.encode = _tile_encoder(form)
        self.pointer = "Q" if form.big else "I"
        self.out = bytearray(b"II+\0\x08\0\0\0" + bytes(8) if form.big else b"II*\0" + bytes(4))

    def file(self, levels: Sequence[U8]) -> bytes:
        tables = [self._write_tiles(level) for level in levels]
        following = 0
        sub: list[int] = []
        # From the last directory to the first, so that each knows where the next one lies.
        for n in range(len(levels) - 1, 0, -1):
            at = self._write_directory(levels[n], tables[n], 0 if self.form.sub_ifds else following, reduced=True)
            sub.insert(0, at)
            following = 0 if self.form.sub_ifds else at
        following = self._write_directory(levels[0], tables[0], following, sub=sub if self.form.sub_ifds else [])
        struct.pack_into("<" + self.pointer, self.out, 8 if self.form.big else 4, following)
        return bytes(self.out)

    def _write_tiles(self, level: U8) -> list[tuple[int, int]]:
        height, width = level.shape[:2]
        tile = self.form.tile
        found = []
        for y in range(0, height, tile):
            for x in range(0, width, width if self.form.strips else tile):
                part = level[y : y + tile] if self.form.strips else _pad_tile(level[y : y + tile, x : x + tile], tile)
                data = self.encode(np.ascontiguousarray(part))
                found.append((len(self.out), len(data)))
                self.out += data
        return found

    def _write_directory(
        self, level: U8, tiles: list[tuple[int, int]], following: int, *, reduced: bool = False, sub: Sequence[int] = ()
    ) -> int:
        height, width = level.shape[:2]
        offsets, counts = [o for o, _ in tiles], [c for _, c in tiles]
        photometric = 6 if self.form.compression in ("jpeg", "jpeg2000-ycc") else 2
        tags: list[tuple[int, str, Sequence[int] | bytes]] = [
            (254, "I", [int(reduced)]), (256, "I", [width]), (257, "I", [height]), (258, "H", [8, 8, 8]),
            (259, "H", [_CODES[self.form.compression]]), (262, "H", [photometric]), (277, "H", [3]), (284, "H", [1]),
        ]  # fmt: skip
        if self.form.strips:
            tags += [(273, self.pointer, offsets), (278, "I", [self.form.tile]), (279, self.pointer, counts)]
        else:
            tags += [(322, "I", [self.form.tile]), (323, "I", [self.form.tile])]
            tags += [(324, self.pointer, offsets), (325, self.pointer, counts)]
        if self.form.compression in ("lzw", "deflate"):
            tags.append((317, "H", [2]))
        if photometric == 6:
            tags.append((530, "H", [2, 2]))
        if not reduced:
            tags += self._describing_tags(sub)
        return self._write_tags(sorted(tags, key=lambda t: t[0]), following)

    def _describing_tags(self, sub: Sequence[int]) -> list[tuple[int, str, Sequence[int] | bytes]]:
        tags: list[tuple[int, str, Sequence[int] | bytes]] = []
        if self.form.description:
            tags.append((270, "s", self.form.description.encode() + b"\0"))
        if self.form.mpp is not None:
            per_cm = [round(10000 / self.form.mpp * 1000), 1000]
            tags += [(282, "R", per_cm), (283, "R", per_cm), (296, "H", [3])]
        if sub:
            tags.append((330, self.pointer, sub))
        return tags

    def _write_tags(self, tags: Sequence[tuple[int, str, Sequence[int] | bytes]], following: int) -> int:
        """Append a directory and its values; return where it lies."""
        kinds = {"H": 3, "I": 4, "Q": 16, "s": 2, "R": 5}
        room = 8 if self.form.big else 4
        rows = b""
        for tag, code, values in tags:
            form = f"<{len(values)}{'I' if code == 'R' else code}"
            raw = values if isinstance(values, bytes) else struct.pack(form, *values)
            count = len(values) // (2 if code == "R" else 1)
            if len(raw) > room:
                where = self._align_file()
                self.out += raw
                raw = struct.pack("<" + self.pointer, where)
            rows += struct.pack("<HH" + self.pointer, tag, kinds[code], count) + raw.ljust(room, b"\0")
        at = self._align_file()
        self.out += struct.pack("<Q" if self.form.big else "<H", len(tags)) + rows
        self.out += struct.pack("<" + self.pointer, following)
        return at

    def _align_file(self) -> int:
        self.out += bytes(-len(self.out) % 8)
        return len(self.out)


def _pad_tile(part: U8, tile: int) -> U8:
    """The padding beyond the edge is dark: a reader that lets it in is caught by its picture."""
    if part.shape[:2] == (tile, tile):
        return part
    full = np.full((tile, tile, 3), 40, np.uint8)
    full[: part.shape[0], : part.shape[1]] = part
    return full


def _tile_encoder(form: TiffForm) -> Encode:
    import imagecodecs

    def predicted(pixels: U8) -> U8:
        return np.diff(pixels, axis=1, prepend=np.zeros((len(pixels), 1, 3), np.uint8))

    encoders: dict[str, Encode] = {
        "jpeg": lambda p: bytes(imagecodecs.jpeg8_encode(p, level=form.quality, subsampling="420")),
        "rgb": lambda p: _without_markers(
            imagecodecs.jpeg8_encode(p, level=form.quality, colorspace="RGB", outcolorspace="RGB")
        ),
        "jpeg2000": lambda p: bytes(imagecodecs.jpeg2k_encode(p, level=45, codecformat="j2k", mct=True)),
        "jpeg2000-ycc": lambda p: bytes(imagecodecs.jpeg2k_encode(_to_ycc(p), level=45, codecformat="j2k", mct=False)),
        "lzw": lambda p: bytes(imagecodecs.lzw_encode(predicted(p).tobytes())),
        "deflate": lambda p: bytes(imagecodecs.zlib_encode(predicted(p).tobytes(), level=1)),
        "zstd": lambda p: bytes(imagecodecs.zstd_encode(p.tobytes())),
        "none": lambda p: p.tobytes(),
    }
    return encoders[form.compression]


def _to_ycc(pixels: U8) -> U8:
    """JFIF 1.02 section 7, RGB to full-range YCbCr."""
    r, g, b = (pixels[..., n].astype(np.float64) for n in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    planes = np.stack([y, 128 + 0.564334 * (b - y), 128 + 0.713267 * (r - y)], axis=-1)
    return np.clip(np.round(planes), 0, 255).astype(np.uint8)


def _without_markers(data: Any) -> bytes:
    """Take the Adobe marker out of an RGB JPEG and number its components 1, 2, 3: only the TIFF tag says RGB now."""
    data = bytes(data)
    out = bytearray(data[:2])
    at = 2
    while at < len(data) and data[at + 1] != 0xDA:
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = bytearray(data[at:stop])
        if segment[1] in (0xC0, 0xC1, 0xC2):
            segment[10], segment[13], segment[16] = 1, 2, 3
        if segment[1] not in (0xEE, 0xE0):
            out += segment
        at = stop
    scan = bytearray(data[at:])
    scan[5], scan[7], scan[9] = 1, 2, 3
    return bytes(out + scan)
