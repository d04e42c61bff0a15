"""The adapters of OpenSlide (vendor formats such as MRXS, NDPI, SCN, BIF, VMS, and DICOM; local files only) and of
tiffslide."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.errors import MissingPackage, NotASlide, SlideDamaged, SlideNotFound
from wsi_mmm.slides.base import COARSEST_BY_TAGS, NO_MPP, PLAUSIBLE_MPP, print_resolution
from wsi_mmm.slides.fingerprint import fingerprint
from wsi_mmm.slides.region_reader import RegionReader, over_white
from wsi_mmm.slides.resample.scaled import Window
from wsi_mmm.storage.store import is_local, local_path, open_store, redact
from wsi_mmm.types import U8, Level, SlideInfo

_SYNTAXES = {
    "1.2.840.10008.1.2.1.99": "deflate", "1.2.840.10008.1.2.5": "RLE", "1.2.840.10008.1.2.4.51": "JPEG of 12 bits",
    "1.2.840.10008.1.2.4.57": "lossless JPEG", "1.2.840.10008.1.2.4.70": "lossless JPEG",
    "1.2.840.10008.1.2.4.80": "JPEG-LS", "1.2.840.10008.1.2.4.81": "JPEG-LS", "1.2.840.10008.1.2.4.110": "JPEG XL",
    "1.2.840.10008.1.2.4.111": "JPEG XL", "1.2.840.10008.1.2.4.112": "JPEG XL", "1.2.840.10008.1.2.4.201": "HTJ2K",
    "1.2.840.10008.1.2.4.202": "HTJ2K", "1.2.840.10008.1.2.4.203": "HTJ2K",
}  # fmt: skip
_MANY_FILES = ("mirax", "dicom", "hamamatsu")
_BY_TAGS = ("generic-tiff", "trestle", None)  # vendors whose resolution is that of the tags of TIFF
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
    mark = _openslide_fingerprint(uri, path, handle.slide.properties)
    return RegionReader(_slide_info(uri, handle.slide, "openslide", mark), handle.read, handle.close)


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
        slide = self.slide
        corner, size = _level0_corner(slide, level, window)
        try:
            image = slide.read_region(corner, level, size)
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
        if re.search("unsupported|can not handle", str(error), re.IGNORECASE):  # it has no other sign
            raise NotASlide(_unsupported_text(path, str(error))) from error
        raise SlideDamaged(f"{path} cannot be opened by OpenSlide: {error}; copy it again") from error


def _unsupported_text(path: Path, said: str) -> str:
    """Name an encoding that OpenSlide does not decode, and a command that converts it."""
    syntax = re.search(r"transfer syntax ([0-9.]+)", said)
    if syntax is None:
        way = "leave out the reader, or convert it: vips tiffsave in.tif out.tif --tile --pyramid --compression jpeg"
        return f"{path} is stored in a way that OpenSlide does not decode: {said}; {way}"
    named = _SYNTAXES.get(syntax[1], "a compression of DICOM")
    return (
        f"{path} is DICOM in {named} (transfer syntax {syntax[1]}), which OpenSlide does not decode; convert it: "
        "gdcmconv --raw in.dcm out.dcm"
    )


def open_with_tiffslide(uri: str) -> RegionReader:
    """Open a TIFF slide with tiffslide, which is used only when asked for. SlideNotFound, NotASlide, SlideDamaged."""
    library = _import_tiffslide()
    with closing(open_store(uri)) as store:
        mark = fingerprint(store)
    try:
        slide = library.TiffSlide(str(local_path(uri)) if is_local(uri) else uri)
        info = _slide_info(uri, slide, "tiffslide", mark)
    except library.TiffFileError as error:
        raise NotASlide(f"{redact(uri)} is no slide that tiffslide knows; leave out the reader") from error
    except (ValueError, KeyError, IndexError, OSError, TypeError) as error:
        raise SlideDamaged(f"{redact(uri)} cannot be opened by tiffslide; leave out the reader") from error

    def read(level: int, window: Window) -> U8 | str:
        corner, size = _level0_corner(slide, level, window)
        try:
            pixels = slide.read_region(corner, level, size, as_array=True)
        except Exception as error:  # noqa: BLE001 - its codecs raise anything; the chunk is listed as failed
            return str(error) or type(error).__name__
        return np.ascontiguousarray(pixels[..., :3])

    return RegionReader(info, read, slide.close)


def _level0_corner(slide: Any, level: int, window: Window) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a window of a level begins, in level-0 px, and its size in px of the level."""
    x0, y0, x1, y1 = window
    # Regions are placed by one downsample per level, the mean of x and y.
    downsample = slide.level_downsamples[level]
    return (round(x0 * downsample), round(y0 * downsample)), (x1 - x0, y1 - y0)


def _slide_info(uri: str, slide: Any, library: str, mark: str) -> SlideInfo:
    properties = {str(k): str(v) for k, v in slide.properties.items() if v is not None}
    width, height = slide.dimensions
    levels = []
    for n, (w, h) in enumerate(slide.level_dimensions):
        sides = (properties.get(f"{library}.level[{n}].tile-{side}") for side in ("width", "height"))
        levels.append(Level(w, h, width / w, height / h, *(int(side or _DEFAULT_TILE) for side in sides)))
    numbers = [f"{library}.{name}" for name in ("mpp-x", "mpp-y", "objective-power")]
    mpp_x, mpp_y, objective = (_positive_number(properties.get(name)) for name in numbers)
    said = [mpp for mpp in (mpp_x, mpp_y) if mpp is not None]
    printed = properties.get(f"{library}.vendor") in _BY_TAGS and max(said, default=0.0) > COARSEST_BY_TAGS
    if printed:
        properties[NO_MPP] = print_resolution(max(said))
    if printed or not all(PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] for mpp in said):
        mpp_x = mpp_y = None
    return SlideInfo(
        uri=redact(uri), width=width, height=height, mpp_x=mpp_x, mpp_y=mpp_y, levels=tuple(levels),
        vendor=properties.get(f"{library}.vendor", "unknown"), reader=library, fingerprint=mark, objective=objective,
        bounds_x=int(properties.get("openslide.bounds-x", 0)), bounds_y=int(properties.get("openslide.bounds-y", 0)),
        properties=properties,
    )  # fmt: skip


def _positive_number(text: str | None) -> float | None:
    try:
        value = float(text or 0)
    except ValueError:  # vendors put words there too
        return None
    return value if 0 < value < math.inf else None


def _openslide_fingerprint(uri: str, path: Path, properties: Mapping[str, str]) -> str:
    """Of one file: as any slide. Of a slide in several files: OpenSlide's quick hash and their sizes."""
    quick = properties.get("openslide.quickhash-1")
    if quick is None or properties.get("openslide.vendor") not in _MANY_FILES:
        with closing(open_store(uri)) as store:
            return fingerprint(store)
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


def _import_tiffslide() -> Any:
    try:
        import tiffslide
    except ImportError as error:
        raise MissingPackage("the reader tiffslide needs the package tiffslide; pip install tiffslide") from error
    return tiffslide
