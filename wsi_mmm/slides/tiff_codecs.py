"""Bytes of one native tile -> uint8[tile_height, tile_width, 3] RGB, or UndecodableError. No I/O.

JPEG is decoded by libjpeg-turbo with its accurate DCT and 'fancy' chroma upsampling, as OpenSlide does: equal pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from wsi_mmm.slides.tiff_meta import Plane
from wsi_mmm.types import U8

# APP14 'Adobe', version 100, no flags, then the colour transform: 0 = none (RGB), 1 = YCbCr.
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_SOI = b"\xff\xd8"
_YCC_J2K = 33003


class UndecodableError(Exception):
    """The bytes of a tile do not decode to a whole tile. Never leaves the reader: the tile is listed as failed."""


Decode = Callable[[bytes, int], U8]  # data, shrink -> pixels


def decoder(plane: Plane) -> Decode:
    """Return the decoder of a plane's tiles; shrink other than 1 is for JPEG only."""
    if plane.compression == 7:
        return _jpeg_decoder(plane)
    if plane.compression in (33003, 33005, 34712):
        return lambda data, shrink: _jpeg2000(plane, data)
    return lambda data, shrink: _plain(plane, data)


def shrinks(plane: Plane) -> tuple[int, ...]:
    """Return the scales the codec can decode to: 1/1 .. 1/8 for JPEG tiles of a fitting size."""
    if plane.compression != 7 or not plane.tiled:
        return (1,)
    return tuple(s for s in (1, 2, 4, 8) if plane.tile_width % s == 0 and plane.tile_height % s == 0)


def _jpeg_decoder(plane: Plane) -> Decode:
    import simplejpeg

    tables = plane.directory.values.get(347, b"")
    tables = tables[2:-2] if tables[:2] == _SOI and tables[-2:] == b"\xff\xd9" else b""
    head = _SOI + (_ADOBE + (b"\x01" if plane.photometric == 6 else b"\x00") if plane.samples == 3 else b"") + tables
    rgb = plane.photometric != 6

    def decode(data: bytes, shrink: int) -> U8:
        if data[:2] != _SOI:
            raise UndecodableError("no JPEG")
        width, height = plane.tile_width // shrink, plane.tile_height // shrink
        buffer = np.empty((height, width, 3), np.uint8)
        body = _without_colour_markers(data) if rgb or data[2:4] != b"\xff\xe0" else data[2:]
        try:
            pixels = simplejpeg.decode_jpeg(
                head + body, min_height=height, min_width=width, min_factor=shrink, buffer=buffer
            )
        except ValueError as error:
            raise UndecodableError(str(error)) from error
        if pixels.shape[1] != width or (plane.tiled and pixels.shape[0] != height):
            raise UndecodableError(f"a JPEG of {pixels.shape[1]} x {pixels.shape[0]} px")
        return pixels if pixels.shape[0] == height else _padded(pixels, height)

    return decode


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


def _padded(pixels: U8, height: int) -> U8:
    """The last strip of an image may be shorter than the others; rows below it are outside the image."""
    if pixels.shape[0] > height:
        raise UndecodableError(f"a strip of {pixels.shape[0]} rows")
    full = np.full((height, *pixels.shape[1:]), 255, np.uint8)
    full[: pixels.shape[0]] = pixels
    return full


def _jpeg2000(plane: Plane, data: bytes) -> U8:
    import imagecodecs

    at = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or len(data) < at + 40:
        raise UndecodableError("no JPEG 2000 codestream")
    x1, y1, x0, y0 = (int.from_bytes(data[at + 8 + 4 * n : at + 12 + 4 * n], "big") for n in range(4))
    if (x1 - x0, y1 - y0) != (plane.tile_width, plane.tile_height):
        raise UndecodableError(f"a JPEG 2000 image of {x1 - x0} x {y1 - y0} px")
    try:
        pixels = np.asarray(imagecodecs.jpeg2k_decode(data))
    except (imagecodecs.Jpeg2kError, ValueError) as error:
        raise UndecodableError(str(error)) from error
    ycc = plane.compression == _YCC_J2K or plane.photometric == 6
    return _from_ycc(_rgb(plane, pixels)) if ycc else _rgb(plane, pixels)


def _from_ycc(pixels: U8) -> U8:
    """JFIF 1.02 section 7: full-range YCbCr to RGB."""
    y, cb, cr = (pixels[..., n].astype(np.float32) for n in range(3))
    cb, cr = cb - 128, cr - 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    return np.clip(np.floor(rgb + 0.5), 0, 255).astype(np.uint8)


def _plain(plane: Plane, data: bytes) -> U8:
    """Uncompressed, LZW, deflate, packbits or zstd, with an optional horizontal predictor."""
    row = plane.tile_width * plane.samples
    size = row * plane.tile_height
    raw = _unpacked(plane.compression, data, size)
    rows = len(raw) // row
    if rows == 0 or (rows < plane.tile_height and plane.tiled):
        raise UndecodableError(f"{len(raw)} bytes of {size}")
    pixels = np.frombuffer(raw, np.uint8, min(rows, plane.tile_height) * row)
    pixels = pixels.reshape(-1, plane.tile_width, plane.samples)
    if plane.predictor == 2:
        pixels = np.cumsum(pixels, axis=1, dtype=np.uint8)
    found = _rgb(plane, pixels)
    return found if len(found) == plane.tile_height else _padded(found, plane.tile_height)


def _unpacked(compression: int, data: bytes, size: int) -> bytes:
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


def _rgb(plane: Plane, pixels: Any) -> U8:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.shape[1:2] != (plane.tile_width,):
        raise UndecodableError(f"{pixels.dtype} pixels of {pixels.shape}")
    if plane.photometric == 0:
        pixels = 255 - pixels
    if pixels.shape[2] < 3:
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])
