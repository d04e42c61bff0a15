"""Selection of the tiles that hold tissue: a mask of the slide, found, given or absent, and the tiles it selects."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsi_mmm.annotations import (
    MAX_AREA_BYTES,
    Shapes,
    clip_to_slide,
    is_annotation_file,
    parse_shapes,
    rasterise,
    read_annotation_file,
)
from wsi_mmm.errors import AnnotationError, NotFound, OptionError
from wsi_mmm.slides.base import Slide
from wsi_mmm.slides.resample.scaled import sources_of
from wsi_mmm.storage.store import redact
from wsi_mmm.tiles.cells import (
    BESIDE_TISSUE,
    CELL_MPP,
    COARSEST_MPP,
    MARGIN_UM,
    REACH_UM,
    FoundCells,
    dense_enough,
    find_cells,
    split_picture,
)
from wsi_mmm.tiles.find import find_tissue, grow_mask
from wsi_mmm.types import F32, F64, I64, Block, Grid, Mask, SlideInfo

MASK_MPP = 8.0
"""Resolution at which tissue is looked for, where the slide's size allows."""

ASSUMED_MPP = 0.25
"""Taken for the sizes of windows and specks on a slide that does not say its resolution; never for coordinates."""

FINEST_MPP = 2.0
"""Tissue is never looked for finer than this: single cells would look smooth."""

MIN_SIDE, MAX_SIDE = 512, 1536
"""Bounds of the longer side of the picture in which tissue is looked for, px."""

SHAPES_SIDE = 4096
"""Longer side of the mask that polygons are drawn into, px."""

HARDLY_ANY = 0.01
"""Share of a slide: where less tissue than this is found, scattered cells are looked for."""

MAX_CELL_PX = 1 << 28
"""Px of the picture in which cells are looked for; that of a larger slide is coarser."""

_CORE_PX = 2048  # px of that picture that are looked at together

MIN_TISSUE = 0.01
"""Default share of a tile that must be tissue: low, so that pale and ragged edges stay in."""

_CHUNK = 1 << 21  # tiles looked at together: bounds memory, not the result
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TissueMask:
    """``mask`` bool[h, w]: row i, column j covers level-0 px from (j * scale_x, i * scale_y) on."""

    mask: Mask
    scale_x: float
    scale_y: float


def tissue_mask(slide: Slide, tissue: str = "auto") -> TissueMask:
    """Return the tissue of ``slide``.

    ``tissue``: "auto" looks for it, and for scattered cells where there is hardly any; "cells" looks for both; "none"
    takes the whole slide; anything else is the path or URI of an annotation file (polygons in level-0 px) or of a mask
    picture of the slide (nonzero = tissue). What cannot be decoded counts as tissue, so that the run meets it and lists
    it. Raises OptionError, AnnotationError, StorageError.
    """
    if tissue == "none":
        return TissueMask(np.ones((1, 1), bool), float(slide.info.width), float(slide.info.height))
    if tissue in ("auto", "cells"):
        found = _find_tissue(slide)
        share = float(found.mask.mean())
        return _add_cells(slide, found, tissue) if tissue == "cells" or share < HARDLY_ANY else found
    data = _load_mask(tissue)
    if is_annotation_file(redact(tissue), data):
        return _from_shapes(data, redact(tissue), slide.info)
    return _from_picture(data, redact(tissue), slide.info)


