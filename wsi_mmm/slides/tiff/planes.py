"""How one directory of a TIFF stores its pixels, and whether they can be decoded here."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_mmm.errors import NotASlide, SlideDamaged
from wsi_mmm.slides.tiff.directories import Directory

_MAX_SIDE = 1 << 24
_MAX_TILE_BYTES = 1 << 28
_MAX_SAMPLES = 1 << 16
COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 32773: "packbits", 50000: "zstd",
                33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000"}  # fmt: skip


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
