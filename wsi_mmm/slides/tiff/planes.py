"""How one directory of a TIFF stores its pixels, and whether they can be decoded here."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_mmm.errors import NotASlide, SlideDamaged
from wsi_mmm.slides.tiff.directories import Directory

_MAX_SIDE = 1 << 24
_MAX_TILE_BYTES = 1 << 28
_MAX_SAMPLES = 1 << 16
JPEG = (7, 33007, 34892)
JPEG2000 = (33003, 33004, 33005, 34712)
FAX = (2, 3, 4)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COMPRESSIONS = {
    1: "none", 2: "CCITT RLE", 3: "CCITT fax 3", 4: "CCITT fax 4", 5: "LZW", 7: "JPEG", 8: "deflate", 22610: "JPEG XR",
    32773: "packbits", 32946: "deflate", 33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 33007: "JPEG",
    34712: "JPEG 2000", 34887: "LERC", 34892: "JPEG", 34925: "LZMA", 34926: "zstd", 34927: "WebP", 34933: "PNG",
    34934: "JPEG XR", 50000: "zstd", 50001: "WebP", 50002: "JPEG XL", 50013: "deflate", 52546: "JPEG XL",
}  # fmt: skip
_BY_LIBTIFF = {6: "old-style JPEG", 9: "JBIG", 10: "JBIG", 32766: "NeXT RLE", 32771: "CCITT RLE, word-aligned",
               32809: "ThunderScan", 32909: "PixarLog", 34661: "JBIG", 34676: "SGILog", 34677: "SGILog24"}  # fmt: skip
_BY_OTHERS = {99: "lossless JPEG of Leaf", 262: "Kodak 262", 32767: "Sony ARW", 32769: "packed raw",
              32770: "Samsung SRW", 32895: "IT8 CT", 32896: "IT8 line work", 32897: "IT8 MP", 32898: "IT8 BL",
              32908: "PixarFilm", 32947: "Kodak DCS", 34692: "LuraWave", 34713: "Nikon NEF", 34715: "JBIG2",
              34718: "Microsoft MDI", 34719: "Microsoft MDI", 34720: "Microsoft MDI", 48124: "Jetraw", 65000: "EER",
              65001: "EER", 65002: "EER"}  # fmt: skip
_COLOURS = {4: "a transparency mask", 8: "CIE L*a*b*", 9: "ICC L*a*b*", 10: "ITU L*a*b*", 32803: "colour filters",
            32844: "LogL", 32845: "LogLuv", 34892: "linear raw", 51177: "depth"}  # fmt: skip
_SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
_MOST_EXTRA = 4  # samples beside the colours; more are channels of something else than a picture
_SAVE = "vips tiffsave {} out.tif --tile --pyramid --compression jpeg --Q 90"


@dataclass(frozen=True, slots=True)
class Plane:
    """How one directory stores its pixels; strips are tiles as wide as the image.

    ``bits``: per sample, 0 when samples differ. ``white``: the value of full brightness, less than the bits can hold
    where a slide does not use them all. ``separate``: each sample has tiles of its own. ``reversed_bits``: those of
    each byte, the least first. ``cut``: True for an edge tile that is stored without its padding, whose pixels must be
    those of the tile exactly.
    """

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
    bits: int = 8
    white: int = 255
    separate: bool = False
    reversed_bits: bool = False
    cut: bool = False

    @property
    def columns(self) -> int:
        """Native tiles across."""
        return -(-self.width // self.tile_width)

    @property
    def rows(self) -> int:
        """Native tiles down."""
        return -(-self.height // self.tile_height)

    @property
    def parts(self) -> int:
        """Stored tiles of which a native tile is made."""
        return self.samples if self.separate else 1

    def stored_rows(self, number: int) -> int:
        """Return how many rows of a native tile must be there: the last strip ends with the image."""
        return self.tile_height if self.tiled else min(self.tile_height, self.height - number * self.tile_height)

    @property
    def subsampling(self) -> tuple[int, int]:
        """Pixels across and down that share chroma in YCbCr without JPEG; 2, 2 when the tag is missing."""
        across, down, *_ = [*self.directory.numbers(530), 2, 2] if len(self.directory.numbers(530)) != 1 else [2, 2]
        return int(across), int(down)


def plane_of(directory: Directory, name: str) -> Plane:
    """Return how a directory stores its pixels. Raises SlideDamaged on impossible sizes, NotASlide on huge tiles."""
    width, height = directory.number(256, 0), directory.number(257, 0)
    tiled = 322 in directory.entries
    tile_width = directory.number(322, 0) if tiled else width
    tile_height = directory.number(323, 0) if tiled else min(directory.number(278, height), height)
    samples, compression = directory.number(277, 1), directory.number(259, 1)
    sides = (width, height, tile_width, tile_height)
    claim = f"{width} x {height} px in {'tiles' if tiled else 'strips'} of {tile_width} x {tile_height}"
    if not all(0 < side <= _MAX_SIDE for side in sides) or not 0 < samples <= _MAX_SAMPLES:
        raise SlideDamaged(f"{name} is damaged: it claims {claim}, {samples} samples each; copy it again")
    depths = set(directory.numbers(258)) or {1.0}
    bits = int(depths.pop()) if len(depths) == 1 else 0
    if tile_width * tile_height * samples * (2 if bits > 8 else 1) > _MAX_TILE_BYTES:
        raise NotASlide(f"{name} has {claim}: too large to read in parts; convert it to a tiled pyramidal TIFF")
    return Plane(
        directory, width, height, tile_width, tile_height, tiled, compression, _photometric_of(directory, samples),
        samples, directory.number(317, 1), bits, (1 << min(max(bits, 1), 32)) - 1,
        samples > 1 and directory.number(284, 1) == 2, directory.number(266, 1) == 2,
    )  # fmt: skip


def _photometric_of(directory: Directory, samples: int) -> int:
    """The photometric tag; where it is missing, what libtiff guesses."""
    if 262 in directory.entries:
        return directory.number(262, -1)
    fax = directory.number(259, 1) in FAX
    return WHITE_IS_ZERO if fax else {1: BLACK_IS_ZERO, 3: RGB}.get(samples, -1)


def unsupported(plane: Plane) -> str | None:
    """Say why the plane's pixels cannot be read, with the way out, or None."""
    return _refused_compression(plane) or _refused_numbers(plane) or _refused_colours(plane)


