"""Slides made here: an H&E-like one with known nuclei, a checkerboard with known positions, an array as Reader."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from wsi_mmm.errors import OptionError
from wsi_mmm.slides.base import ReadStats
from wsi_mmm.slides.resample.scaled import NO_FAILURES, Source, Window, read_scaled, sources_of
from wsi_mmm.slides.resample.weights import average_boxes
from wsi_mmm.slides.synthetic import SyntheticNuclei, synthetic_image
from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff
from wsi_mmm.types import I64, U8, Block, Canvas, Level, SlideInfo

_APERIO = (
    "Aperio Image Library synthetic\r\n{w}x{h} [0,0 {w}x{h}] (256x256) JPEG/RGB Q=90|AppMag = {mag:g}|MPP = {mpp:g}"
)
_OME = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    '<Image ID="Image:0">'
    '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{w}" SizeY="{h}" SizeC="3" SizeZ="1" SizeT="1" '
    'PhysicalSizeX="{mpp}" PhysicalSizeXUnit="µm" PhysicalSizeY="{mpp}" PhysicalSizeYUnit="µm">'
    '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
)
__all__ = ["VARIANTS", "ArrayReader", "SyntheticNuclei", "checkerboard_slide", "synthetic_image", "synthetic_slide"]
VARIANTS = (
    "jpeg", "rgb", "svs", "bigtiff", "ome", "no-mpp", "jpeg2000", "jpeg2000-ycc", "lzw", "deflate", "zstd", "none",
    "strips",
)  # fmt: skip


class ArrayReader:
    """A Reader over uint8[h, w, 3] in memory: level 0 only, nothing ever fails unless ``failed`` says so.

    ``failed``: level-0 rectangles (x0, y0, x1, y1) that read as white and are listed, as tiles that cannot be decoded.
    """

    def __init__(self, array: U8, mpp: float | None = 0.5, *, tile: int = 256, failed: I64 = NO_FAILURES) -> None:
        self._array = np.ascontiguousarray(array)
        self._failed = failed
        height, width = array.shape[:2]
        level = Level(width, height, 1.0, 1.0, tile, tile)
        mark = blake2b(self._array.tobytes() + repr(array.shape).encode(), digest_size=16).hexdigest()
        self.info = SlideInfo("memory", width, height, mpp, mpp, (level,), "array", "array", mark)
        self._sources = sources_of((level,))

    def read(self, block: Block) -> Canvas:
        """Return the block's pixels."""
        return read_scaled(block, self._sources, self._fill_window)

    def stats(self) -> ReadStats:
        """Return zeros: memory costs nothing."""
        return ReadStats()

    def close(self) -> None:
        """Do nothing."""

    def _fill_window(self, source: Source, window: Window, out: U8) -> I64:
        x0, y0, x1, y1 = window
        out[...] = self._array[y0:y1, x0:x1]
        f = self._failed
        hit = f[(f[:, 0] < x1) & (f[:, 2] > x0) & (f[:, 1] < y1) & (f[:, 3] > y0)]
        for a, b, c, d in np.maximum(hit - [x0, y0, x0, y0], 0):
            out[b:d, a:c] = 255
        return hit


def synthetic_slide(
    path: str | Path,
    seed: int = 0,
    *,
    width: int = 6144,
    height: int = 4608,
    mpp: float = 0.5,
    nuclei: int = 2000,
    variant: str = "jpeg",
) -> SyntheticNuclei:
    """Write an H&E-like slide and return its nuclei. Same arguments, same file. Raises OutputError, OptionError."""
    if variant not in VARIANTS:
        raise OptionError(f"there is no variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    top, drawn = synthetic_image(seed, width=width, height=height, mpp=mpp, nuclei=nuclei)
    write_tiff(path, list(pyramid(top)), form_of(variant, width, height, mpp=mpp))
    return drawn


_PLAIN_FORMS = ("rgb", "jpeg2000", "jpeg2000-ycc", "lzw", "deflate", "zstd", "none")


def form_of(variant: str, width: int, height: int, *, mpp: float) -> TiffForm:
    """Return how a variant is stored."""
    text = {"svs": _APERIO, "ome": _OME}.get(variant, "").format(w=width, h=height, mpp=mpp, mag=round(10 / mpp))
    tagged = None if variant in ("svs", "ome", "no-mpp") else mpp
    compression = variant if variant in _PLAIN_FORMS else "jpeg"
    return TiffForm(
        compression="none" if variant == "strips" else compression, tile=16 if variant == "strips" else 256,
        big=variant == "bigtiff", strips=variant == "strips", sub_ifds=variant == "ome", mpp=tagged, description=text,
    )  # fmt: skip


def pyramid(top: U8, factor: int = 4) -> Iterator[U8]:
    """Yield ``top`` and its area averages by ``factor``, down to about one tile."""
    yield top
    while max(top.shape[:2]) > 512:
        top = average_boxes(top, factor)
        yield top


def checkerboard_slide(
    path: str | Path, *, width: int = 3000, height: int = 2200, shift: tuple[int, int] = (37, 91)
) -> U8:
    """Write a lossless slide of 16 px squares shifted by ``shift``, neighbours of different colours; return level 0.

    Its levels are exact area averages by 2, 4, 8, rounded down in size.
    """
    y, x = np.mgrid[:height, :width].astype(np.int64)
    row, column = (y + shift[1]) // 16, (x + shift[0]) // 16
    dark = ((row + column) % 2)[..., None] * np.array([120, 120, 120])
    colour = np.stack([(column * 7) % 128, (row * 5) % 128, (row * 3 + column * 11) % 128], axis=-1)
    top: U8 = (colour + dark).astype(np.uint8)
    write_tiff(path, list(pyramid(top, 2)), TiffForm("deflate", mpp=0.25))
    return top
