"""Reading at any scale: choose the source, clip to the slide, resample once. Shared by all readers.

A *source* is a pyramid level, or level 0 decoded to 1/2, 1/4, 1/8 by its codec. Its pixel (i, j) covers the level-0
interval ``[i * downsample, (i + 1) * downsample)``; outside the slide everything is white.

Stored levels are lossy copies: on real slides (JPEG quality 75) they differ from the area average of level 0 by 7 to 10
grey levels on tissue, which compressing that average once more explains. So below ``exact_until`` level-0 px per target
px only level 0 is read, and the codec's own reduction (off by less than 1) saves the work; coarser scales (thumbnails,
tissue) take stored levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from wsi_mmm.slides.resample.weights import Taps, average_rows, taps
from wsi_mmm.types import I64, U8, Block, Canvas, Level

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
        spacing = _pixel_spacing(top, level)
        for s in shrinks:
            if level.tile_width % s == 0 and level.tile_height % s == 0:
                down_x, down_y = (down * s for down in spacing)
                extents = top.width / down_x, top.height / down_y
                step = level.tile_height // s * max(1, 256 // level.tile_height)
                found.append(Source(n, s, -(-level.width // s), -(-level.height // s), down_x, down_y, *extents, step))
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
    return abs(scale_x / source.downsample_x - 1) < _SAME and abs(scale_y / source.downsample_y - 1) < _SAME


def _fine_enough(block: Block, source: Source) -> bool:
    """Averaging averages is exact only where the boxes nest; else the source must be clearly finer than the target."""
    return all(
        scale >= _FINER * down
        or (round(scale / down) >= 1 and abs(scale / down - round(scale / down)) < _SAME and origin % down == 0)
        for scale, down, origin in (
            (block.scale_x, source.downsample_x, block.origin_x),
            (block.scale_y, source.downsample_y, block.origin_y),
        )
    )


def read_scaled(block: Block, sources: Sequence[Source], fetch: Fetch, exact_until: float = 1.0) -> Canvas:
    """Return the block's canvas, fetched from the best source and resampled once."""
    return read_source(block, pick(sources, block, exact_until), fetch)


def read_source(block: Block, source: Source, fetch: Fetch) -> Canvas:
    """Return the block's canvas, fetched from ``source`` and resampled once."""
    pixels = np.empty((block.height, block.width, 3), np.uint8)
    x, y = _axes_of(block, source)
    kx0, kx1 = x.inside(source.extent_x)
    ky0, ky1 = y.inside(source.extent_y)
    if (kx0, kx1, ky0, ky1) != (0, block.width, 0, block.height):
        pixels[...] = WHITE
    # In parts whose source stays small; pixels do not depend on the cut.
    side = max(1, int((_CANVAS_PIXELS / (max(1.0, x.scale) * max(1.0, y.scale))) ** 0.5))
    across, down = (side, side) if (kx1 - kx0) * (ky1 - ky0) > side * side else (block.width, block.height)
    failed = []
    for top, left in product(range(ky0, ky1, down), range(kx0, kx1, across)):
        bottom, right = min(top + down, ky1), min(left + across, kx1)
        out = pixels[top:bottom, left:right]
        if x.copies and y.copies:
            x0, y0 = x.start + left + round(x.origin), y.start + top + round(y.origin)
            failed.append(_white_around(source, fetch, (x0, y0, x0 + right - left, y0 + bottom - top), out))
        else:
            axes = y.taps(top, bottom, source.height), x.taps(left, right, source.width)
            failed.append(_resample_part(out, *axes, source, fetch))
    return Canvas(pixels, merge_failed(failed))


def taps_of(block: Block, source: Source) -> tuple[Taps, Taps] | None:
    """Return how the block's rows and columns are averaged; None where pixels are copied or lie beyond ``source``."""
    x, y = _axes_of(block, source)
    right, bottom = min(source.extent_x, source.width), min(source.extent_y, source.height)
    if (x.copies and y.copies) or not (x.within(right) and y.within(bottom)):
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

    @property
    def copies(self) -> bool:
        """True when output pixels are source pixels."""
        return abs(self.scale - 1) < _SAME and abs(self.origin - round(self.origin)) < _SAME

    def taps(self, k0: int, k1: int, size: int) -> Taps:
        # Enlarging looks half a pixel beyond the edge: repeat the last pixel there, not the white outside.
        return taps(self.start + k0, k1 - k0, self.scale, self.origin, size)


def _axes_of(block: Block, source: Source) -> tuple[_Axis, _Axis]:
    """The axes x and y of a block."""
    across, down = block.scale_x / source.downsample_x, block.scale_y / source.downsample_y
    # Within 1e-6 of an equal scale the positions of a slide 100,000 px wide drift by less than a tenth of a pixel.
    across, down = (1.0 if abs(scale - 1) < _SAME else scale for scale in (across, down))
    x = _Axis(block.x, block.width, across, block.origin_x / source.downsample_x)
    return x, _Axis(block.y, block.height, down, block.origin_y / source.downsample_y)


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


def level0_rect(source: Source, window: Window) -> tuple[int, int, int, int]:
    """Return the level-0 rectangle (x0, y0, x1, y1) of a window of the source, outward to whole px, clipped."""
    x0, y0, x1, y1 = window
    width, height = round(source.extent_x * source.downsample_x), round(source.extent_y * source.downsample_y)
    return (
        math.floor(x0 * source.downsample_x + 1e-6),
        math.floor(y0 * source.downsample_y + 1e-6),
        min(width, math.ceil(x1 * source.downsample_x - 1e-6)),
        min(height, math.ceil(y1 * source.downsample_y - 1e-6)),
    )