def _refused_compression(plane: Plane) -> str | None:
    code = plane.compression
    if code in _BY_LIBTIFF:
        return f"compression {code} ({_BY_LIBTIFF[code]}) has no decoder here; convert it: {_SAVE.format('in.tif')}"
    if code not in COMPRESSIONS:
        name = _BY_OTHERS.get(code, "unknown")
        return (
            f"compression {code} ({name}) has no decoder here; convert it to another: "
            "bfconvert -tilex 512 -tiley 512 -compression JPEG in.tif out.ome.tif, or the software of its maker"
        )
    if code in FAX and (plane.bits != 1 or plane.samples != 1):
        return f"{COMPRESSIONS[code]} of {plane.bits} bits; convert it: {_SAVE.format('in.tif')}"
    if plane.predictor == 1 or not packs_bytes(code):
        return None
    if plane.predictor != 2 or plane.bits not in (8, 16):
        what = "for floating point numbers" if plane.predictor == 3 else f"of {plane.bits}-bit samples"
        return f"predictor {plane.predictor} {what}; convert it: {_SAVE.format('in.tif')}"
    return None


def packs_bytes(compression: int) -> bool:
    """Tell whether bytes are stored, packed or not: image codecs know no predictor, as in libtiff and tifffile."""
    return compression in (1, 5, 8, 32773, 32946, 34925, 34926, 50000, 50013)


def uses_predictor(plane: Plane) -> bool:
    """Tell whether the samples are stored as differences to the pixel on the left."""
    return plane.predictor == 2 and packs_bytes(plane.compression)


