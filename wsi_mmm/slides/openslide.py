"""The OpenSlide adapter: vendor formats (MRXS, NDPI, SCN, BIF, VMS, ...) and DICOM slides; local files only."""

from __future__ import annotations

import math
import threading
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.errors import MissingPackage, NotASlide, SlideDamaged, SlideNotFound
from wsi_mmm.slides.fingerprint import fingerprint
from wsi_mmm.slides.region_reader import RegionReader, over_white
from wsi_mmm.slides.resample.scaled import Window
from wsi_mmm.storage.store import is_local, local_path, open_store, redact
from wsi_mmm.types import U8, Level, SlideInfo

_MANY_FILES = ("mirax", "dicom", "hamamatsu")
_DEFAULT_TILE = 256


def detect(uri: str) -> str | None:
    """Return the vendor OpenSlide sees in a local file, or None."""
    found: str | None = _import_openslide().OpenSlide.detect_format(str(local_path(uri)))
    return found


def open_with_openslide(uri: str) -> RegionReader:
    """Open a local file. Raises SlideNotFound, NotASlide, SlideDamaged."""
    if not is_local(uri):
        raise NotASlide(f"{redact(uri)}: OpenSlide needs a local file; copy the slide to a disk, or convert it to TIFF")
    path = local_path(uri)
    if not path.is_file():
        raise SlideNotFound(f"{uri}: no such file; check the path")
    handle = _Handle(path)
    return RegionReader(_slide_info(uri, path, handle.slide), handle.read, handle.close)


class _Handle:
    """An OpenSlide that is opened anew after an error: the library refuses everything after the first one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.slide = _open_openslide(path)

    def close(self) -> None:
        self.slide.close()

    def read(self, level: int, window: Window) -> U8 | str:
        found = self._read_region(level, window)
        return found if not isinstance(found, str) else self._read_region(level, window)

    def _read_region(self, level: int, window: Window) -> U8 | str:
        x0, y0, x1, y1 = window
        slide = self.slide
        # OpenSlide places regions by one downsample per level, the mean of x and y.
        downsample = slide.level_downsamples[level]
        corner = (round(x0 * downsample), round(y0 * downsample))
        try:
            image = slide.read_region(corner, level, (x1 - x0, y1 - y0))
        except _import_openslide().OpenSlideError as error:
            self._reopen_slide(slide)
            return str(error)
        return over_white(np.asarray(image))

    def _reopen_slide(self, broken: Any) -> None:
        with self._lock:
            if self.slide is broken:
                self.slide = _open_openslide(self._path)


def _open_openslide(path: Path) -> Any:
    library = _import_openslide()
    try:
        return library.OpenSlide(str(path))
    except library.OpenSlideUnsupportedFormatError as error:
        raise NotASlide(f"{path} is no slide that OpenSlide knows; convert it to a tiled TIFF") from error
    except library.OpenSlideError as error:
        raise SlideDamaged(f"{path} cannot be opened by OpenSlide: {error}; copy it again") from error


def _slide_info(uri: str, path: Path, slide: Any) -> SlideInfo:
    properties = {str(k): str(v) for k, v in slide.properties.items()}
    width, height = slide.dimensions
    levels = tuple(
        Level(w, h, width / w, height / h, _tile_side(properties, n, "width"), _tile_side(properties, n, "height"))
        for n, (w, h) in enumerate(slide.level_dimensions)
    )
    mpp = [_positive_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy"]
    return SlideInfo(
        uri=uri, width=width, height=height, mpp_x=mpp[0], mpp_y=mpp[1], levels=levels,
        vendor=properties.get("openslide.vendor", "unknown"), reader="openslide",
        fingerprint=_openslide_fingerprint(uri, path, properties),
        objective=_positive_number(properties.get("openslide.objective-power")),
        bounds_x=int(properties.get("openslide.bounds-x", 0)), bounds_y=int(properties.get("openslide.bounds-y", 0)),
        properties=properties,
    )  # fmt: skip


def _tile_side(properties: dict[str, str], level: int, side: str) -> int:
    return int(properties.get(f"openslide.level[{level}].tile-{side}", _DEFAULT_TILE))


def _positive_number(text: str | None) -> float | None:
    try:
        value = float(text or 0)
    except ValueError:  # vendors put words there too
        return None
    return value if 0 < value < math.inf else None


def _openslide_fingerprint(uri: str, path: Path, properties: dict[str, str]) -> str:
    """Of one file: as any slide. Of a slide in several files: OpenSlide's quick hash and their sizes."""
    quick = properties.get("openslide.quickhash-1")
    if quick is None or properties.get("openslide.vendor") not in _MANY_FILES:
        store = open_store(uri)
        try:
            return fingerprint(store)
        finally:
            store.close()
    folder = path.with_suffix("")
    files = [path, *(sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else [])]
    sizes = ",".join(str(p.stat().st_size) for p in files)
    return blake2b(f"{quick},{sizes}".encode(), digest_size=16).hexdigest()


def _import_openslide() -> Any:
    try:
        import openslide
    except (ImportError, OSError) as error:
        raise MissingPackage("this slide needs OpenSlide; pip install openslide-python openslide-bin") from error
    return openslide
