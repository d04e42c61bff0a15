"""The tiffslide adapter: used only when it is asked for by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from wsi_mmm.errors import MissingPackage, NotASlide, SlideDamaged
from wsi_mmm.slides.fingerprint import fingerprint
from wsi_mmm.slides.region_reader import RegionReader
from wsi_mmm.slides.resample.scaled import Window
from wsi_mmm.storage.base import is_local
from wsi_mmm.storage.store import local_path, open_store, redact
from wsi_mmm.types import U8, Level, SlideInfo


def open_with_tiffslide(uri: str) -> RegionReader:
    """Open a TIFF slide. Raises SlideNotFound, NotASlide, SlideDamaged."""
    library = _import_tiffslide()
    store = open_store(uri)
    try:
        mark = fingerprint(store)
    finally:
        store.close()
    try:
        slide = library.TiffSlide(str(local_path(uri)) if is_local(uri) else uri)
        info = _slide_info(uri, slide, mark)
    except library.TiffFileError as error:
        raise NotASlide(f"{redact(uri)} is no slide that tiffslide knows; leave out the reader") from error
    except (ValueError, KeyError, IndexError, OSError, TypeError) as error:
        raise SlideDamaged(f"{redact(uri)} cannot be opened by tiffslide; leave out the reader") from error
    return RegionReader(info, lambda level, window: _read_region(slide, level, window), slide.close)


def _read_region(slide: Any, level: int, window: Window) -> U8 | str:
    x0, y0, x1, y1 = window
    downsample = slide.level_downsamples[level]
    corner = (round(x0 * downsample), round(y0 * downsample))
    try:
        pixels = slide.read_region(corner, level, (x1 - x0, y1 - y0), as_array=True)
    except Exception as error:  # noqa: BLE001 - its codecs raise anything; the chunk is listed as failed
        return str(error) or type(error).__name__
    return np.ascontiguousarray(pixels[..., :3])


def _slide_info(uri: str, slide: Any, mark: str) -> SlideInfo:
    properties = {str(k): str(v) for k, v in slide.properties.items() if v is not None}
    width, height = slide.dimensions
    levels = tuple(
        Level(w, h, width / w, height / h, _tile_side(properties, n, "width"), _tile_side(properties, n, "height"))
        for n, (w, h) in enumerate(slide.level_dimensions)
    )
    mpp = [float(properties.get(f"tiffslide.mpp-{axis}") or 0) or None for axis in "xy"]
    return SlideInfo(
        uri=redact(uri), width=width, height=height, mpp_x=mpp[0], mpp_y=mpp[1], levels=levels,
        vendor=properties.get("tiffslide.vendor", "unknown"), reader="tiffslide", fingerprint=mark,
        objective=float(properties.get("tiffslide.objective-power") or 0) or None, properties=properties,
    )  # fmt: skip


def _tile_side(properties: dict[str, str], level: int, side: str) -> int:
    return int(properties.get(f"tiffslide.level[{level}].tile-{side}") or 256)


def _import_tiffslide() -> Any:
    try:
        import tiffslide
    except ImportError as error:
        raise MissingPackage("reader='tiffslide' needs the package tiffslide; pip install tiffslide") from error
    return tiffslide
