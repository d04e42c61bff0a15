"""Pyramid levels, vendor and resolution of a TIFF slide, found in its directories."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from wsi_mmm.errors import NotASlide, SlideDamaged
from wsi_mmm.slides.tiff.directories import Directory
from wsi_mmm.types import Level

_MAX_SIDE = 1 << 24
_MAX_TILE_BYTES = 1 << 28
_MAX_SAMPLES = 1 << 16
COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 32773: "packbits", 50000: "zstd",
                33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000"}  # fmt: skip
_ODD = ("<scn", "iScan", "MedScan", "PHILIPS", "Philips", "<DataObject", "Hamamatsu", "3DHISTECH", "Ventana", "Leica")
_PLAUSIBLE_MPP = (0.01, 100.0)
_COARSEST_BY_INCH = 10.0  # 2540 dots per inch: 72, 300 or 600 are what image writers put there by habit
_NUMBER = re.compile(r"([0-9]+[.,]?[0-9]*|[.,][0-9]+)([eE][-+]?[0-9]{1,3})?")
_UNITS = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "μm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "pm": 1e-6}


@dataclass(frozen=True, slots=True)
class Plane:
    """How one directory stores its pixels; strips are tiles as wide as the image."""

    directory: Directory
    width: int
    height: int
    tile_width: int
    tile_height: int
    tiled: bool
    compression: int
    photometric: int
    samples: int
    predictor: int

    @property
    def columns(self) -> int:
        """Native tiles across."""
        return -(-self.width // self.tile_width)

    @property
    def rows(self) -> int:
        """Native tiles down."""
        return -(-self.height // self.tile_height)


@dataclass(frozen=True, slots=True)
class TiffSlide:
    """The pyramid of a TIFF and what it says about itself."""

    planes: tuple[Plane, ...]
    levels: tuple[Level, ...]
    vendor: str
    mpp: tuple[float, float] | None
    objective: float | None
    properties: Mapping[str, str]


def describe(directories: Sequence[Directory], name: str) -> TiffSlide:
    """Return the pyramid. Raises NotASlide when this reader cannot read it, SlideDamaged when it contradicts itself."""
    first = directories[0]
    text = first.text(270)
    vendor = vendor_of(first)
    if vendor is None:
        raise NotASlide(f"{name} is a vendor's TIFF that only OpenSlide reads; give reader='openslide' or leave it out")
    planes = _find_pyramid(directories, name)
    top = planes[0]
    if vendor == "ome" and top.samples == 1 and _ome_channels(text) > 1:
        raise NotASlide(
            f"{name} is an OME-TIFF of {_ome_channels(text)} channels in separate images; convert it to RGB"
        )
    levels = tuple(
        Level(p.width, p.height, top.width / p.width, top.height / p.height, p.tile_width, p.tile_height)
        for p in planes
    )
    properties = _aperio_properties(text) if vendor == "aperio" else {}
    mpp = _find_mpp(first, vendor, text, properties)
    return TiffSlide(planes, levels, vendor, mpp, _find_objective(vendor, text, properties), properties)


def vendor_of(first: Directory) -> str | None:
    """Return 'aperio', 'ome' or 'generic-tiff'; None for vendors' dialects whose geometry only OpenSlide knows."""
    text = first.text(270)
    if text.startswith("Aperio"):
        return "aperio"
    if "<OME" in text[:4096]:
        return "ome"
    software = first.text(305) + first.text(271)
    xmp = first.values.get(700, b"")[:65536]
    if 65420 in first.entries or b"iScan" in xmp or any(word in text[:4096] + software for word in _ODD):
        return None
    return "generic-tiff"


def _find_pyramid(directories: Sequence[Directory], name: str) -> tuple[Plane, ...]:
    top = plane_of(directories[0], name)
    _check_supported(top, name)
    chosen = [top]
    for directory in [*directories[0].sub, *directories[1:]]:
        if not _same_kind(directory, top):
            continue
        plane = plane_of(directory, name)
        if plane.width < chosen[-1].width and plane.height < chosen[-1].height and _same_aspect(plane, top):
            chosen += [] if unsupported(plane) else [plane]
    return tuple(chosen)


def _same_kind(directory: Directory, top: Plane) -> bool:
    tiled = 322 in directory.entries
    if tiled != top.tiled or directory.number(262, -1) != top.photometric:
        return False
    # A thumbnail is stored in strips too: among strips only what calls itself a reduced image is a level.
    return tiled or bool(directory.number(254, 0) & 1)


def _same_aspect(plane: Plane, top: Plane) -> bool:
    """Rounding a level's size moves either side by up to a pixel per halving; two are granted."""
    across, down = top.width / plane.width, top.height / plane.height
    return abs(plane.width - top.width / down) <= 2 or abs(plane.height - top.height / across) <= 2


