"""Reading at any scale: choose the source, clip to the slide, resample once. Shared by all readers.

A *source* is a pyramid level, or level 0 decoded to 1/2, 1/4, 1/8 by its codec. Its pixel (i, j) covers the level-0
interval ``[i * downsample, (i + 1) * downsample)``; outside the slide everything is white.

Stored levels are lossy copies: on real slides (JPEG quality 75) they differ from the area average of level 0 by 7 to 10
grey levels on tissue, which compressing that average once more explains. So below ``exact_until`` level-0 px per target
px only level 0 is read, and the codec's own reduction (off by less than 1) saves the work; coarser scales (thumbnails,
tissue) take stored levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from wsi_mmm.slides.resample.weights import Taps, average_rows, taps
from wsi_mmm.types import I64, U8, Block, Canvas, Level, SlideInfo

WHITE = 255
NO_FAILURES: I64 = np.zeros((0, 4), np.int64)
_TOLERANCE = 1.001  # for scales that are meant to be at a limit: 16 from 0.25 mpp to 4.0002
_FINER = 2.5  # source px per target px where boxes do not nest: within 2 grey levels of the average of level 0
_SAME = 1e-6  # scales closer than this are the same: pixels are copied
_CANVAS_PIXELS = 1 << 24  # source px held at a time


@dataclass(frozen=True, slots=True)
class Source:
    """``level`` read at 1/``shrink`` (1: as stored). ``width``, ``height`` in source px, partial ones included.

    ``extent_x``, ``extent_y``: where the slide ends, in source px. A level whose size was rounded down ends before.
    ``step``: rows of source px to resample at a time: whole rows of native tiles.
    """

    level: int
    shrink: int
    width: int
    height: int
    downsample_x: float
    downsample_y: float
    extent_x: float
    extent_y: float
    step: int


Window = tuple[int, int, int, int]  # x0, y0, x1, y1 in source px, within the source
Fetch = Callable[[Source, Window, U8], I64]  # fills uint8[y1 - y0, x1 - x0, 3]; returns failed level-0 rectangles


def sources_of(levels: Sequence[Level], shrinks: Sequence[int] = (1,)) -> tuple[Source, ...]:
    """List every source; ``shrinks``: what the codec of all levels offers."""
    top = levels[0]
    found = []
    for n, level in enumerate(levels):
        down_x, down_y = _pixel_spacing(top, level)
        for s in shrinks:
            if level.tile_width % s == 0 and level.tile_height % s == 0:
                width, height = -(-level.width // s), -(-level.height // s)
                extents = top.width / (down_x * s), top.height / (down_y * s)
                found.append(
                    Source(
                        n,
                        s,
                        width,
                        height,
                        down_x * s,
                        down_y * s,
                        *extents,
                        level.tile_height // s * max(1, 256 // level.tile_height),
                    )
                )
    return tuple(found)


def _pixel_spacing(top: Level, level: Level) -> tuple[float, float]:
    """Return the spacing of a level's pixels in level-0 px.

    Writers halve or quarter, and round the size up or down: where one integer explains both sides, that is the spacing
    (measured on real slides: a ratio of sizes like 3.9994 shifts the far edge by half a pixel). Else the sizes' ratio.
    """
    factor = round(level.downsample_x)
    if abs(level.width * factor - top.width) < factor and abs(level.height * factor - top.height) < factor:
        return float(factor), float(factor)
    return level.downsample_x, level.downsample_y


def pick(sources: Sequence[Source], block: Block, exact_until: float = 1.0) -> Source:
    """Return the coarsest source that is fine enough for the block's scale and origin (the finest when none is)."""
    exact = min(block.scale_x, block.scale_y) * _TOLERANCE < exact_until
    candidates = [s for s in sources if s.level == 0] if exact else sources
    fit = [s for s in candidates if _fine_enough(block, s)]
    # Of equally coarse ones take the least shrunk: fewer bytes are read from a stored level.
    return max(fit or sources[:1], key=lambda s: (s.downsample_x * s.downsample_y, -s.shrink))


def copied(source: Source, scale_x: float, scale_y: float) -> bool:
    """Tell whether target px at this scale (origin 0) are pixels of ``source``."""
    return (
        _block_axis(0, 0, scale_x / source.downsample_x, 0.0).copies()
        and _block_axis(0, 0, scale_y / source.downsample_y, 0.0).copies()
    )


