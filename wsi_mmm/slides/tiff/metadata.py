"""Pyramid levels, vendor and resolution of a TIFF slide, found in its directories."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from wsi_mmm.errors import NotASlide
from wsi_mmm.slides.base import COARSEST_BY_TAGS, NO_MPP, PLAUSIBLE_MPP, print_resolution
from wsi_mmm.slides.tiff.depth import with_used_bits
from wsi_mmm.slides.tiff.directories import Directory
from wsi_mmm.slides.tiff.ome import parse_ome
from wsi_mmm.slides.tiff.pages import Pyramid, find_pyramid, page_roles
from wsi_mmm.slides.tiff.planes import Plane
from wsi_mmm.slides.tiff.verify import confirmed_planes
from wsi_mmm.storage.store import ByteStore
from wsi_mmm.types import Level

_NUMBER = re.compile(r"([0-9]+[.,]?[0-9]*|[.,][0-9]+)([eE][-+]?[0-9]{1,3})?")
_UNITS = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "μm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "pm": 1e-6,
          "Å": 1e-4, "in": 25400.0}  # fmt: skip
_CROP = re.compile(r"\[-?[0-9]+[ ,]+-?[0-9]+[ ,]+([0-9]{1,8})x[0-9]{1,8}\][^|>]{0,200}->\s*([0-9]{1,8})x[0-9]{1,8}")


@dataclass(frozen=True, slots=True)
class TiffSlide:
    """The pyramid of a TIFF and what it says about itself. ``scene``: the number of an image that was chosen in place
    of the usual one; None for that."""

    planes: tuple[Plane, ...]
    vendor: str
    mpp: tuple[float, float] | None
    objective: float | None
    properties: Mapping[str, str]
    scene: int | None = None

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels, finest first; downsamples are the ratios of sizes."""
        top = self.planes[0]
        return tuple(
            Level(p.width, p.height, top.width / p.width, top.height / p.height, p.tile_width, p.tile_height)
            for p in self.planes
        )


def describe(store: ByteStore, directories: Sequence[Directory], name: str, scene: int | None = None) -> TiffSlide:
    """Return the pyramid, of the image ``scene`` or the usual one; doubtful levels are compared with finer ones.

    Raises NotASlide when this reader cannot read it, OptionError when there is no such scene, SlideDamaged when it
    contradicts itself, StorageError.
    """
    first = directories[0]
    text = first.text(270)
    vendor = vendor_of(first)
    if vendor is None:
        raise NotASlide(f"{name} is a vendor's TIFF that only OpenSlide reads; choose the reader openslide, or none")
    pyramid = find_pyramid(directories, vendor, name, scene)
    top = pyramid.top
    properties = _aperio_properties(text) if vendor == "aperio" and pyramid.usual else {}
    declared = "" if top.ome is None else top.ome.pixels.get("SignificantBits", "")
    bits = int(declared) if re.fullmatch(r"[0-9]{1,2}", declared) else 0
    pyramid = replace(pyramid, planes=with_used_bits(store, pyramid.planes, bits))
    planes = confirmed_planes(store, pyramid.planes, pyramid.doubtful)
    if len(pyramid.pages) > len(planes):
        properties |= page_roles(pyramid, planes)
    if vendor == "aperio":  # the description is that of the slide alone
        mpp = _aperio_mpp(properties, text, planes[0].width) if pyramid.usual else None
    elif vendor == "ome":
        mpp = None if top.ome is None else _ome_mpp(top.ome.pixels)
    else:
        mpp = _tags_mpp(top.page.directory)
    if mpp is None and (why := _why_unknown(vendor, pyramid, text)):
        properties[NO_MPP] = why
    objective = _find_objective(vendor, text, properties)
    return TiffSlide(planes, vendor, mpp, objective, properties, None if pyramid.usual else top.number)


