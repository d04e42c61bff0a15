"""The places of the pixels of a level whose size is no whole fraction of the slide's.

A level of 129 px of a slide of 2051 is either every 16th pixel, the last one partial, or the whole slide resized to 129
px, as image libraries and GDAL do: the sizes are the same, and at the far edge the pictures are almost a pixel apart.
OpenSlide takes the ratio of the sizes for all. Here level 0 is asked, when such a level is first read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from wsi_mmm.slides.resample.scaled import Source
from wsi_mmm.types import I64, Canvas, Level, Tiles

_APART = 0.1  # px of the level at the far edge; less is not looked at
_PLACES, _WINDOWS, _LEAST = 6, 5, 3  # places per axis, windows compared: those with most detail, and how many at least
_SIDE, _MOST_FINE = 32, 512  # px of a window in the level, and under it
_BETTER = 0.8  # the other spacing must leave so much less of the differences

Spacing = tuple[float, float]
ReadSquares = Callable[[Source, Tiles], Sequence[Canvas]]  # the tiles one by one, from that source


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


def is_resized(source: Source, ratio: Spacing, finest: Source, read: ReadSquares) -> bool:
    """Tell whether ``source`` fits level 0 clearly better with pixels ``ratio`` apart. Raises StorageError."""
    side = min(_SIDE, int(_MOST_FINE / max(source.downsample_x, source.downsample_y)), source.width, source.height)
    if side < 4:
        return False
    spacing = source.downsample_x, source.downsample_y
    found = Tiles(_places_apart(source, ratio, side), side, *spacing)
    whole = [(at, one.pixels) for at, one in zip(found.xy, read(source, found), strict=True) if not len(one.failed)]
    windows = sorted(whole, key=lambda window: -float(window[1].std()))[:_WINDOWS]
    if len(windows) < _LEAST:
        return False
    places = np.array([at for at, _ in windows])
    own, other = (read(finest, Tiles(places, side, *scale)) for scale in (spacing, ratio))
    apart = [
        [float(np.abs(canvas.pixels.astype(np.int16) - pixels).mean()) for canvas in pair]
        for (_, pixels), pair in zip(windows, zip(own, other, strict=True), strict=True)
        if not any(len(canvas.failed) for canvas in pair)
    ]
    nearer = sum(b < a for a, b in apart)
    least = _BETTER * sum(a for a, _ in apart)
    return len(apart) >= _LEAST and nearer * 3 >= len(apart) * 2 and sum(b for _, b in apart) < least


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


def _places_apart(source: Source, ratio: Spacing, side: int) -> I64:
    """Return int64[n, 2]: places (x, y) over the level where the two spacings are apart."""
    x, y = (np.linspace(0, size - side, _PLACES).astype(np.int64) for size in (source.width, source.height))
    places = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2)
    spacing = np.array((source.downsample_x, source.downsample_y))
    shift = np.abs(spacing - ratio) * places / spacing
    return np.asarray(places[shift.max(axis=1) >= _APART / 2], np.int64)