def _fine_enough(block: Block, source: Source) -> bool:
    """Averaging averages is exact only where the boxes nest; else the source must be clearly finer than the target."""
    return all(
        scale >= _FINER * down or (_is_whole(scale / down) and origin % down == 0)
        for scale, down, origin in (
            (block.scale_x, source.downsample_x, block.origin_x),
            (block.scale_y, source.downsample_y, block.origin_y),
        )
    )


def _is_whole(ratio: float) -> bool:
    return round(ratio) >= 1 and abs(ratio - round(ratio)) < _SAME


def read_scaled(block: Block, sources: Sequence[Source], fetch: Fetch, exact_until: float = 1.0) -> Canvas:
    """Return the block's canvas, fetched from the best source and resampled once."""
    source = pick(sources, block, exact_until)
    pixels = np.empty((block.height, block.width, 3), np.uint8)
    x = _block_axis(block.x, block.width, block.scale_x / source.downsample_x, block.origin_x / source.downsample_x)
    y = _block_axis(block.y, block.height, block.scale_y / source.downsample_y, block.origin_y / source.downsample_y)
    kx0, kx1 = x.inside(source.extent_x)
    ky0, ky1 = y.inside(source.extent_y)
    if (kx0, kx1, ky0, ky1) != (0, block.width, 0, block.height):
        pixels[...] = WHITE
    parts = _cut_parts(kx0, kx1, ky0, ky1, max(1.0, x.scale) * max(1.0, y.scale))
    failed = [_read_part(pixels, x, y, part, source=source, fetch=fetch) for part in parts]
    return Canvas(pixels, merge_failed(failed))


def taps_of(block: Block, source: Source) -> tuple[Taps, Taps] | None:
    """Return how the block's rows and columns are averaged; None where pixels are copied or lie beyond ``source``."""
    x = _block_axis(block.x, block.width, block.scale_x / source.downsample_x, block.origin_x / source.downsample_x)
    y = _block_axis(block.y, block.height, block.scale_y / source.downsample_y, block.origin_y / source.downsample_y)
    right, bottom = min(source.extent_x, source.width), min(source.extent_y, source.height)
    if (x.copies() and y.copies()) or not (x.within(right) and y.within(bottom)):
        return None
    return y.taps(0, block.height, source.height), x.taps(0, block.width, source.width)


def merge_failed(failed: Sequence[I64]) -> I64:
    """Return the distinct rectangles, sorted by (y0, x0)."""
    some = [f for f in failed if len(f)]
    if not some:
        return NO_FAILURES
    every = np.unique(np.concatenate(some), axis=0)
    return every[np.lexsort((every[:, 0], every[:, 1]))]


@dataclass(frozen=True, slots=True)
class _Axis:
    start: int
    count: int
    scale: float  # source px per output px
    origin: float  # source px

    def inside(self, size: float) -> tuple[int, int]:
        """First and one past the last output pixel, counted from ``start``, that touches [0, size)."""
        first = np.floor(-self.origin / self.scale) - self.start
        stop = np.ceil((size - self.origin) / self.scale) - self.start
        return int(np.clip(first, 0, self.count)), int(np.clip(stop, 0, self.count))

    def within(self, size: float) -> bool:
        """True when every output pixel covers source px in [0, size) only."""
        first, last = self.origin + self.start * self.scale, self.origin + (self.start + self.count) * self.scale
        return first >= 0 and last <= size

    def copies(self) -> bool:
        """True when output pixels are source pixels."""
        return abs(self.scale - 1) < _SAME and abs(self.origin - round(self.origin)) < _SAME

    def taps(self, k0: int, k1: int, size: int) -> Taps:
        # Enlarging looks half a pixel beyond the edge: repeat the last pixel there, not the white outside.
        return taps(self.start + k0, k1 - k0, self.scale, self.origin, size)


def _block_axis(start: int, count: int, scale: float, origin: float) -> _Axis:
    # Within 1e-6 of an equal scale the positions of a slide 100,000 px wide drift by less than a tenth of a pixel.
    return _Axis(start, count, 1.0 if abs(scale - 1) < _SAME else scale, origin)


