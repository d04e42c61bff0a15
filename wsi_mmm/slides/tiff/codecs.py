"""Bytes of one native tile -> uint8[tile_height, tile_width, 3] RGB, or UndecodableError. No I/O.

JPEG is decoded by libjpeg-turbo with its accurate DCT and 'fancy' chroma upsampling, as OpenSlide does: equal pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from wsi_mmm.slides.tiff.planes import Plane
from wsi_mmm.storage.ranges import Buffer
from wsi_mmm.types import U8

# APP14 'Adobe', version 100, no flags, then the colour transform: 0 = none (RGB), 1 = YCbCr.
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_SOI = b"\xff\xd8"
_JFIF = b"\xff\xd8\xff\xe0"
_YCC_J2K = 33003


class UndecodableError(Exception):
    """The bytes of a tile do not decode to a whole tile. Never leaves the reader: the tile is listed as failed."""


class Decode(Protocol):
    """Bytes of one tile -> its pixels at 1/``shrink``, in ``out`` (contiguous, of that size) where the codec can.

    ``rows``: how many must be there; strips may end early.
    """

    def __call__(self, data: Buffer, shrink: int, rows: int, out: U8 | None = None, /) -> U8: ...


def decoder(plane: Plane) -> Decode:
    """Return the decoder of a plane's tiles; shrink other than 1 is for JPEG only."""
    if plane.compression == 7:
        return _jpeg_decoder(plane)
    if plane.compression in (33003, 33005, 34712):
        return lambda data, shrink, rows, out=None: _decode_jpeg2000(plane, bytes(data), rows)
    return lambda data, shrink, rows, out=None: _decode_plain(plane, bytes(data), rows)


def shrinks(plane: Plane) -> tuple[int, ...]:
    """Return the scales the codec can decode to: 1/1 .. 1/8 for JPEG tiles of a fitting size."""
    if plane.compression != 7 or not plane.tiled:
        return (1,)
    return tuple(s for s in (1, 2, 4, 8) if plane.tile_width % s == 0 and plane.tile_height % s == 0)


def most_bytes(plane: Plane) -> int:
    """Return a length that no honest tile exceeds: noise in any codec takes less than twice its pixels."""
    return 2 * plane.tile_width * plane.tile_height * plane.samples + (1 << 16)


def _jpeg_decoder(plane: Plane) -> Decode:
    import simplejpeg

    inverted, complete = plane.photometric == 0, _stream_completer(plane)

    def decode(data: Buffer, shrink: int, rows: int, out: U8 | None = None) -> U8:
        raw = complete(data)
        width, height = plane.tile_width // shrink, plane.tile_height // shrink
        buffer = np.empty((height, width, 3), np.uint8) if out is None else out
        try:
            pixels = simplejpeg.decode_jpeg(raw, min_height=height, min_width=width, min_factor=shrink, buffer=buffer)
        except ValueError as error:
            raise UndecodableError(str(error)) from error
        if pixels.shape[1] != width or (plane.tiled and pixels.shape[0] != height):
            raise UndecodableError(f"a JPEG of {pixels.shape[1]} x {pixels.shape[0]} px")
        whole = buffer if pixels.shape[0] == height else _pad_strip(pixels, height, -(-rows // shrink))
        return 255 - whole if inverted else whole

    return decode


def _stream_completer(plane: Plane) -> Callable[[Buffer], Buffer]:
    """Return what makes a tile a whole JPEG stream: with the shared tables, and with markers that say its colours."""
    head = _SOI + (_ADOBE + (b"\x01" if plane.photometric == 6 else b"\x00") if plane.samples == 3 else b"")
    head += _shared_tables(plane)
    rgb = plane.photometric != 6
    plain = not rgb and not _shared_tables(plane)

    def complete(data: Buffer) -> Buffer:
        start = bytes(data[:4])
        if plain and start == _JFIF:  # all is said in the tile itself
            return data
        if start[:2] != _SOI:
            raise UndecodableError("no JPEG")
        if rgb or start != _JFIF:
            return head + _without_colour_markers(bytes(data))
        return b"".join((head, memoryview(data)[2:]))

    return complete


def _shared_tables(plane: Plane) -> bytes:
    """The quantisation and Huffman tables that all tiles share, without the markers round them."""
    tables = plane.directory.values.get(347, b"")
    stop = tables.rfind(b"\xff\xd9")
    return tables[2:stop] if tables[:2] == _SOI and stop >= 2 else b""


def _without_colour_markers(data: bytes) -> bytes:
    """Drop APP0 and APP14 before the first frame: the TIFF's photometric tag decides on the colours, as in libtiff."""
    kept: list[bytes] = []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xC0, 0xC1, 0xC2, 0xDA):
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] not in (0xE0, 0xEE):
            kept.append(data[at:stop])
        at = stop
    return b"".join([*kept, data[at:]])


def _pad_strip(pixels: U8, height: int, rows: int) -> U8:
    """The last strip of an image may be shorter than the others; rows below its ``rows`` are outside the image."""
    if not rows <= pixels.shape[0] <= height:
        raise UndecodableError(f"a strip of {pixels.shape[0]} rows where {rows} are needed")
    full = np.full((height, *pixels.shape[1:]), 255, np.uint8)
    full[: pixels.shape[0]] = pixels
    return full