def _refused_numbers(plane: Plane) -> str | None:
    directory, bits = plane.directory, plane.bits
    scaled = f"convert it: vips scale in.tif x.v && {_SAVE.format('x.v')}"
    if set(directory.numbers(339)) - {1.0, 4.0}:
        return f"{bits} bits per sample that are no unsigned integers, but signed or floating point numbers; {scaled}"
    if bits == 0:
        found = "/".join(str(int(b)) for b in directory.numbers(258)[:8])
        return f"{found} bits per sample; {scaled}"
    if bits not in (1, 2, 4, 8, 10, 12, 14, 16):
        return f"{bits} bits per sample; {scaled}"
    if bits < 8 and plane.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, PALETTE, RGB):
        return f"{bits} bits per sample of photometric {plane.photometric}; {scaled}"
    if directory.number(32997, 1) > 1:
        return "a stack of several depths; take one of them: bfconvert -z 0 -tilex 512 -tiley 512 in.tif out.ome.tif"
    return None


def _refused_colours(plane: Plane) -> str | None:
    directory, samples = plane.directory, plane.samples
    named = _COLOURS.get(plane.photometric, "unknown")
    if plane.photometric not in _SAMPLES:
        return (
            f"colours of photometric {plane.photometric} ({named}); convert it: "
            f"vips colourspace in.tif x.v srgb && {_SAVE.format('x.v')}"
        )
    extra = samples - _SAMPLES[plane.photometric]
    first = f"vips extract_band in.tif x.v 0 --n 3 && {_SAVE.format('x.v')}"
    if plane.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and extra > 1:
        return (
            f"{samples} samples of photometric {plane.photometric} (grey): channels, not red, green and blue; "
            f"if the first three are colours: {first}"
        )
    if not 0 <= extra <= _MOST_EXTRA:
        return f"{samples} samples of photometric {plane.photometric}; if the first three are colours: {first}"
    if plane.photometric == PALETTE and (plane.bits > 8 or len(directory.numbers(320)) < 3 << plane.bits):
        return f"a palette of {plane.bits} bits; convert it: {_SAVE.format('in.tif')}"
    if plane.photometric == CMYK and directory.number(332, 1) != 1:
        return f"inks other than CMYK; convert it: vips colourspace in.tif x.v srgb && {_SAVE.format('x.v')}"
    if plane.photometric == YCBCR and not _known_ycbcr(plane):
        return f"YCbCr of {plane.bits} bits without JPEG, with chroma {plane.subsampling}; convert it: " + _SAVE.format(
            "in.tif"
        )
    return None


def stored_ycbcr(plane: Plane) -> bool:
    """Tell whether the samples are YCbCr, which no codec turns into RGB unless it is subsampled in its own way."""
    if plane.compression == 33003 and plane.samples == 3:
        return True
    return plane.photometric == YCBCR and (
        plane.separate or plane.compression in JPEG2000 or packs_bytes(plane.compression)
    )


def shares_chroma(plane: Plane) -> bool:
    """Tell whether chroma is stored once for several pixels, interleaved with their luma (TIFF 6.0 section 21)."""
    return plane.photometric == YCBCR and packs_bytes(plane.compression) and plane.subsampling != (1, 1)


def _known_ycbcr(plane: Plane) -> bool:
    if not packs_bytes(plane.compression):
        return plane.samples == 3
    across, down = plane.subsampling
    if (across, down) == (1, 1):
        return plane.bits in (8, 16)
    return (
        across in (1, 2, 4) and down in (1, 2, 4) and plane.bits == 8 and plane.samples == 3 and plane.predictor == 1
        and not plane.separate
    )  # fmt: skip


def perhaps_openslide(plane: Plane) -> bool:
    """Tell whether OpenSlide may be able to read what is unsupported here: CIE L*a*b* in tiles."""
    unsigned = set(plane.directory.numbers(339)) <= {1.0, 4.0}
    known = plane.photometric == 8 and plane.compression in (1, 5, 8, 32773, 32946)
    return plane.tiled and plane.bits in (8, 16) and unsigned and known