def _cut_parts(kx0: int, kx1: int, ky0: int, ky1: int, cost: float) -> list[tuple[int, int, int, int]]:
    """Cut the output into parts whose source stays small; pixels do not depend on the cut."""
    side = max(1, int((_CANVAS_PIXELS / cost) ** 0.5))
    if (kx1 - kx0) * (ky1 - ky0) <= side * side:
        return [(kx0, kx1, ky0, ky1)] if kx1 > kx0 and ky1 > ky0 else []
    return [
        (x, min(x + side, kx1), y, min(y + side, ky1)) for y in range(ky0, ky1, side) for x in range(kx0, kx1, side)
    ]


def _read_part(pixels: U8, x: _Axis, y: _Axis, part: tuple[int, int, int, int], *, source: Source, fetch: Fetch) -> I64:
    kx0, kx1, ky0, ky1 = part
    out = pixels[ky0:ky1, kx0:kx1]
    if x.copies() and y.copies():
        left, top = x.start + kx0 + round(x.origin), y.start + ky0 + round(y.origin)
        return _white_around(source, fetch, (left, top, left + kx1 - kx0, top + ky1 - ky0), out)
    return _resample_part(out, y.taps(ky0, ky1, source.height), x.taps(kx0, kx1, source.width), source, fetch)


def _resample_part(out: U8, ty: Taps, tx: Taps, source: Source, fetch: Fetch) -> I64:
    """Fetch row of tiles after row of tiles and average what is complete, while it is near the processor."""
    cuts = [ty.first, *range((ty.first // source.step + 1) * source.step, ty.stop, source.step), ty.stop]
    rows = np.empty((max(np.diff(cuts)) + ty.taps, tx.stop - tx.first, 3), np.uint8)
    failed, base, held, done = [], ty.first, 0, 0  # rows[:held] are source rows from ``base`` on
    for top, bottom in pairwise(cuts):
        window = (tx.first, top, tx.stop, bottom)
        failed.append(_white_around(source, fetch, window, rows[held : held + bottom - top]))
        held += bottom - top
        stop = ty.count_complete(bottom)
        average_rows(rows[:held], base, (ty, tx), (done, stop), out)
        done = stop
        if bottom < ty.stop:
            kept = min(int(ty.begin[done]), bottom) - base
            rows[: held - kept] = rows[kept:held].copy()
            base, held = base + kept, held - kept
    return merge_failed(failed)


def _white_around(source: Source, fetch: Fetch, window: Window, out: U8) -> I64:
    """Fill ``out`` with a window of the source that may reach beyond it."""
    x0, y0, x1, y1 = window
    cx0, cy0, cx1, cy1 = max(x0, 0), max(y0, 0), min(x1, source.width), min(y1, source.height)
    if (cx0, cy0, cx1, cy1) == window:
        return fetch(source, window, out)
    out[...] = WHITE
    if cx1 <= cx0 or cy1 <= cy0:
        return NO_FAILURES
    bottom, right = cy1 - y0, cx1 - x0
    failed = fetch(source, (cx0, cy0, cx1, cy1), out[cy0 - y0 : bottom, cx0 - x0 : right])
    # Where the level ends before the slide does, its last pixels stand for what it left out.
    beyond = max(right, min(x1, int(np.ceil(source.extent_x))) - x0)
    below = max(bottom, min(y1, int(np.ceil(source.extent_y))) - y0)
    out[cy0 - y0 : bottom, right:beyond] = out[cy0 - y0 : bottom, right - 1 : right]
    out[bottom:below, cx0 - x0 : beyond] = out[bottom - 1 : bottom, cx0 - x0 : beyond]
    return failed


def level0_rect(info: SlideInfo, source: Source, window: Window) -> tuple[int, int, int, int]:
    """Return the level-0 rectangle (x0, y0, x1, y1) of a window of the source, outward to whole px, clipped."""
    x0, y0, x1, y1 = window
    return (
        int(np.floor(x0 * source.downsample_x + 1e-6)),
        int(np.floor(y0 * source.downsample_y + 1e-6)),
        min(info.width, int(np.ceil(x1 * source.downsample_x - 1e-6))),
        min(info.height, int(np.ceil(y1 * source.downsample_y - 1e-6))),
    )