def select_tiles(grid: Grid, mask: TissueMask, min_tissue: float = MIN_TISSUE) -> I64:
    """Tiles int64[n, 2] (row, column), row-major, of which a share of at least ``min_tissue`` is tissue.

    The share is of the tile's part inside the slide. Only tiles with some tissue are selected, unless ``min_tissue``
    is 0: then all are. Raises OptionError unless 0 <= min_tissue <= 1.
    """
    if not 0 <= min_tissue <= 1:
        raise OptionError(f"min_tissue is {min_tissue}: give a share from 0 to 1, such as {MIN_TISSUE}")
    chunk = max(1, _CHUNK // max(grid.columns, mask.mask.shape[1]))
    found = []
    for start in range(0, grid.rows, chunk):
        covered, area = _tissue_area(grid, mask, np.arange(start, min(start + chunk, grid.rows)))
        # Differences of interpolated sums: exact to far below a millionth of a mask pixel.
        keep = covered >= min_tissue * area - 1e-6
        found.append(np.argwhere(keep & (covered > 1e-6) if min_tissue > 0 else keep) + np.array([start, 0]))
    return np.concatenate(found).astype(np.int64)


def tissue_share(grid: Grid, mask: TissueMask, index: I64) -> F32:
    """Share of each tile of ``index`` int64[n, 2] (its part inside the slide) that is tissue: float32[n], 0 to 1."""
    rows, places = np.unique(index[:, 0], return_inverse=True)
    covered, area = (every[places, index[:, 1]] for every in _tissue_area(grid, mask, rows))
    return np.clip(covered / np.maximum(area, 1e-9), 0.0, 1.0).astype(np.float32)


def _tissue_area(grid: Grid, mask: TissueMask, rows: I64) -> tuple[F64, F64]:
    """Mask px of tissue, and all mask px, in each tile of ``rows`` of the grid: float64[len(rows), columns] each."""
    sums = np.zeros((mask.mask.shape[0] + 1, mask.mask.shape[1] + 1), np.int64)
    sums[1:, 1:] = mask.mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    y0, y1 = _mask_spans(grid, rows, grid.height, grid.scale_y / mask.scale_y, mask.mask.shape[0])
    x0, x1 = _mask_spans(grid, np.arange(grid.columns), grid.width, grid.scale_x / mask.scale_x, mask.mask.shape[1])
    band = (_mask_at(sums, y1) - _mask_at(sums, y0)).T
    return (_mask_at(band, x1) - _mask_at(band, x0)).T, (y1 - y0)[:, None] * (x1 - x0)


def _mask_spans(grid: Grid, numbers: I64, size: int, ratio: float, limit: int) -> tuple[F64, F64]:
    """Start and end in mask px of tiles ``numbers`` along an axis of ``size`` target px, cut to slide and mask."""
    start = numbers.astype(np.float64) * grid.stride
    end = np.minimum(start + grid.tile, size)
    return np.minimum(start * ratio, limit), np.minimum(end * ratio, limit)


def _mask_at(sums: npt.NDArray[np.int64] | F64, where: F64) -> F64:
    """Rows of running sums at fractional positions ``where``: exact for pixels of constant value."""
    low = np.minimum(where.astype(np.int64), len(sums) - 2)
    part = (where - low)[:, None]
    return np.asarray(sums[low] * (1 - part) + sums[low + 1] * part, np.float64)


def _find_tissue(slide: Slide) -> TissueMask:
    """Look for tissue on one small read of the whole slide."""
    info = slide.info
    mpp_x, mpp_y = info.mpp_x or ASSUMED_MPP, info.mpp_y or ASSUMED_MPP
    side = max(info.width * mpp_x, info.height * mpp_y)
    um_per_px = max(min(max(MASK_MPP, side / MAX_SIDE), side / MIN_SIDE), FINEST_MPP, mpp_x, mpp_y)
    scale_x, scale_y = _of_level(info, um_per_px / mpp_x, um_per_px / mpp_y)
    um_per_px = math.sqrt(scale_x * mpp_x * scale_y * mpp_y)
    width, height = math.ceil(info.width / scale_x), math.ceil(info.height / scale_y)
    canvas = slide.reader.read(Block(0, 0, width, height, scale_x, scale_y))
    mask = find_tissue(canvas.pixels, um_per_px)
    for x0, y0, x1, y1 in canvas.failed / (scale_x, scale_y, scale_x, scale_y):
        mask[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = True
    return TissueMask(mask, scale_x, scale_y)


def _add_cells(slide: Slide, found: TissueMask, tissue: str) -> TissueMask:
    """The tissue with the surroundings of scattered cells. Where they were not asked for, few are no cells."""
    info = slide.info
    mpp_x, mpp_y = info.mpp_x or ASSUMED_MPP, info.mpp_y or ASSUMED_MPP
    um_per_px = max(CELL_MPP, mpp_x, mpp_y, math.sqrt(info.width * mpp_x * info.height * mpp_y / MAX_CELL_PX))
    scale = np.array(_of_level(info, um_per_px / mpp_x, um_per_px / mpp_y))
    um_per_px = math.sqrt(scale.prod() * mpp_x * mpp_y)
    if um_per_px > COARSEST_MPP:
        return found
    cells = _cells_of(slide, scale, um_per_px)
    um = math.sqrt(found.scale_x * mpp_x * found.scale_y * mpp_y)
    keep = np.ones(len(cells.places), bool)
    if tissue == "auto":
        # A piece of tissue is more than the cells that it sheds; clusters are less than the cells around them.
        sheds = float(found.mask.sum()) * um**2 > len(cells.px) * um_per_px**2
        if sheds:
            keep = ~grow_mask(found.mask, MARGIN_UM / um)[_mask_px(found, cells.places)]
        size, factor = (info.width * mpp_x, info.height * mpp_y), BESIDE_TISSUE if sheds else 1
        keep[keep] = dense_enough(cells.places[keep] * (mpp_x, mpp_y), size, factor)
    if not keep.any():
        return found
    _log.info("%s: some %d scattered cells", redact(info.uri), int(keep.sum()))
    mask = np.zeros_like(found.mask)
    mask[_mask_px(found, cells.px[keep[cells.owner]])] = True
    return TissueMask(found.mask | grow_mask(mask, max(0.7, REACH_UM / um)), found.scale_x, found.scale_y)


def _mask_px(mask: TissueMask, places: npt.NDArray[Any]) -> tuple[I64, I64]:
    """Rows and columns of the mask px that hold ``places`` [n, 2] (x, y), level-0 px."""
    column, row = (places / (mask.scale_x, mask.scale_y)).astype(np.int64).T
    return np.minimum(row, mask.mask.shape[0] - 1), np.minimum(column, mask.mask.shape[1] - 1)


def _cells_of(slide: Slide, scale: F64, um_per_px: float) -> FoundCells:
    """The cells of a slide, seen at ``scale`` (x, y) level-0 px per px, piece by piece; in level-0 px."""
    width, height = (
        math.ceil(side / one) for side, one in zip((slide.info.width, slide.info.height), scale, strict=True)
    )
    places, px, owner, count = [np.zeros((0, 2))], [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)], 0
    for core, (x, y, x1, y1) in split_picture(width, height, _CORE_PX, math.ceil(MARGIN_UM / um_per_px)):
        seen = find_cells(slide.reader.read(Block(x, y, x1 - x, y1 - y, *scale.tolist())).pixels, um_per_px)
        middles = np.add(seen.places, (x, y))
        # Those whose middle lies in the margin are another piece's.
        mine: Mask = np.asarray(((middles >= core[:2]) & (middles < core[2:])).all(axis=1), bool)
        places.append(middles[mine])
        px.append(np.add(seen.px, (x, y))[mine[seen.owner]])
        owner.append((np.cumsum(mine) - 1 + count)[seen.owner[mine[seen.owner]]])
        count += int(mine.sum())
    return FoundCells(
        (np.concatenate(places) + 0.5) * scale,
        ((np.concatenate(px) + 0.5) * scale).astype(np.int64),
        np.concatenate(owner),
    )


def _of_level(info: SlideInfo, scale_x: float, scale_y: float) -> tuple[float, float]:
    """The scales, changed to those of a pyramid level (the spacing of its px), or of a power of two of one, if one is
    near: little to fetch, and cheap to decode."""
    for shrink in (1, 2, 4, 8):
        sources = sources_of(info.levels, (shrink,))
        fits = [(max(one.downsample_x / scale_x, one.downsample_y / scale_y), one) for one in sources]
        near = [(fit, one.downsample_x, one.downsample_y) for fit, one in fits if 0.95 <= fit <= 1.5]
        if near:
            return min(near)[1:]
    return scale_x, scale_y


def _load_mask(tissue: str) -> bytes:
    try:
        return read_annotation_file(tissue, MAX_AREA_BYTES)
    except NotFound as error:
        raise OptionError(
            f"tissue {redact(tissue)!r} is neither 'auto', 'cells' nor 'none', and no file is there: "
            "give one of them, a GeoJSON of polygons, or a mask picture"
        ) from error


def _from_shapes(data: bytes, name: str, info: SlideInfo) -> TissueMask:
    shapes = parse_shapes(data, name)
    if not shapes:
        beside = f" ({shapes.describe_skipped()})" if shapes.skipped else ""
        raise AnnotationError(f"{name}: no polygon is in it{beside}: draw the tissue, or use --tissue auto")
    scale = max(max(info.width, info.height) / SHAPES_SIDE, 1.0)
    size = math.ceil(info.height / scale), math.ceil(info.width / scale)
    mask = rasterise(shapes, size, scale_x=scale, scale_y=scale, name=name)
    if not mask.any():
        corners = np.array([shape.geometry.bounds for shape in shapes])
        raise AnnotationError(off_slide(name, (*corners[:, :2].min(axis=0), *corners[:, 2:].max(axis=0)), info))
    warn_unused(shapes, name, info)
    return TissueMask(mask, scale, scale)


def warn_unused(shapes: Shapes, name: str, info: SlideInfo) -> None:
    """Log what of a file of polygons is not used on this slide: objects that are none, and those off the slide."""
    there = clip_to_slide(shapes, info.width, info.height)
    for clause in (shapes.describe_skipped(), there.describe_off()):
        if clause:
            _log.warning("%s: %s", name, clause)


def off_slide(name: str, bounds: Sequence[float], info: SlideInfo) -> str:
    """The message for outlines that select nothing of a slide: where they lie (x0, y0, x1, y1), and where it does."""
    x0, y0, x1, y1 = bounds
    return (
        f"{name}: its outlines (x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}) hold no pixel of the slide, which has "
        f"{info.width} x {info.height} px: give them in px of level 0 of this slide"
    )


def _from_picture(data: bytes, name: str, info: SlideInfo) -> TissueMask:
    mask = _read_picture(data, name)
    height, width = mask.shape
    expected = width * info.height / info.width
    if abs(height - expected) > max(1.0, 0.01 * expected):
        raise AnnotationError(
            f"{name}: a mask of {width} x {height} px does not have the aspect of the slide's {info.width} x "
            f"{info.height} px: give a mask of the whole slide, such as {width} x {max(1, round(expected))} px"
        )
    if not mask.any():
        raise AnnotationError(f"{name}: no pixel of the mask is set: nonzero pixels are tissue; or use --tissue auto")
    return TissueMask(mask, info.width / width, info.height / height)


def _read_picture(data: bytes, name: str) -> Mask:
    """Nonzero pixels of a picture (of any channel but alpha; where alpha is zero, nothing).

    A picture that is black wherever it is not transparent is a mask of what is not transparent.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                values = np.asarray(picture)
                alpha = picture.mode in ("RGBA", "LA")
    except Image.DecompressionBombError as error:
        raise AnnotationError(f"{name}: the mask has too many pixels ({error}): make it smaller") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise AnnotationError(
            f"{name}: no GeoJSON, nor a picture that can be read: give GeoJSON, PNG or TIFF"
        ) from error
    if values.ndim == 2:
        return np.asarray(values != 0, bool)
    colour = values[..., :-1] if alpha else values
    drawn = (colour != 0).any(axis=2)
    if alpha:
        opaque = values[..., -1] != 0
        return np.asarray(drawn & opaque if (drawn & opaque).any() else opaque & ~opaque.all(), bool)
    if drawn.all() and colour.shape[2] >= 3 and (colour[..., 0] != colour[..., 2]).any():
        raise AnnotationError(
            f"{name}: a colour picture without a black pixel is no mask (a thumbnail?): glass must be 0 in it"
        )
    return np.asarray(drawn, bool)
