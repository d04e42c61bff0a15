"""The places of the pixels of a level whose size is no whole fraction of the slide's.

A level of 129 px of a slide of 2051 is either every 16th pixel, the last one partial, or the whole slide resized to 129
px, as image libraries and GDAL do: the sizes are the same, and at the far edge the pictures are almost a pixel apart.
OpenSlide takes the ratio of the sizes for all. Here level 0 is asked, when such a level is first read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from wsi_mmm.slides.resample.scaled import Fetch, Source, read_source
from wsi_mmm.types import U8, Block, Level

_APART = 0.1  # px of the level at the far edge; less is not looked at
_PLACES, _WINDOWS, _LEAST = 6, 5, 3  # places per axis, windows compared: those with most detail, and how many at least
_SIDE, _MOST_FINE = 32, 512  # px of a window in the level, and under it
_BETTER = 0.8  # the other spacing must leave so much less of the differences

Spacing = tuple[float, float]


def unsettled_levels(levels: Sequence[Level], sources: Sequence[Source]) -> dict[int, Spacing]:
    """Return the ratios of sizes of levels that are taken for every n-th pixel but may be the slide resized."""
    found = {}
    for source in sources:
        level = levels[source.level]
        ratio = level.downsample_x, level.downsample_y
        across = abs(source.downsample_x - ratio[0]) * level.width
        down = abs(source.downsample_y - ratio[1]) * level.height
        if source.shrink == 1 and max(across / source.downsample_x, down / source.downsample_y) >= _APART:
            found[source.level] = ratio
    return found


def is_resized(source: Source, ratio: Spacing, finest: Source, fetch: Fetch) -> bool:
    """Tell whether ``source`` fits level 0 clearly better with pixels ``ratio`` apart. Raises StorageError."""
    side = min(_SIDE, int(_MOST_FINE / max(source.downsample_x, source.downsample_y)), source.width, source.height)
    if side < 4:
        return False
    windows = _detailed_windows(source, ratio, side, fetch)
    own, other = [], []
    for x, y, pixels in windows:
        apart = [_difference(pixels, x, y, scale, finest, fetch) for scale in (_spacing_of(source), ratio)]
        if apart[0] is not None and apart[1] is not None:
            own.append(apart[0])
            other.append(apart[1])
    nearer = sum(b < a for a, b in zip(own, other, strict=True))
    return len(own) >= _LEAST and nearer * 3 >= len(own) * 2 and sum(other) < _BETTER * sum(own)


def with_spacing(sources: Sequence[Source], spacing: Mapping[int, Spacing]) -> tuple[Source, ...]:
    """Return the sources of these levels with other spacings of their pixels."""
    found = []
    for source in sources:
        if source.level in spacing:
            x, y = (one * source.shrink for one in spacing[source.level])
            width, height = source.extent_x * source.downsample_x, source.extent_y * source.downsample_y
            source = replace(source, downsample_x=x, downsample_y=y, extent_x=width / x, extent_y=height / y)
        found.append(source)
    return tuple(found)


def _spacing_of(source: Source) -> Spacing:
    return source.downsample_x, source.downsample_y


def _detailed_windows(source: Source, ratio: Spacing, side: int, fetch: Fetch) -> list[tuple[int, int, U8]]:
    """(x, y, pixels) of the windows with most detail, where the two spacings are apart."""
    found = []
    places = (np.linspace(0, size - side, _PLACES).astype(int).tolist() for size in (source.width, source.height))
    for x, y in product(*places):
        shift = abs(source.downsample_x - ratio[0]) * x / source.downsample_x
        shift = max(shift, abs(source.downsample_y - ratio[1]) * y / source.downsample_y)
        if shift < _APART / 2:
            continue
        canvas = read_source(Block(x, y, side, side, *_spacing_of(source)), source, fetch)
        if not len(canvas.failed):
            found.append((float(canvas.pixels.std()), x, y, canvas.pixels))
    found.sort(key=lambda one: -one[0])
    return [(x, y, pixels) for _, x, y, pixels in found[:_WINDOWS]]


def _difference(pixels: U8, x: int, y: int, scale: Spacing, finest: Source, fetch: Fetch) -> float | None:
    canvas = read_source(Block(x, y, pixels.shape[1], pixels.shape[0], *scale), finest, fetch)
    return None if len(canvas.failed) else float(np.abs(canvas.pixels.astype(np.int16) - pixels).mean())
