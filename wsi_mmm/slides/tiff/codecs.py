"""Bytes of one native tile -> uint8[tile_height, tile_width, 3] RGB, or UndecodableError. No I/O.

JPEG is decoded by libjpeg-turbo with its accurate DCT and 'fancy' chroma upsampling, as OpenSlide does: equal pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from wsi_mmm.slides.tiff.colours import as_rgb, colour_converter
from wsi_mmm.slides.tiff.jpeg import (
    EOI,
    check_scans,
    holds_ycbcr,
    joined_start,
    read_header,
    shared_tables,
    stream_completer,
)
from wsi_mmm.slides.tiff.jpeg2000 import jpeg2000_samples
from wsi_mmm.slides.tiff.planes import CMYK, JPEG, JPEG2000, Plane, stored_ycbcr
from wsi_mmm.slides.tiff.samples import (
    Samples,
    UndecodableError,
    check_codec,
    decode_bounded,
    read_samples,
    split_parts,
)
from wsi_mmm.storage.ranges import Buffer
from wsi_mmm.types import U8


class Decode(Protocol):
    """Bytes of one tile -> its pixels at 1/``shrink``, in ``out`` (contiguous, of that size) where the codec can.

    ``rows``: how many must be there; strips may end early.
    """

    def __call__(self, data: Buffer, shrink: int, rows: int, out: U8 | None = None, /) -> U8: ...


def decoder(plane: Plane) -> Decode:
    """Return the decoder of a plane's tiles; shrink other than 1 is for JPEG only. Raises MissingPackage."""
    if _plain_jpeg(plane):
        return _jpeg_decoder(plane)
    check_codec(plane)
    read = sample_reader(plane)
    # The codec turns interleaved JPEG and, where it is subsampled, JPEG 2000 into RGB.
    as_stored = colour_converter(plane, ycbcr=stored_ycbcr(plane))
    as_decoded = colour_converter(as_rgb(plane), ycbcr=False)

    def decode(data: Buffer, shrink: int, rows: int, out: U8 | None = None) -> U8:
        samples, rgb = read(bytes(data), rows)
        found = as_decoded(samples) if rgb else as_stored(samples)
        return found if len(found) == plane.tile_height else _pad_strip(found, plane.tile_height, rows)

    return decode


def sample_reader(plane: Plane) -> Callable[[bytes, int], tuple[Samples, bool]]:
    """Return what gives the samples of a tile, and whether the codec made RGB of YCbCr. Raises UndecodableError."""
    one: Callable[[Plane, bytes, int], tuple[Samples, bool]] | None = None
    if plane.compression in JPEG:
        one = _jpeg_samples
    elif plane.compression in JPEG2000:
        one = jpeg2000_samples
    if one is None:
        return lambda data, rows: (read_samples(plane, data, rows), False)
    if not plane.separate:
        return lambda data, rows: one(plane, data, rows)
    single = replace(plane, samples=1, separate=False, photometric=1)

    def read(data: bytes, rows: int) -> tuple[Samples, bool]:
        parts = [one(single, part, rows)[0] for part in split_parts(data)]
        if len(parts) != plane.samples or len({len(part) for part in parts}) != 1:
            raise UndecodableError(f"{len(parts)} planes of {plane.samples}")
        return np.concatenate(parts, axis=2), False

    return read


def shrinks(plane: Plane) -> tuple[int, ...]:
    """Return the scales the codec can decode to: 1/1 .. 1/8 for JPEG tiles of a fitting size."""
    if not _plain_jpeg(plane) or not plane.tiled:
        return (1,)
    return tuple(s for s in (1, 2, 4, 8) if plane.tile_width % s == 0 and plane.tile_height % s == 0)


def most_bytes(plane: Plane) -> int:
    """Return a length that no honest tile exceeds: noise in any codec takes less than twice its pixels."""
    return 2 * plane.tile_width * plane.tile_height * plane.samples * -(-plane.bits // 8) + (1 << 16)


def _plain_jpeg(plane: Plane) -> bool:
    """Tell whether tiles are JPEG of 8 bits with one or three components."""
    return plane.compression in JPEG and plane.samples in (1, 3) and plane.bits == 8 and not plane.separate


def _jpeg_decoder(plane: Plane) -> Decode:
    import simplejpeg

    inverted, complete = plane.photometric == 0, stream_completer(plane)

    def decode(data: Buffer, shrink: int, rows: int, out: U8 | None = None) -> U8:
        raw = complete(data)
        width, height = plane.tile_width // shrink, plane.tile_height // shrink
        buffer = np.empty((height, width, 3), np.uint8) if out is None else out
        try:
            pixels = simplejpeg.decode_jpeg(raw, min_height=height, min_width=width, min_factor=shrink, buffer=buffer)
        except ValueError as error:
            return _decode_odd_jpeg(plane, decode, data, error, (shrink, rows, out))
        if pixels.shape[1] != width or (plane.tiled and pixels.shape[0] != height):
            raise UndecodableError(f"a JPEG of {pixels.shape[1]} x {pixels.shape[0]} px")
        whole = buffer if pixels.shape[0] == height else _pad_strip(pixels, height, -(-rows // shrink))
        return 255 - whole if inverted else whole

    return decode


def _decode_odd_jpeg(
    plane: Plane, decode: Decode, data: Buffer, error: ValueError, wanted: tuple[int, int, U8 | None]
) -> U8:
    """Decode what the fast decoder refuses: a stream whose end marker is missing, and the lossless process."""
    raw = bytes(data)
    header = read_header(raw)
    if EOI not in raw[header.length :]:
        return decode(raw + EOI, *wanted)  # of a stream that really ends early it says so
    shrink, rows, _ = wanted
    if header.process != 0xC3 or shrink != 1:
        raise UndecodableError(str(error)) from error
    samples, rgb = _jpeg_samples(plane, raw, rows)
    found = colour_converter(as_rgb(plane) if rgb else plane, ycbcr=False)(samples)
    return found if len(found) == plane.tile_height else _pad_strip(found, plane.tile_height, rows)


def _jpeg_samples(plane: Plane, data: bytes, needed: int) -> tuple[Samples, bool]:
    """JPEG of other bits or components, and the lossless process."""
    import imagecodecs

    header = read_header(data)
    check_scans(data)
    if len(header.components) != plane.samples or EOI not in data[header.length :]:
        raise UndecodableError(f"a JPEG of {len(header.components)} components, or without its end")
    ycbcr = plane.samples == 3 and not header.lossless and holds_ycbcr(header, plane.photometric)
    colours: dict[str, Any] = {}
    transform = None
    if plane.samples == 3:
        colours = {"colorspace": "YCBCR" if ycbcr else "RGB", "outcolorspace": "RGB"}
    elif plane.photometric == CMYK and header.adobe == 2:
        transform, colours = 2, {"outcolorspace": "CMYK"}
    stream = joined_start(header, shared_tables(plane), transform) + data[header.length :]

    def decode(out: Samples) -> Any:
        return imagecodecs.jpeg8_decode(stream, out=out, **colours)

    return decode_bounded(plane, decode, needed), plane.samples == 3


def _pad_strip(pixels: U8, height: int, rows: int) -> U8:
    """The last strip of an image may be shorter than the others; rows below its ``rows`` are outside the image."""
    if not rows <= pixels.shape[0] <= height:
        raise UndecodableError(f"a strip of {pixels.shape[0]} rows where {rows} are needed")
    full = np.full((height, *pixels.shape[1:]), 255, np.uint8)
    full[: pixels.shape[0]] = pixels
    return full
