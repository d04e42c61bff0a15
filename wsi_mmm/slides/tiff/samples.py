"""Bytes of one native tile -> its samples as they are stored, uint8 or uint16[rows, width, samples]. No I/O.

Nothing here takes more memory than the tile claims, whatever its bytes say: byte codecs unpack into a buffer of that
size, image codecs into an array of that shape, and both are refused before they decode when theirs is another.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from wsi_mmm.errors import MissingPackage
from wsi_mmm.slides.tiff.planes import COMPRESSIONS, FAX, JPEG, Plane, shares_chroma, uses_predictor
from wsi_mmm.storage.ranges import Buffer

Samples = np.ndarray[Any, np.dtype[Any]]
_LZMA_MEMORY = 96 << 20  # bytes; the strongest preset needs 65 MB
_MOST_ENTRIES = 64  # tags of a JPEG XR file
_BYTE_CODECS = {"LZW": "lzw", "deflate": "zlib", "packbits": "packbits", "zstd": "zstd"}
_IMAGE_CODECS = {"WebP": "webp", "JPEG XL": "jpegxl", "PNG": "png", "JPEG XR": "jpegxr", "LERC": "lerc"}
_FAX_CODECS = {2: "ccittrle", 3: "ccittfax3", 4: "ccittfax4"}
# How a stream of these begins: only other bytes can be in the reversed order of bits.
_SIGNATURES = (b"RIFF", b"\xff\x0a", b"\0\0\0\x0c", b"\x89PNG", b"II\xbc", b"Lerc", b"CntZ", b"\xff\xd8", b"\xff\x4f")


class UndecodableError(Exception):
    """The bytes of a tile do not decode to a whole tile. Never leaves the reader: the tile is listed as failed."""


def check_codec(plane: Plane) -> None:
    """Raise MissingPackage when the installed imagecodecs lacks the plane's codec."""
    name = COMPRESSIONS[plane.compression]
    codec = _FAX_CODECS.get(plane.compression) or _BYTE_CODECS.get(name) or _IMAGE_CODECS.get(name)
    if codec is not None:
        _image_codec(codec)


def join_parts(parts: Sequence[Buffer]) -> bytes:
    """Return the stored tiles of one native tile (one per sample) as one buffer; ``split_parts`` undoes it."""
    return b"".join(chunk for part in parts for chunk in (len(part).to_bytes(4, "little"), part))


def split_parts(data: bytes) -> Iterator[bytes]:
    """Yield the stored tiles that ``join_parts`` put together."""
    at = 0
    while at + 4 <= len(data):
        stop = at + 4 + int.from_bytes(data[at : at + 4], "little")
        yield data[at + 4 : stop]
        at = stop


def read_samples(plane: Plane, data: bytes, needed: int) -> Samples:
    """Return the samples of a tile, of ``needed`` rows at least. Raises UndecodableError."""
    if plane.separate:
        one = replace(plane, samples=1, separate=False)
        parts = [read_samples(one, part, needed) for part in split_parts(data)]
        rows = min((len(part) for part in parts), default=0)
        if len(parts) != plane.samples or rows < needed:
            raise UndecodableError(f"{len(parts)} planes of {plane.samples}")
        return np.concatenate([part[:rows] for part in parts], axis=2)
    if plane.reversed_bits and plane.compression not in JPEG:
        data = _in_usual_bits(plane, data)
    if plane.compression in FAX:
        return _decode_fax(plane, data, needed)
    if COMPRESSIONS[plane.compression] in _IMAGE_CODECS:
        return _decode_image(plane, data, needed)
    return _unpack_samples(plane, data, needed)


def _in_usual_bits(plane: Plane, data: bytes) -> bytes:
    """FillOrder 2: the bits of each byte are reversed (TIFF 6.0, tag 266), except in streams that are of themselves."""
    if COMPRESSIONS[plane.compression] in (*_IMAGE_CODECS, "JPEG 2000") and data.startswith(_SIGNATURES):
        return data
    import imagecodecs

    return bytes(imagecodecs.bitorder_decode(data))


def check_rows(plane: Plane, rows: int, needed: int) -> int:
    """Return how many of the decoded rows are the tile's. Raises UndecodableError when some are missing."""
    if rows < needed or (plane.cut and rows != plane.tile_height):
        raise UndecodableError(f"{rows} rows where {needed} are needed")
    return min(rows, plane.tile_height)