def _decode_jpeg2000(plane: Plane, data: bytes, needed: int) -> U8:
    import imagecodecs

    at = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    subsampled = _check_size(plane, data, at, needed)
    try:
        # Without the boxes round the codestream: only the TIFF says what the colours are.
        pixels = np.asarray(imagecodecs.jpeg2k_decode(data[at:]))
    except (imagecodecs.Jpeg2kError, ValueError) as error:
        raise UndecodableError(str(error)) from error
    # Halved chroma (Aperio's 33003) is enlarged by the codec, which then also turns it into RGB.
    ycc = (plane.compression == _YCC_J2K or plane.photometric == 6) and not subsampled
    found = _from_ycc(_as_rgb(plane, pixels)) if ycc else _as_rgb(plane, pixels)
    return found if len(found) == plane.tile_height else _pad_strip(found, plane.tile_height, needed)


def _check_size(plane: Plane, data: bytes, at: int, needed: int) -> bool:
    """Refuse a codestream at ``at`` that is not of the plane's tiles; tell whether its chroma is subsampled.

    ISO/IEC 15444-1 A.5.1: the SIZ marker segment.
    """
    if at < 0 or len(data) < at + 42 + 3 * plane.samples:
        raise UndecodableError("no JPEG 2000 codestream")
    x1, y1, x0, y0 = (int.from_bytes(data[at + 8 + 4 * n : at + 12 + 4 * n], "big") for n in range(4))
    if x1 - x0 != plane.tile_width or not needed <= y1 - y0 <= plane.tile_height:
        raise UndecodableError(f"a JPEG 2000 image of {x1 - x0} x {y1 - y0} px")
    components = int.from_bytes(data[at + 40 : at + 42], "big")
    if components != plane.samples:
        raise UndecodableError(f"a JPEG 2000 image of {components} components")
    steps = {tuple(data[at + 43 + 3 * n : at + 45 + 3 * n]) for n in range(components)}
    return steps != {(1, 1)}


def _from_ycc(pixels: U8) -> U8:
    """JFIF 1.02 section 7: full-range YCbCr to RGB."""
    y, cb, cr = (pixels[..., n].astype(np.float32) for n in range(3))
    cb, cr = cb - 128, cr - 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    return np.clip(np.floor(rgb + 0.5), 0, 255).astype(np.uint8)


def _decode_plain(plane: Plane, data: bytes, needed: int) -> U8:
    """Uncompressed, LZW, deflate, packbits or zstd, with an optional horizontal predictor."""
    row = plane.tile_width * plane.samples
    size = row * plane.tile_height
    raw = _unpack_bytes(plane.compression, data, size)
    rows = len(raw) // row
    if rows < needed:
        raise UndecodableError(f"{len(raw)} bytes of {size}")
    pixels = np.frombuffer(raw, np.uint8, min(rows, plane.tile_height) * row)
    pixels = pixels.reshape(-1, plane.tile_width, plane.samples)
    if plane.predictor == 2:
        pixels = np.cumsum(pixels, axis=1, dtype=np.uint8)
    found = _as_rgb(plane, pixels)
    return found if len(found) == plane.tile_height else _pad_strip(found, plane.tile_height, needed)


def _unpack_bytes(compression: int, data: bytes, size: int) -> bytes:
    if compression == 1:
        return data[:size]
    import imagecodecs

    codecs: dict[int, tuple[Any, Any]] = {
        5: (imagecodecs.lzw_decode, imagecodecs.LzwError),
        8: (imagecodecs.zlib_decode, imagecodecs.ZlibError),
        32946: (imagecodecs.zlib_decode, imagecodecs.ZlibError),
        32773: (imagecodecs.packbits_decode, imagecodecs.PackbitsError),
        50000: (imagecodecs.zstd_decode, imagecodecs.ZstdError),
    }
    unpack, foreign = codecs[compression]
    try:
        return bytes(unpack(data, out=bytearray(size)))  # ``out`` bounds what a hostile stream can unpack to
    except (foreign, ValueError) as error:
        raise UndecodableError(str(error)) from error


def _as_rgb(plane: Plane, pixels: Any) -> U8:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.shape[1:2] != (plane.tile_width,):
        raise UndecodableError(f"{pixels.dtype} pixels of {pixels.shape}")
    if pixels.shape[2] in (2, 4):
        pixels = _on_white(pixels, plane.directory.number(338, 0))
    if plane.photometric == 0:
        pixels = 255 - pixels
    if pixels.shape[2] < 3:
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])


def _on_white(pixels: Any, kind: int) -> U8:
    """Colours without their last sample, which is 1: alpha, multiplied in; 2: alpha; else something unknown."""
    colour, alpha = pixels[..., :-1], pixels[..., -1:].astype(np.uint16)
    if kind == 1:
        colour = np.minimum(colour + (255 - alpha), 255)
    elif kind == 2:
        colour = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    return np.asarray(colour, np.uint8)