def vendor_of(first: Directory) -> str | None:
    """Return 'aperio', 'ome', 'perkinelmer' or 'generic-tiff'; None for dialects whose geometry only OpenSlide knows.

    A vendor is told by what its files must hold, as OpenSlide does, not by names that converters pass on.
    """
    text = first.text(270)
    if text.startswith("Aperio"):
        return "aperio"
    if re.search(r"<(\w+:)?OME[\s>]", text[: 64 << 10]):
        return "ome"
    if "<PerkinElmer-QPI-ImageDescription" in text[:4096]:
        return "perkinelmer"
    xmp = first.values.get(700, b"")[:65536]
    philips = first.text(305).startswith("Philips") and "<DataObject" in text[:4096]
    scanned = "<iScan" in text[:4096] or b"iScan" in xmp or "<scn" in text[:4096]
    if 65420 in first.entries or scanned or philips or first.text(305).startswith("MedScan"):
        return None
    return "generic-tiff"


def _aperio_properties(text: str) -> dict[str, str]:
    pairs = (part.split("=", 1) for part in text[:65536].split("|")[1:] if "=" in part)
    return {f"aperio.{key.strip()}": value.strip() for key, value in pairs}


def _aperio_mpp(properties: Mapping[str, str], text: str, width: int) -> tuple[float, float] | None:
    """MPP of the description; None for a file cut from a coarser level, whose description keeps that of level 0."""
    if _cut_from_finer(text, width):
        return None
    return _plausible_mpp(*(2 * [_parse_float(properties.get("aperio.MPP"))]))


def _cut_from_finer(text: str, width: int) -> bool:
    crop = _CROP.search(text[:1024])
    return crop is not None and int(crop[2]) == width and int(crop[1]) > width


def _tags_mpp(directory: Directory) -> tuple[float, float] | None:
    """Resolution tags of the slide's own directory; print resolutions (300 dpi) are none."""
    said = _pixel_size(directory)
    mpp = _plausible_mpp(*said) if said else None
    return None if mpp and max(mpp) > COARSEST_BY_TAGS else mpp


def _pixel_size(directory: Directory) -> tuple[float, float] | None:
    """Micrometres per pixel as the resolution tags have it, whatever that is."""
    across, down, unit = directory.numbers(282), directory.numbers(283), directory.number(296, 2)
    if unit not in (2, 3) or not across or not down or min(across[0], down[0]) <= 0:
        return None
    length = 10000.0 if unit == 3 else 25400.0
    return length / across[0], length / down[0]


def _why_unknown(vendor: str, pyramid: Pyramid, text: str) -> str:
    """Say why there is no resolution; empty when nothing is said of it."""
    top = pyramid.top
    if vendor == "aperio":
        cut = _cut_from_finer(text, pyramid.planes[0].width)
        return "its description is that of the slide, of which this is a part" if cut or not pyramid.usual else ""
    if vendor == "ome":
        if top.ome is None:
            return "its OME-XML cannot be read" if parse_ome(text) is None else ""
        unit = top.ome.pixels.get("PhysicalSizeXUnit", "µm")
        return f"its OME-XML measures pixels in {unit[:20]!r}" if unit not in _UNITS else ""
    said = _pixel_size(top.page.directory)
    return print_resolution(max(said)) if said and max(said) > COARSEST_BY_TAGS else ""


def _plausible_mpp(x: float | None, y: float | None) -> tuple[float, float] | None:
    low, high = PLAUSIBLE_MPP
    return (x, y) if x is not None and y is not None and low <= x <= high and low <= y <= high else None


def _ome_mpp(pixels: Mapping[str, str]) -> tuple[float, float] | None:
    sizes = []
    for axis in "XY":
        value, unit = _parse_float(pixels.get(f"PhysicalSize{axis}")), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        sizes.append(None if value is None or unit not in _UNITS else value * _UNITS[unit])
    return _plausible_mpp(*sizes)


def _find_objective(vendor: str, text: str, properties: Mapping[str, str]) -> float | None:
    if vendor == "aperio":
        return _parse_float(properties.get("aperio.AppMag"))
    if vendor == "perkinelmer":
        found = re.search(r"<Objective(?:Magnification)?>\s*([0-9.]{1,8})\s*x?\s*</Objective", text[:65536])
        return _parse_float(found[1]) if found else None
    document = parse_ome(text) if vendor == "ome" else None
    return None if document is None else _parse_float(document.objective)


def _parse_float(text: str | None) -> float | None:
    """Return a positive decimal, a comma read as a point (as OpenSlide does); None for anything else."""
    if text is None or not _NUMBER.fullmatch(text.strip()):
        return None
    value = float(text.strip().replace(",", "."))
    return value if 0 < value < math.inf else None
