"""Samples of a TIFF -> uint8 RGB: bit depths, palettes, negatives, CMYK, YCbCr and alpha."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from wsi_mmm.slides.tiff.planes import CMYK, PALETTE, WHITE_IS_ZERO, YCBCR, Plane, shares_chroma
from wsi_mmm.slides.tiff.samples import Samples, UndecodableError
from wsi_mmm.types import U8

_COLOURS = {CMYK: 4, 2: 3, YCBCR: 3}
_FULL_RANGE = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)


def colour_converter(plane: Plane, *, ycbcr: bool) -> Callable[[Samples], U8]:
    """Return what turns samples of ``plane`` into uint8[rows, width, 3]; ``ycbcr``: they are not RGB yet."""
    if plane.photometric == PALETTE:
        palette = _palette_of(plane)
        return lambda samples: palette[samples[..., 0]]
    narrow = _narrower(plane)
    from_ycbcr = _ycbcr_converter(plane) if ycbcr else None
    if from_ycbcr is not None and shares_chroma(plane):
        return lambda samples: from_ycbcr(_spread_chroma(plane, samples))
    count, alpha = _COLOURS.get(plane.photometric, 1), _alpha_of(plane)

    def convert(samples: Samples) -> U8:
        pixels = samples if narrow is None else narrow(samples)
        colours = pixels[..., :count]
        if from_ycbcr is not None:
            colours = from_ycbcr(colours)
        elif plane.photometric == CMYK:
            colours = _from_cmyk(colours)
        elif plane.photometric == WHITE_IS_ZERO:
            colours = 255 - colours
        if alpha is not None:
            colours = _on_white(colours, pixels[..., alpha[0], None], associated=alpha[1])
        if colours.shape[2] == 1:
            colours = np.repeat(colours, 3, axis=2)
        return np.ascontiguousarray(colours)

    return convert


def _narrower(plane: Plane) -> Callable[[Samples], U8] | None:
    """What brings samples to 8 bits, ``white`` to 255, rounded as libtiff does; None where they are."""
    white = plane.white
    if white == 255 and plane.bits == 8:
        return None
    table = ((np.arange(white + 1, dtype=np.uint32) * 510 + white) // (2 * white)).astype(np.uint8)

    def narrow(samples: Samples) -> U8:
        if white < np.iinfo(samples.dtype).max and int(samples.max()) > white:
            raise UndecodableError(f"a sample of {samples.max()} where the slide's brightest is {white}")
        return table[samples]

    return narrow


def _palette_of(plane: Plane) -> U8:
    """TIFF 6.0 section 5: all reds, greens, blues, of 16 bits; some writers fill 8 of them only."""
    numbers = np.array(plane.directory.numbers(320)[: 3 << plane.bits]).astype(np.uint16).reshape(3, -1).T
    return (numbers if numbers.max() < 256 else numbers >> 8).astype(np.uint8)


def _alpha_of(plane: Plane) -> tuple[int, bool] | None:
    """(the sample that is alpha, whether colours are multiplied with it): the first that tag 338 calls so."""
    first = _COLOURS.get(plane.photometric, 1)
    kinds = [int(kind) for kind in plane.directory.numbers(338)][-(plane.samples - first) :]
    for position, kind in enumerate(kinds if plane.samples > first else ()):
        if kind in (1, 2):
            return first + position, kind == 1
    return None


def _on_white(colour: U8, alpha: U8, *, associated: bool) -> U8:
    """Colours over white; ``associated``: alpha is multiplied in already."""
    opaque = alpha.astype(np.uint16)
    over = colour + (255 - opaque) if associated else (colour * opaque + 255 * (255 - opaque) + 127) // 255
    return np.asarray(np.minimum(over, 255), np.uint8)


def _from_cmyk(pixels: U8) -> U8:
    """As libtiff does: each ink and black take light away."""
    light = 255 - pixels.astype(np.uint16)
    return np.asarray(light[..., :3] * light[..., 3:] // 255, np.uint8)


def _ycbcr_converter(plane: Plane) -> Callable[[U8], U8]:
    """TIFF 6.0 section 21, with the tags 529 and 532; without them JFIF 1.02 section 7, full-range YCbCr to RGB."""
    reference, weights = plane.directory.numbers(532), plane.directory.numbers(529)
    low_y, high_y, low_b, high_b, low_r, high_r = reference if len(reference) == 6 else _FULL_RANGE
    steps = (255 / ((high_y - low_y) or 255), 127 / ((high_b - low_b) or 127), 127 / ((high_r - low_r) or 127))
    to_red, from_blue, from_red, to_blue = 1.402, 0.344136, 0.714136, 1.772
    if len(weights) == 3 and min(weights) > 0:
        red, green, blue = weights
        to_red, to_blue = 2 - 2 * red, 2 - 2 * blue
        from_blue, from_red = blue * to_blue / green, red * to_red / green

    def convert(pixels: U8) -> U8:
        y, cb, cr = (pixels[..., n].astype(np.float32) for n in range(3))
        y, cb, cr = (y - low_y) * steps[0], (cb - low_b) * steps[1], (cr - low_r) * steps[2]
        rgb = np.stack([y + to_red * cr, y - from_blue * cb - from_red * cr, y + to_blue * cb], axis=-1)
        return np.clip(np.floor(rgb + 0.5), 0, 255).astype(np.uint8)

    return convert


def _spread_chroma(plane: Plane, units: Samples) -> U8:
    """Units of luma for ``across`` x ``down`` pixels, then Cb and Cr -> uint8[rows, width, 3]."""
    across, down = plane.subsampling
    units = units.reshape(len(units), -1, across * down + 2)
    rows, columns = units.shape[:2]
    pixels = np.empty((rows, down, columns, across, 3), np.uint8)
    pixels[..., 0] = units[..., :-2].reshape(rows, columns, down, across).transpose(0, 2, 1, 3)
    pixels[..., 1:] = units[:, None, :, None, -2:]
    return pixels.reshape(rows * down, columns * across, 3)[: plane.tile_height, : plane.tile_width]


def as_rgb(plane: Plane) -> Plane:
    """Return the plane with samples that a codec has turned into RGB."""
    return replace(plane, photometric=2) if plane.photometric == YCBCR else plane
