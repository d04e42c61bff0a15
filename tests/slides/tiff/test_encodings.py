"""Several hundred generated files: bit depths, colours, compressions, predictors, planes, bits reversed, extra samples.

Each shows the picture that was stored, as tifffile, OpenSlide or PIL read it, too.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from helpers.raw_tiff import picture_tags, tiles_of, write_raw
from wsi_mmm.slides import open_slide
from wsi_mmm.types import Block

pytestmark = pytest.mark.filterwarnings("ignore:.*stored in strips", "ignore:.*of 16 bits per sample")

WIDTH, HEIGHT, TILE = 112, 90, (64, 48)


def picture(bits: int = 8, samples: int = 3) -> np.ndarray:
    """Smooth waves, another in each sample, with some noise; of all values that ``bits`` can hold."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    waves = [0.5 + 0.42 * np.sin(x / (9 + 2 * n) + n) * np.cos(y / (13 - n)) for n in range(samples)]
    noise = np.random.default_rng(samples).uniform(-0.03, 0.03, (HEIGHT, WIDTH, samples))
    values = np.stack(waves, axis=-1) + noise
    values[:2, :2], values[2:4, :2] = 0, 1
    return np.round(values.clip(0, 1) * ((1 << bits) - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def eight(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of ``bits`` brought to 0..255."""
    return np.floor(samples.astype(np.float64) * 255 / ((1 << bits) - 1) + 0.5)


def expected(samples: np.ndarray, bits: int, colours: str) -> np.ndarray:
    """What a viewer shows, float[h, w, 3] of 0..255."""
    values = eight(samples, bits)
    if colours == "miniswhite":
        shown = np.repeat(255 - values[..., :1], 3, axis=2)
    elif colours.startswith("minisblack"):
        shown = np.repeat(values[..., :1], 3, axis=2)
    elif colours == "separated":
        shown = np.floor((255 - values[..., :3]) * (255 - values[..., 3:4]) / 255)
    else:
        shown = values[..., :3]
    if colours.endswith("unassalpha"):
        alpha = values[..., -1:] / 255
        shown = shown * alpha + 255 * (1 - alpha)
    elif colours.endswith("assocalpha"):
        shown = np.minimum(shown + 255 - values[..., -1:], 255)
    return shown


def shown(path: Path) -> np.ndarray:
    """All of level 0, read by our own reader."""
    with open_slide(str(path)) as slide:
        assert slide.info.reader == "tiff"
        return slide.read_region(0, 0, slide.info.width, slide.info.height).astype(float)


def by_openslide(path: Path) -> np.ndarray | None:
    """All of level 0 over white; None where it refuses the file."""
    try:
        with openslide.OpenSlide(str(path)) as slide:
            image = slide.read_region((0, 0), 0, slide.dimensions)
    except openslide.OpenSlideError:
        return None
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB")).astype(float)


def assert_same(path: Path, want: np.ndarray, within: float = 1.0, *, slides: bool = True, case: Any = None) -> None:
    """We show ``want``; so does OpenSlide where it opens the file (``slides``: it is right about such files)."""
    found = shown(path)
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= within, case
    other = by_openslide(path) if slides else None
    assert other is None or np.abs(found - other).max() <= max(within, 2), f"OpenSlide: {case}"


# ------------------------------------------------------------------------------------------------ packed bytes

COLOURS: dict[str, dict[str, Any]] = {
    "rgb": {"photometric": "rgb"},
    "rgb, one more": {"photometric": "rgb", "extrasamples": ["unspecified"]},
    "rgb, two more": {"photometric": "rgb", "extrasamples": ["unspecified", "unspecified"]},
    "rgb, unassalpha": {"photometric": "rgb", "extrasamples": ["unassalpha"]},
    "minisblack": {"photometric": "minisblack"},
    "miniswhite": {"photometric": "miniswhite"},
    "minisblack, unassalpha": {"photometric": "minisblack", "extrasamples": ["unassalpha"]},
    "separated": {"photometric": "separated"},
}
COUNTS = {"rgb": 3, "minisblack": 1, "miniswhite": 1, "separated": 4}
PACKED = [None, "lzw", "zlib", "packbits", "zstd", "lzma"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": TILE[::-1]},
    "planes": {"tile": TILE[::-1], "planarconfig": "separate"},
    "strips, big-endian": {"rowsperstrip": 20, "byteorder": ">"},
    "strips of planes": {"rowsperstrip": 20, "planarconfig": "separate"},
}
CASES = [
    case for case in itertools.product(PACKED, COLOURS, (8, 16), LAYOUTS, (1, 2))
    if not (case[4] == 2 and case[0] in (None, "packbits"))  # which libtiff reads without a predictor
    and not ("planes" in case[3] and case[1] in ("minisblack", "miniswhite"))
    and not (case[4] == 2 and case[1] not in ("rgb", "minisblack", "rgb, two more"))
    and not (case[3] == "strips of planes" and case[0] not in (None, "zlib"))
    and not (case[0] == "lzma" and (case[1] not in ("rgb", "minisblack") or case[3] == "planes"))  # slow to write
]  # fmt: skip


STREAMS = {"tiles": LAYOUTS["tiles"], "planes": LAYOUTS["planes"], "strips": {"rowsperstrip": 20}}


def samples_of(colours: str) -> int:
    """Samples of each pixel."""
    return COUNTS[colours.split(",")[0]] + len(COLOURS[colours].get("extrasamples", []))


@pytest.mark.parametrize("compression", PACKED, ids=str)
def test_packed_bytes(tmp_path: Path, compression: str | None) -> None:
    """Some 75 files for each: colours x bit depths x layouts x predictors are shown as they were stored."""
    path = tmp_path / "a.tif"
    for _, colours, bits, layout, predictor in (case for case in CASES if case[0] == compression):
        image = picture(bits, samples_of(colours))
        data = np.moveaxis(image, 2, 0) if "planes" in layout else image if image.shape[2] > 1 else image[..., 0]
        more: dict[str, Any] = {"predictor": predictor} if predictor > 1 else {}
        more |= {"compressionargs": {"level": 1}} if compression == "lzma" else {}
        tifffile.imwrite(
            path, data, compression=compression, metadata=None, **COLOURS[colours], **LAYOUTS[layout], **more
        )
        assert np.array_equal(tifffile.imread(path), data)
        # libtiff takes any fourth sample for alpha, and shows 16-bit grey wrongly.
        assert_same(
            path,
            expected(image, bits, colours),
            slides="more" not in colours and "alpha" not in colours and (bits == 8 or not colours.startswith("minis")),
            case=(colours, bits, layout, predictor),
        )


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize(
    ("bits", "photometric"), [(b, p) for b in (1, 2, 4, 8, 10, 12, 14) for p in (0, 1, 3) if b <= 8 or p < 3]
)
def test_packed_integers_and_palettes(tmp_path: Path, bits: int, photometric: int, order: str) -> None:
    """Samples that are no whole bytes, in rows of whole bytes, in both orders of bits; palettes of 8 and 16 bits."""
    image = picture(bits, 1)[..., 0]
    packed = [
        np.packbits(((tile[..., None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8).reshape(len(tile), -1), 1)
        for tile in tiles_of(image & ((1 << bits) - 1), TILE)
    ]
    table = np.random.default_rng(1).integers(0, 256, (1 << bits, 3) if photometric == 3 else 1)
    for fill, wide in itertools.product((1, 2), (1, 257)):
        tiles = [tile.tobytes() if fill == 1 else imagecodecs.bitorder_encode(tile.tobytes()) for tile in packed]
        more: dict[int, Any] = {266: (3, fill)}
        want = expected(image[..., None], bits, "miniswhite" if photometric == 0 else "minisblack")
        if photometric == 3:
            more[320] = (3, (table * wide).T.ravel().tolist())
            want = table[image].astype(float)
        tags = picture_tags((WIDTH, HEIGHT), TILE, photometric=photometric, samples=1, bits=bits, more=more)
        assert_same(write_raw(tmp_path / "a.tif", tags, tiles, order=order), want)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("code", "name"), [(1, "none"), (5, "lzw"), (8, "zlib"), (32773, "packbits"), (50000, "zstd"), (34925, "lzma")]
)
def test_reversed_bits(tmp_path: Path, code: int, name: str, bits: int) -> None:
    """FillOrder 2, in tiles and in strips, as libtiff (OpenSlide and PIL) and tifffile read it."""
    image = picture(bits, 3)
    for tile in (TILE, None):
        tiles = tiles_of(image, TILE) if tile else [image]
        encode = imagecodecs.none_encode if name == "none" else getattr(imagecodecs, f"{name}_encode")
        data = [bytes(imagecodecs.bitorder_encode(bytes(encode(part.tobytes())))) for part in tiles]
        tags = picture_tags((WIDTH, HEIGHT), tile, compression=code, bits=bits, more={266: (3, 2)})
        path = write_raw(tmp_path / "a.tif", tags, data)
        assert np.array_equal(tifffile.imread(path), image)
        assert_same(path, expected(image, bits, "rgb"))


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt", "tiff_lzw", "packbits"])
def test_bilevel_pages(tmp_path: Path, compression: str) -> None:
    """Fax codecs and others of one bit, as libtiff writes them."""
    path = tmp_path / "a.tif"
    image = Image.fromarray(picture(8, 1)[..., 0] > 128)
    image.save(path, compression=compression)
    want = np.repeat(np.asarray(Image.open(path).convert("L"))[..., None], 3, axis=2)
    assert np.array_equal(np.asarray(image.convert("L")), want[..., 0])
    assert_same(path, want.astype(float))


@pytest.mark.parametrize(("across", "down"), [(a, d) for a in (1, 2, 4) for d in (1, 2, 4)])
def test_ycbcr_without_jpeg(tmp_path: Path, across: int, down: int) -> None:
    """Luma and shared chroma in units, uncompressed and packed (TIFF 6.0 section 21)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rgb = np.stack([200 - x, 90 + y, 120 + (x + y) / 4], axis=-1).clip(0, 255).astype(np.uint8)
    ycc = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    for code, encode in ((1, bytes), (8, imagecodecs.zlib_encode)):
        tiles = []
        for tile in tiles_of(ycc, TILE):
            rows, columns = TILE[1] // down, TILE[0] // across
            luma = tile[..., 0].reshape(rows, down, columns, across).transpose(0, 2, 1, 3).reshape(rows, columns, -1)
            chroma = tile[..., 1:].reshape(rows, down, columns, across, 2).mean(axis=(1, 3)).round().astype(np.uint8)
            tiles.append(bytes(encode(np.concatenate([luma, chroma], axis=2).tobytes())))
        more = {530: (3, [across, down]), 532: (5, [0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1])}
        tags = picture_tags((WIDTH, HEIGHT), TILE, compression=code, photometric=6, more=more)
        path = write_raw(tmp_path / "a.tif", tags, tiles)
        assert np.abs(shown(path) - rgb).mean() < 3
        if (across, down) in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1)):
            other = imagecodecs.tiff_decode(path.read_bytes(), asrgb=True)
            assert np.abs(shown(path) - other[..., :3]).max() <= 2


# ------------------------------------------------------------------------------------------------ image codecs

LOSSLESS: dict[str, dict[str, Any]] = {
    "jpeg2000": {}, "jpegxl": {"compressionargs": {"lossless": True}}, "jpegxr": {"compressionargs": {"level": 1.0}},
    "png": {}, "lerc": {}, "lerc-deflate": {"compression": "lerc", "compressionargs": {"compression": "deflate"}},
    "lerc-zstd": {"compression": "lerc", "compressionargs": {"compression": "zstd"}},
    "webp": {"compressionargs": {"lossless": True}},
}  # fmt: skip
IMAGES = [
    case for case in itertools.product(LOSSLESS, ("rgb", "minisblack", "rgb, unassalpha"), (8, 16), STREAMS)
    if not (case[0] == "webp" and (case[1] == "minisblack" or case[2] == 16 or case[3] == "planes"))
    and not (case[1] == "minisblack" and case[3] == "planes")
    and not (case[0] == "jpegxr" and case[1] == "rgb, unassalpha" and case[3] == "planes")
]  # fmt: skip


@pytest.mark.parametrize("compression", LOSSLESS)
def test_image_codecs(tmp_path: Path, compression: str) -> None:
    """Streams that say themselves how large they are, in 8 and 16 bits, colours together or in planes."""
    path = tmp_path / "a.tif"
    for _, colours, bits, layout in (case for case in IMAGES if case[0] == compression):
        image = picture(bits, samples_of(colours))
        data = np.moveaxis(image, 2, 0) if layout == "planes" else image if image.shape[2] > 1 else image[..., 0]
        options = {"compression": compression, "metadata": None} | COLOURS[colours] | STREAMS[layout]
        tifffile.imwrite(path, data, **(options | LOSSLESS[compression]))
        assert np.array_equal(tifffile.imread(path), data)
        assert_same(path, expected(image, bits, colours), slides=False, case=(colours, bits, layout))


@pytest.mark.parametrize(
    ("codec", "layout"),
    [(c, n) for c in ("webp", "jpegxl", "jpeg2000", "jpegxr", "jpeg") for n in STREAMS if (c, n) != ("webp", "planes")],
)
def test_lossy_image_codecs(tmp_path: Path, codec: str, layout: str) -> None:
    """As tifffile decodes them."""
    level = {"webp": 90, "jpegxl": 90, "jpeg2000": 60, "jpegxr": 0.9, "jpeg": 90}[codec]
    image = picture()
    data = np.moveaxis(image, 2, 0) if layout == "planes" else image
    options = {"compression": codec, "compressionargs": {"level": level}, "photometric": "rgb"} | STREAMS[layout]
    tifffile.imwrite(tmp_path / "a.tif", data, metadata=None, **options)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        want = tiff.pages.first.asarray()
    want = np.moveaxis(want, 0, 2) if layout == "planes" else want
    assert_same(tmp_path / "a.tif", want.astype(float), 4)
    assert np.abs(shown(tmp_path / "a.tif") - image).mean() < 8


# ------------------------------------------------------------------------------------------------ JPEG

ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"


def bare(stream: bytes) -> bytes:
    """A JPEG stream without the markers that say its colours, its components numbered 1, 2, 3."""
    at, out = 2, bytearray(stream[:2])
    while stream[at + 1] != 0xDA:
        stop = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        segment = bytearray(stream[at:stop])
        if segment[1] in (0xC0, 0xC1, 0xC2):
            segment[10::3] = bytes(range(1, 1 + segment[9]))
        out += segment if segment[1] not in (0xE0, 0xEE) else b""
        at = stop
    scan = bytearray(stream[at:])
    scan[5 : 5 + 2 * scan[4] : 2] = bytes(range(1, 1 + scan[4]))
    return bytes(out + scan)


def encoded(tile: np.ndarray, colours: str, subsampling: str = "444") -> bytes:
    """``tile`` as JPEG of YCbCr or RGB, without markers."""
    if colours == "rgb":
        return bare(bytes(imagecodecs.jpeg8_encode(tile, level=95, colorspace="RGB", outcolorspace="RGB")))
    return bare(bytes(imagecodecs.jpeg8_encode(tile, level=95, subsampling=subsampling)))


def marked(stream: bytes, marker: str) -> bytes:
    """``stream`` with a marker, or with components named by the letters R, G, B."""
    if marker == "letters":
        at = stream.index(b"\xff\xc0")
        out = bytearray(stream)
        out[at + 10 : at + 19 : 3] = b"RGB"
        scan = stream.index(b"\xff\xda")
        out[scan + 5 : scan + 11 : 2] = b"RGB"
        return bytes(out)
    added = {"": b"", "jfif": JFIF, "adobe-rgb": ADOBE + b"\0", "adobe-ycc": ADOBE + b"\1"}[marker]
    return stream[:2] + added + stream[2:]


SMOOTH = np.asarray(Image.fromarray(picture()).resize((WIDTH * 3, HEIGHT * 3), Image.Resampling.BICUBIC))[
    :HEIGHT, :WIDTH
]
TRUE = [("rgb", "444", marker) for marker in ("", "adobe-rgb", "letters")]
TRUE += [("ycc", sub, marker) for sub in ("444", "422", "420", "440", "411") for marker in ("", "jfif", "adobe-ycc")]


@pytest.mark.parametrize(
    ("photometric", "colours", "subsampling", "marker"),
    # Where the stream says nothing, the tag is right.
    [(p, *one) for p in (2, 6) for one in TRUE if one[1] != "444" or one[2] or (one[0] == "rgb") == (p == 2)],
)
def test_colours_of_jpeg_are_those_of_the_stream(
    tmp_path: Path, colours: str, subsampling: str, marker: str, photometric: int
) -> None:
    """Halved chroma or a marker says what the colours are, the photometric tag only where they say nothing."""
    tiles = [marked(encoded(tile, colours, subsampling), marker) for tile in tiles_of(SMOOTH, TILE)]
    tags = picture_tags((WIDTH, HEIGHT), TILE, compression=7, photometric=photometric)
    path = write_raw(tmp_path / "a.tif", tags, tiles)
    assert np.abs(shown(path) - SMOOTH).mean() < 3
    if (colours == "rgb") == (photometric == 2):  # OpenSlide believes the tag alone
        assert_same(path, shown(path))


@pytest.mark.parametrize("tables", [False, True], ids=["whole", "shared tables"])
@pytest.mark.parametrize("photometric", [2, 6])
def test_a_jpeg_without_its_end_is_read_and_a_cut_one_is_not(tmp_path: Path, photometric: int, tables: bool) -> None:
    """The end marker adds nothing; coded data that end early are damage."""
    tiles = [encoded(tile, "rgb" if photometric == 2 else "ycc", "444") for tile in tiles_of(SMOOTH, TILE)]
    assert all(tile.endswith(b"\xff\xd9") for tile in tiles)
    tags = picture_tags((WIDTH, HEIGHT), TILE, compression=7, photometric=photometric)
    if tables:
        at, stop = tiles[0].index(b"\xff\xdb"), tiles[0].index(b"\xff\xc0")
        tags[347] = (7, b"\xff\xd8" + tiles[0][at:stop] + b"\xff\xd9")
        tiles = [tile[:at] + tile[stop:] for tile in tiles]
    want = shown(write_raw(tmp_path / "a.tif", tags, tiles))
    got = shown(write_raw(tmp_path / "b.tif", tags, [tile[:-2] for tile in tiles]))
    assert np.array_equal(got, want)
    with open_slide(str(write_raw(tmp_path / "c.tif", tags, [tile[: len(tile) // 2] for tile in tiles]))) as slide:
        assert (slide.thumbnail(50) == 255).all()


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 12])
def test_other_jpegs(tmp_path: Path, samples: int, bits: int) -> None:
    """12 bits, CMYK, and samples beside the colours; of 8 bits OpenSlide agrees about CMYK."""
    image = np.repeat(SMOOTH[..., :1], samples, axis=2) if samples != 3 else SMOOTH
    stored = image if bits == 8 else image.astype(np.uint16) * 16
    space = {1: "grayscale", 3: "rgb", 4: "cmyk"}.get(samples, 0)
    tiles = [
        bytes(imagecodecs.jpeg8_encode(tile, level=97, bitspersample=bits, colorspace=space, outcolorspace=space))
        for tile in tiles_of(stored if samples > 1 else stored[..., 0], TILE)
    ]
    photometric = {1: 1, 2: 1, 3: 2, 4: 5}[samples]
    tags = picture_tags(
        (WIDTH, HEIGHT), TILE, compression=7, photometric=photometric, samples=samples, bits=bits,
        more={338: (3, [0])} if samples == 2 else None,
    )  # fmt: skip
    colours = {1: "minisblack", 2: "minisblack", 3: "rgb", 4: "separated"}[samples]
    path = write_raw(tmp_path / "a.tif", tags, tiles)
    assert np.abs(shown(path) - expected(stored, bits, colours)).mean() < 3


def test_jpeg_with_alpha(tmp_path: Path) -> None:
    """Four components that are RGB and alpha, as libtiff writes them: no marker says so, the tags do."""
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:48] = 0
    tiles = [bytes(imagecodecs.jpeg8_encode(tile, level=97, colorspace=0, outcolorspace=0))
             for tile in tiles_of(np.concatenate([SMOOTH, alpha], axis=2), TILE)]  # fmt: skip
    tags = picture_tags((WIDTH, HEIGHT), TILE, compression=7, samples=4, more={338: (3, [2])})
    found = shown(write_raw(tmp_path / "a.tif", tags, tiles))
    assert (found[:48] == 255).all()
    assert np.abs(found[48:] - SMOOTH[48:]).mean() < 2


def test_lossless_jpeg(tmp_path: Path) -> None:
    """Process 14 (SOF3) in 8 and 16 bits."""
    for bits in (8, 16):
        image = picture(bits)
        tiles = [bytes(imagecodecs.jpeg8_encode(tile, lossless=True, colorspace="rgb", outcolorspace="rgb",
                                                bitspersample=bits)) for tile in tiles_of(image, TILE)]  # fmt: skip
        tags = picture_tags((WIDTH, HEIGHT), TILE, compression=7, bits=bits)
        assert np.abs(shown(write_raw(tmp_path / "a.tif", tags, tiles)) - expected(image, bits, "rgb")).max() == 0


# ------------------------------------------------------------------------------------------------ 16 bits in use


@pytest.mark.parametrize("used", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("compression", ["zlib", "jpeg2000", "jpegxl"])
def test_sixteen_bits_of_which_fewer_are_used(tmp_path: Path, used: int, compression: str) -> None:
    """Bright out of what the camera gives, not out of 65535."""
    for colours, layout in [("miniswhite", "tiles"), *(("rgb", layout) for layout in STREAMS)]:
        image = picture(used, samples_of(colours)).astype(np.uint16)
        data = np.moveaxis(image, 2, 0) if layout == "planes" else image if image.shape[2] > 1 else image[..., 0]
        more = {"compressionargs": {"lossless": True}} if compression == "jpegxl" else {}
        options = {"compression": compression, "metadata": None} | COLOURS[colours] | STREAMS[layout] | more
        tifffile.imwrite(tmp_path / "a.tif", data, **options)
        assert_same(tmp_path / "a.tif", expected(image, used, colours), slides=used == 16 and colours == "rgb")


def test_ome_xml_says_how_many_bits_are_used(tmp_path: Path) -> None:
    """A dark slide of a camera of 12 bits is dark; its resolution is known although its colours lie in planes."""
    image = picture(8).astype(np.uint16)
    axes = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "SignificantBits": 12}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path, np.moveaxis(image, 2, 0), ome=True, metadata=axes, photometric="rgb", planarconfig="separate",
        tile=TILE[::-1],
    )  # fmt: skip
    assert np.abs(shown(path) - np.floor(image * 255 / 4095 + 0.5)).max() == 0
    with open_slide(str(path)) as slide:
        assert slide.info.mpp_x == pytest.approx(0.5)


def test_levels_of_a_dark_file_are_compared_as_they_are_shown(tmp_path: Path) -> None:
    """16 bits that hold 0..255: a level is known from another picture of its size, which is no blacker."""
    side = 256
    y, x = np.mgrid[:side, :side]
    image = np.stack([128 + 90 * np.sin(x / (19 + 3 * n)) * np.cos(y / 23) for n in range(3)], -1).astype(np.uint16)
    half = image.reshape(side // 2, 2, side // 2, 2, 3).mean(axis=(1, 3)).astype(np.uint16)
    for second, levels in ((half, 2), (np.ascontiguousarray(half.transpose(1, 0, 2))[::-1], 1)):
        with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
            for one in (image, second):
                tiff.write(one, photometric="rgb", tile=TILE[::-1], compression="zlib", metadata=None)
        with open_slide(str(tmp_path / "a.tif")) as slide:
            assert len(slide.info.levels) == levels


def test_a_sample_beyond_the_bits_in_use_fails_its_tile(tmp_path: Path) -> None:
    """It is listed, not shown white."""
    image = np.zeros((48 * 30, 64 * 30, 3), np.uint16) + 200
    image[48 * 3 + 5, 64 * 7 + 5] = 9999
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", tile=TILE[::-1], compression="zlib")
    with open_slide(str(tmp_path / "a.tif")) as slide:
        assert slide.reader.read(Block(0, 0, 1920, 1440, 1.0, 1.0)).failed.tolist() == [[448, 144, 512, 192]]
        assert slide.info.properties["tiff.bits"] == "8 of 16 bits per sample are used"
