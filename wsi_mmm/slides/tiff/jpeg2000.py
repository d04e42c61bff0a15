"""JPEG 2000 codestreams of TIFF tiles: what they claim is bounded before they are decoded (ISO/IEC 15444-1 annex A).

A few hundred bytes may ask for gigabytes: of precincts of two pixels, of layers, of tiles inside the tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from wsi_mmm.slides.tiff.planes import Plane
from wsi_mmm.slides.tiff.samples import Samples, UndecodableError, check_rows

_START = b"\xff\x4f\xff\x51"
_COD, _COC, _SOT, _SOD, _EOC = 0x52, 0x53, 0x90, 0x93, 0xD9
_MARKERS = frozenset((0x50, 0x51, 0x52, 0x53, 0x55, 0x57, 0x58, 0x59, 0x5C, 0x5D, 0x5E, 0x5F, 0x60, 0x61, 0x63, 0x64,
                      0x74, 0x75, 0x77, 0x78))  # fmt: skip
_MOST_TILES = 1024  # inside a native tile
_MOST_PRECINCTS, _MOST_PACKETS, _MOST_BLOCKS = 1 << 16, 1 << 20, 1 << 17  # of all components together


def jpeg2000_samples(plane: Plane, data: bytes, needed: int) -> tuple[Samples, bool]:
    """Return the samples of a tile, and whether the codec made RGB of them, as it does where chroma is subsampled.

    Raises UndecodableError.
    """
    import imagecodecs

    at = data.find(_START, 0, 4096)
    if at < 0 and plane.reversed_bits:
        data = bytes(imagecodecs.bitorder_decode(data))
        at = data.find(_START, 0, 4096)
    subsampled = _check_size(plane, data, at, needed)
    _check_coding(plane, data, at)
    try:
        # Without the boxes round the codestream: only the TIFF says what the colours are.
        pixels = np.asarray(imagecodecs.jpeg2k_decode(data[at:]))
    except (imagecodecs.Jpeg2kError, ValueError) as error:
        raise UndecodableError(str(error)) from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > (1 if plane.bits <= 8 else 2):
        raise UndecodableError(f"{pixels.dtype} pixels where {plane.bits} bits are claimed")
    return pixels[: check_rows(plane, len(pixels), needed)], subsampled


def _check_size(plane: Plane, data: bytes, at: int, needed: int) -> bool:
    """Refuse a codestream at ``at`` that is not of the plane's tiles; tell whether its chroma is subsampled."""
    if at < 0 or len(data) < at + 42 + 3 * plane.samples:
        raise UndecodableError("no JPEG 2000 codestream")
    x1, y1, x0, y0, wide, high, left, top = (
        int.from_bytes(data[at + 8 + 4 * n : at + 12 + 4 * n], "big") for n in range(8)
    )
    if x1 - x0 != plane.tile_width or not needed <= y1 - y0 <= plane.tile_height:
        raise UndecodableError(f"a JPEG 2000 image of {x1 - x0} x {y1 - y0} px")
    if not wide or not high or -(-(x1 - left) // wide) * -(-(y1 - top) // high) > _MOST_TILES:
        raise UndecodableError(f"a JPEG 2000 image in tiles of {wide} x {high} px")
    components = int.from_bytes(data[at + 40 : at + 42], "big")
    if components != plane.samples:
        raise UndecodableError(f"a JPEG 2000 image of {components} components")
    steps = {tuple(data[at + 43 + 3 * n : at + 45 + 3 * n]) for n in range(components)}
    return steps != {(1, 1)}


def _check_coding(plane: Plane, data: bytes, at: int) -> None:
    """Refuse precincts, layers and code blocks that no encoder makes so many of."""
    layers = 1
    for marker, body in _segments(data, at + 2):
        if marker == _COD and len(body) >= 10:
            layers = max(layers, int.from_bytes(body[2:4], "big"))
            _check_style(plane, body[5:], bool(body[0] & 1), layers)
        elif marker == _COC and len(body) >= 7:
            _check_style(plane, body[2:], bool(body[1] & 1), layers)


def _check_style(plane: Plane, style: bytes, sized: bool, layers: int) -> None:
    levels, across, down = min(style[0], 32), (style[1] & 15) + 2, (style[2] & 15) + 2
    sizes = style[5:] if sized else b""
    precincts = 0
    for resolution in range(levels + 1):
        size, halvings = sizes[resolution] if resolution < len(sizes) else 0xFF, levels - resolution
        columns = -(-plane.tile_width >> halvings + (size & 15))
        precincts += columns * -(-plane.tile_height >> halvings + (size >> 4))
    precincts *= plane.samples
    blocks = (plane.tile_width * plane.tile_height * plane.samples) >> (across + down)
    if precincts > _MOST_PRECINCTS or precincts * layers > _MOST_PACKETS or blocks > _MOST_BLOCKS:
        raise UndecodableError(f"a JPEG 2000 image of {precincts} precincts, {layers} layers, {blocks} code blocks")


def _segments(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, body) of the main header and of the headers of all parts. Raises UndecodableError."""
    part = stop = 0
    while at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF or (marker not in _MARKERS and marker not in (_SOT, _SOD, _EOC)):
            raise UndecodableError("a JPEG 2000 codestream with unknown markers")
        if marker == _EOC:
            return
        if marker == _SOT:
            part = at
            stop = part + int.from_bytes(data[at + 6 : at + 10], "big")
        if marker == _SOD:
            if stop <= at:  # the last part
                return
            at = stop
            continue
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + max(length, 2)