def plane_of(directory: Directory, name: str) -> Plane:
    """Return how a directory stores its pixels. Raises SlideDamaged on impossible sizes, NotASlide on huge tiles."""
    width, height = directory.number(256, 0), directory.number(257, 0)
    tiled = 322 in directory.entries
    tile_width = directory.number(322, 0) if tiled else width
    tile_height = directory.number(323, 0) if tiled else min(directory.number(278, height), height)
    samples = directory.number(277, 1)
    sides = (width, height, tile_width, tile_height)
    claim = f"{width} x {height} px in {'tiles' if tiled else 'strips'} of {tile_width} x {tile_height}"
    if not all(0 < side <= _MAX_SIDE for side in sides) or not 0 < samples <= _MAX_SAMPLES:
        raise SlideDamaged(f"{name} is damaged: it claims {claim}, {samples} samples each; copy it again")
    if tile_width * tile_height * samples > _MAX_TILE_BYTES:
        raise NotASlide(f"{name} has {claim}: too large to read in parts; convert it to a tiled pyramidal TIFF")
    return Plane(
        directory, width, height, tile_width, tile_height, tiled, directory.number(259, 1), directory.number(262, -1),
        samples, directory.number(317, 1),
    )  # fmt: skip


def _check_supported(plane: Plane, name: str) -> None:
    why = unsupported(plane)
    if why:
        raise NotASlide(f"{name} is a TIFF that this reader cannot read: {why}; convert it to an 8-bit RGB tiled TIFF")


def unsupported(plane: Plane) -> str | None:
    """Say why the plane's pixels cannot be read, or None."""
    directory = plane.directory
    bits = set(directory.numbers(258)) or {1.0}
    colours = {0: (1,), 1: (1, 2), 2: (3, 4), 6: (3,)}.get(plane.photometric, ())
    if plane.compression not in COMPRESSIONS:
        return f"compression {plane.compression}"
    if bits != {8.0}:
        return f"{'/'.join(str(int(b)) for b in sorted(bits))} bits per sample"
    if set(directory.numbers(339)) - {1.0, 4.0}:
        return "samples that are no unsigned integers"
    if plane.samples not in colours:
        return f"{plane.samples} samples of photometric {plane.photometric}"
    if plane.photometric == 6 and plane.compression not in (7, 33003, 33005, 34712):
        return "YCbCr without JPEG"
    if plane.compression == 7 and plane.samples not in (1, 3):
        return f"JPEG of {plane.samples} samples"
    if plane.samples > 1 and directory.number(284, 1) != 1:
        return "colours in separate planes"
    if directory.number(32997, 1) > 1:
        return "a stack of several depths"
    if plane.predictor not in (1, 2):
        return f"predictor {plane.predictor}"
    return None


def perhaps_openslide(plane: Plane) -> bool:
    """Tell whether OpenSlide may be able to read what is unsupported here: it takes 8 or 16 bits, unsigned."""
    bits, kinds = set(plane.directory.numbers(258)), set(plane.directory.numbers(339))
    return bits in ({8.0}, {16.0}) and kinds <= {1.0, 4.0}


def _aperio_properties(text: str) -> dict[str, str]:
    pairs = (part.split("=", 1) for part in text.split("|")[1:] if "=" in part)
    return {f"aperio.{key.strip()}": value.strip() for key, value in pairs}


def _find_mpp(first: Directory, vendor: str, text: str, properties: Mapping[str, str]) -> tuple[float, float] | None:
    if vendor == "aperio":
        return _plausible_mpp(*(2 * [_parse_float(properties.get("aperio.MPP"))]))
    if vendor == "ome":
        return _ome_mpp(text)
    across, down, unit = first.numbers(282), first.numbers(283), first.number(296, 2)
    if unit not in (2, 3) or not across or not down or min(across[0], down[0]) <= 0:
        return None
    length = 10000.0 if unit == 3 else 25400.0
    mpp = _plausible_mpp(length / across[0], length / down[0])
    return None if mpp and unit == 2 and max(mpp) > _COARSEST_BY_INCH else mpp


def _plausible_mpp(x: float | None, y: float | None) -> tuple[float, float] | None:
    low, high = _PLAUSIBLE_MPP
    return (x, y) if x is not None and y is not None and low <= x <= high and low <= y <= high else None


def _ome_mpp(text: str) -> tuple[float, float] | None:
    pixels = _ome_element(text, "Pixels")
    if pixels is None:
        return None
    sizes = []
    for axis in "XY":
        value, unit = _parse_float(pixels.get(f"PhysicalSize{axis}")), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        sizes.append(None if value is None or unit not in _UNITS else value * _UNITS[unit])
    return _plausible_mpp(*sizes)


def _ome_channels(text: str) -> int:
    pixels = _ome_element(text, "Pixels") or {}
    return int(_parse_float(pixels.get("SizeC")) or 1)


def _ome_element(text: str, name: str) -> Mapping[str, str] | None:
    """Return the attributes of the first element called ``name``; None when there is none or the XML is broken."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        return None  # entities can expand without bound
    try:
        root = ET.fromstring(text.encode())
    except (ET.ParseError, LookupError, ValueError):
        return None  # broken, or in an encoding that nobody knows
    found = next((e for e in root.iter() if e.tag.rpartition("}")[2] == name), None)
    return None if found is None else found.attrib


def _find_objective(vendor: str, text: str, properties: Mapping[str, str]) -> float | None:
    if vendor == "aperio":
        return _parse_float(properties.get("aperio.AppMag"))
    attributes = _ome_element(text, "Objective") if vendor == "ome" else None
    return None if attributes is None else _parse_float(attributes.get("NominalMagnification"))


def _parse_float(text: str | None) -> float | None:
    """Return a positive decimal, a comma read as a point (as OpenSlide does); None for anything else."""
    if text is None or not _NUMBER.fullmatch(text.strip()):
        return None
    value = float(text.strip().replace(",", "."))
    return value if 0 < value < math.inf else None