def _unpack_samples(plane: Plane, data: bytes, needed: int) -> Samples:
    """Uncompressed, LZW, deflate, packbits, zstd or LZMA, with an optional horizontal predictor."""
    values = plane.tile_width * plane.samples
    if shares_chroma(plane):
        across, down = plane.subsampling
        values = -(-plane.tile_width // across) * (across * down + 2)
        row, units, needed = values, -(-plane.tile_height // down), -(-needed // down)
    else:
        row, units = -(-values * plane.bits // 8), plane.tile_height
    size = row * units
    # One byte more than fits, to see that a tile stored without its padding is not a longer one.
    raw = _unpack_bytes(plane, data, size + plane.cut)
    if len(raw) < row * needed or (plane.cut and len(raw) != size):
        raise UndecodableError(f"{len(raw)} bytes of {size}")
    found = _unpack_integers(plane, raw[: min(len(raw) // row, units) * row], values)
    if shares_chroma(plane):
        return found
    found = found.reshape(-1, plane.tile_width, plane.samples)
    return np.cumsum(found, axis=1, dtype=found.dtype) if uses_predictor(plane) else found


def _unpack_integers(plane: Plane, raw: bytes, values: int) -> Samples:
    if plane.bits == 8:
        return np.frombuffer(raw, np.uint8).reshape(-1, values)
    if plane.bits == 16:
        return np.frombuffer(raw, plane.directory.endian + "u2").astype(np.uint16).reshape(-1, values)
    import imagecodecs

    dtype = np.uint8 if plane.bits < 8 else np.uint16
    return np.asarray(imagecodecs.packints_decode(raw, dtype, plane.bits, runlen=values)).reshape(-1, values)


def _unpack_bytes(plane: Plane, data: bytes, size: int) -> bytes:
    name = COMPRESSIONS[plane.compression]
    if name == "none":
        return data[:size]
    if name == "LZMA":
        return _unpack_lzma(data, size)
    try:
        # ``out`` bounds what a hostile stream can unpack to.
        return bytes(_image_codec(_BYTE_CODECS[name])(data, out=bytearray(size)))
    except (RuntimeError, ValueError) as error:
        raise UndecodableError(str(error)) from error


def _unpack_lzma(data: bytes, size: int) -> bytes:
    """imagecodecs gives a stream all the memory that it asks for; this one is bounded."""
    try:
        return lzma.LZMADecompressor(memlimit=_LZMA_MEMORY).decompress(data, max_length=size)
    except (lzma.LZMAError, EOFError, MemoryError) as error:
        raise UndecodableError(str(error)) from error


def _image_codec(name: str) -> Any:
    import imagecodecs

    if not getattr(getattr(imagecodecs, name.upper(), None), "available", False):
        raise MissingPackage(f"this TIFF needs the codec {name}; pip install --upgrade imagecodecs")
    return getattr(imagecodecs, f"{name}_decode")


def _decode_fax(plane: Plane, data: bytes, needed: int) -> Samples:
    more = {"t4options": plane.directory.number(292, 0)} if plane.compression == 3 else {}
    try:
        found = np.asarray(_image_codec(_FAX_CODECS[plane.compression])(data, needed, plane.tile_width, **more))
    except (RuntimeError, ValueError) as error:
        raise UndecodableError(str(error)) from error
    return found.reshape(needed, plane.tile_width, 1).astype(np.uint8)


def _decode_image(plane: Plane, data: bytes, needed: int) -> Samples:
    """Codecs whose stream says its own size: it must be the tile's."""
    name = _IMAGE_CODECS[COMPRESSIONS[plane.compression]]
    if name == "lerc":
        data = _inner_lerc(plane, data)
    elif name == "jpegxr":
        _check_entries(data)
    return decode_bounded(plane, lambda out: _image_codec(name)(data, out=out), needed)


def decode_bounded(plane: Plane, decode: Any, needed: int) -> Samples:
    """Decode into arrays of the heights that the tile may have; codecs refuse one that their stream does not fit."""
    dtype = np.uint8 if plane.bits <= 8 else np.uint16
    said = ""
    for rows in dict.fromkeys((plane.tile_height, needed)):
        shape = (rows, plane.tile_width, plane.samples) if plane.samples > 1 else (rows, plane.tile_width)
        try:
            found = np.asarray(decode(np.empty(shape, dtype)))
        except ValueError as error:
            said = str(error)
        except RuntimeError as error:
            raise UndecodableError(str(error)) from error
        else:
            return found.reshape(rows, plane.tile_width, plane.samples)
    raise UndecodableError(said)


def _check_entries(data: bytes) -> None:
    """Its decoder prints a line for each tag that it does not know: an honest file has some twenty."""
    at = int.from_bytes(data[4:8], "little")
    if int.from_bytes(data[at : at + 2], "little") > _MOST_ENTRIES:
        raise UndecodableError("a JPEG XR file of too many tags")


def _inner_lerc(plane: Plane, data: bytes) -> bytes:
    """LERC may be packed once more (tag 50674): 1 deflate, 2 zstd."""
    packing = [*plane.directory.numbers(50674), 0, 0][1]
    if not packing:
        return data
    size = 2 * plane.tile_width * plane.tile_height * plane.samples * -(-plane.bits // 8) + 4096
    return _unpack_bytes(replace(plane, compression=8 if packing == 1 else 50000), data, size)
