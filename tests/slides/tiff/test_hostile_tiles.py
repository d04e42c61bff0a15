"""Tiles that are not what the file says: cut at the edge, larger than claimed, bombs, endless scans, codecs unknown."""

from __future__ import annotations

import io
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from helpers.raw_tiff import picture_tags, tiles_of, write_raw
from wsi_mmm.errors import NotASlide
from wsi_mmm.slides import open_slide
from wsi_mmm.types import U8, Block

WIDTH, HEIGHT, TILE = 150, 90, (64, 48)
CODES = {"none": 1, "lzw": 5, "zlib": 8, "packbits": 32773, "zstd": 50000, "lzma": 34925, "jpeg8": 7, "jpeg2k": 34712,
         "webp": 50001, "jpegxl": 50002, "png": 34933, "jpegxr": 34934, "lerc": 34887}  # fmt: skip
PACKED = ("none", "lzw", "zlib", "packbits", "zstd", "lzma")


def picture() -> U8:
    """Smooth waves of colour."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [128 + 90 * np.sin(x / (19 + 3 * n) + n) * np.cos(y / 23) for n in range(3)]
    return np.stack(waves, axis=-1).round().astype(np.uint8)


IMAGE = picture()


def encoded(name: str, tile: np.ndarray) -> bytes:
    """``tile`` by a codec, without loss where it can."""
    encode = getattr(imagecodecs, f"{name}_encode")
    if name in PACKED:
        return bytes(encode(tile.tobytes(), **({"level": 1} if name == "lzma" else {})))
    more: dict[str, Any] = {
        "webp": {"lossless": True},
        "jpegxl": {"lossless": True, "effort": 1},
        "jpeg8": {"level": 97},
    }.get(name, {})
    return bytes(encode(tile, **more))


def written(path: Path, name: str, tiles: list[bytes], size: tuple[int, int] = (WIDTH, HEIGHT), **more: Any) -> Path:
    """A TIFF of ``tiles`` by the codec ``name``."""
    photometric = 6 if name == "jpeg8" else 2
    tags = picture_tags(size, more.pop("tile", TILE), compression=CODES[name], photometric=photometric)
    return write_raw(path, tags | more.get("tags", {}), tiles)


def failures(path: Path, scale: int = 1) -> list[list[int]]:
    """Rectangles of level 0 that cannot be decoded."""
    with open_slide(str(path)) as slide:
        block = Block(0, 0, slide.info.width // scale, slide.info.height // scale, float(scale), float(scale))
        return slide.reader.read(block).failed.tolist()


@pytest.mark.parametrize("name", CODES)
def test_edge_tiles_may_be_stored_without_their_padding(tmp_path: Path, name: str) -> None:
    """Some writers cut the last tiles at the slide's edge: nothing is lost, nothing else is taken for one."""
    path = written(tmp_path / "a.tif", name, [encoded(name, tile) for tile in tiles_of(IMAGE, TILE, cut=True)])
    with open_slide(str(path)) as slide:
        assert np.abs(slide.read_region(0, 0, WIDTH, HEIGHT).astype(int) - IMAGE).max() <= (8 if name == "jpeg8" else 1)
        half = slide.reader.read(Block(0, 0, WIDTH // 2, HEIGHT // 2, 2.0, 2.0))
        assert len(half.failed) == 0
        mean = IMAGE.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3))
        assert np.abs(half.pixels - mean).max() <= (8 if name == "jpeg8" else 1)
    rest = [encoded(name, tile) for tile in tiles_of(IMAGE[:, :100], TILE, cut=True)]  # of another slide's width
    whole = [encoded(name, tile) for tile in tiles_of(IMAGE, TILE)]
    bad = failures(written(tmp_path / "b.tif", name, [whole[0], whole[1], rest[1], *whole[3:]]))
    assert bad == [[128, 0, 150, 48]]


@pytest.mark.parametrize("name", [name for name in CODES if name not in PACKED])
@pytest.mark.parametrize("side", [(32, 48), (64, 96), (2048, 2048)], ids=str)
def test_a_tile_of_another_size_than_claimed_fails(tmp_path: Path, name: str, side: tuple[int, int]) -> None:
    """It is refused before it takes memory, its neighbours are whole."""
    tiles = [encoded(name, tile) for tile in tiles_of(IMAGE, TILE)]
    tiles[1] = encoded(name, np.full((side[1], side[0], 3), 7, np.uint8))[:80_000]
    path = written(tmp_path / "a.tif", name, tiles)
    failures(path)
    tracemalloc.start()
    try:
        assert failures(path) == [[64, 0, 128, 48]]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def lzma_of_huge_window() -> bytes:
    """A stream whose header asks for a dictionary of 2 GB."""
    data = bytearray(lzma.compress(bytes(TILE[0] * TILE[1] * 3), format=lzma.FORMAT_ALONE))
    data[1:5] = (0x7FFFFFFF).to_bytes(4, "little")
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    name: lambda name=name: encoded(name, np.zeros(16 << 20, np.uint8)) for name in ("zlib", "zstd", "lzma")
}


@pytest.mark.parametrize("name", BOMBS)
def test_packed_bytes_cannot_unpack_to_more_than_a_tile(tmp_path: Path, name: str) -> None:
    """16 MB of zeros in a few kB: no more than the tile's 9 kB are made of them."""
    tiles = [encoded(name, tile) for tile in tiles_of(IMAGE, TILE)]
    tiles[1] = BOMBS[name]()
    assert len(tiles[1]) < 80_000
    path = written(tmp_path / "a.tif", name, tiles)
    tracemalloc.start()
    try:
        assert failures(path) in ([[64, 0, 128, 48]], [])  # LZMA gives the first 9 kB
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_stream_cannot_ask_for_memory(tmp_path: Path) -> None:
    """LZMA says how large a window it needs: at most what the strongest preset takes is given."""
    tiles = [encoded("lzma", tile) for tile in tiles_of(IMAGE, TILE)]
    tiles[1] = lzma_of_huge_window()
    assert failures(written(tmp_path / "a.tif", "lzma", tiles)) == [[64, 0, 128, 48]]


def changed_style(data: bytes, **more: int) -> bytes:
    """A JPEG 2000 codestream whose markers COD or SIZ say something else."""
    out, at = bytearray(data), data.index(b"\xff\x52")
    if "layers" in more:
        out[at + 6 : at + 8] = more["layers"].to_bytes(2, "big")
    if "block" in more:
        out[at + 10] = out[at + 11] = more["block"]
    if "tile" in more:
        siz = data.index(b"\xff\x51")
        out[siz + 22 : siz + 30] = more["tile"].to_bytes(4, "big") * 2
    if "precinct" in more:
        length, levels = int.from_bytes(out[at + 2 : at + 4], "big"), out[at + 9]
        out[at + 4] |= 1
        out[at + 2 + length : at + 2 + length] = bytes([more["precinct"]] * (levels + 1))
        out[at + 2 : at + 4] = (length + levels + 1).to_bytes(2, "big")
    return bytes(out)


@pytest.mark.parametrize("claim", [{"precinct": 0x11}, {"layers": 65535}, {"tile": 1}, {"block": 0}], ids=str)
def test_work_that_jpeg_2000_claims_is_bounded_before_it_is_decoded(
    tmp_path: Path, claim: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few hundred bytes of 1024 x 1024 px would take gigabytes or seconds."""
    side = (1024, 1024)
    plain = bytes(imagecodecs.jpeg2k_encode(np.zeros((*side, 3), np.uint8), codecformat="j2k"))
    assert failures(written(tmp_path / "a.tif", "jpeg2k", [plain], size=side, tile=side)) == []
    path = written(tmp_path / "b.tif", "jpeg2k", [changed_style(plain, **claim)], size=side, tile=side)
    monkeypatch.setattr(imagecodecs, "jpeg2k_decode", lambda data: pytest.fail("decoded"))
    assert failures(path) == [[0, 0, *side]]


@pytest.mark.parametrize("name", CODES)
def test_damaged_bytes_of_any_codec_are_a_failure_or_a_picture(tmp_path: Path, name: str) -> None:
    """Bits that flip, and streams that end early, raise nothing else than that the tile cannot be decoded."""
    data = encoded(name, IMAGE[:48, :64])
    path = written(tmp_path / "a.tif", name, [data], size=TILE)
    rng = np.random.default_rng(len(name))
    for n in range(30):
        broken = bytearray(data)
        for at in rng.integers(0, min(len(data), 120) if n % 2 else len(data), rng.integers(1, 4)):
            broken[at] = rng.integers(0, 256)
        path = written(path, name, [bytes(broken[: rng.integers(1, len(data)) if n % 5 == 0 else None])], size=TILE)
        assert failures(path) in ([], [[0, 0, *TILE]])


def test_a_jpeg_marker_beyond_the_end_fails(tmp_path: Path) -> None:
    """The length of a header that is cut is not believed."""
    data = encoded("jpeg8", IMAGE[:48, :64])
    cut = data[: data.index(b"\xff\xda") + 6]
    assert failures(written(tmp_path / "a.tif", "jpeg8", [cut], size=TILE)) == [[0, 0, *TILE]]


# ------------------------------------------------------------------------------------------------ scans of JPEG


def progressive(tile: U8, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are so many."""
    out = io.BytesIO()
    Image.fromarray(tile).save(out, "JPEG", progressive=True, quality=95)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]


@pytest.mark.parametrize("tables", [False, True], ids=["whole", "shared tables"])
def test_scans_of_a_jpeg_are_bounded(tmp_path: Path, tables: bool) -> None:
    """Progressive JPEG is read; one of a thousand scans, each of which takes the whole tile's time, is not."""
    tags = {347: (7, b"\xff\xd8\xff\xdb\x00\x43\x00" + bytes([1] * 64) + b"\xff\xd9")} if tables else {}
    tiles = tiles_of(IMAGE, TILE)
    usual = [progressive(tile, 0) for tile in tiles]
    assert usual[0].count(b"\xff\xda") > 5
    with open_slide(str(written(tmp_path / "a.tif", "jpeg8", usual, tags=tags))) as slide:
        assert np.abs(slide.read_region(0, 0, WIDTH, HEIGHT).astype(int) - IMAGE).mean() < 3
    hostile = [usual[0], progressive(tiles[1], 1000), *usual[2:]]
    assert failures(written(tmp_path / "b.tif", "jpeg8", hostile, tags=tags)) == [[64, 0, 128, 48]]


def test_scans_are_counted_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bound costs no decoding, at any scale."""
    import simplejpeg

    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("decoded")

    path = written(tmp_path / "a.tif", "jpeg8", [progressive(IMAGE[:48, :64], 1000)], size=TILE)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    assert failures(path) == failures(path, 2) == [[0, 0, 64, 48]]


# ------------------------------------------------------------------------------------------------ refused by name

VIPS = "vips tiffsave in.tif out.tif --tile --pyramid"
CODECS = [(6, "old-style JPEG", VIPS), (34661, "JBIG", VIPS), (34676, "SGILog", VIPS), (32909, "PixarLog", VIPS),
          (32809, "ThunderScan", VIPS), (34715, "JBIG2", "bfconvert"), (65000, "EER", "bfconvert"),
          (48124, "Jetraw", "bfconvert"), (12345, "unknown", "bfconvert"),
          (32767, "Sony ARW", "bfconvert")]  # fmt: skip


@pytest.mark.parametrize("tile", [TILE, None], ids=["tiles", "strips"])
@pytest.mark.parametrize(("code", "name", "tool"), CODECS)
@pytest.mark.parametrize("reader", [None, "tiff"])
def test_a_compression_without_decoder_is_named_with_the_way_out(
    tmp_path: Path, code: int, name: str, tool: str, tile: tuple[int, int] | None, reader: str | None
) -> None:
    """Which it is, and a command that converts it; copying the file again would not help."""
    tiles = [part.tobytes() for part in tiles_of(IMAGE, tile or (WIDTH, HEIGHT))]
    path = write_raw(tmp_path / "a.tif", picture_tags((WIDTH, HEIGHT), tile, compression=code), tiles)
    with pytest.raises(NotASlide) as error:
        open_slide(str(path), reader=reader)
    text = str(error.value)
    assert f"compression {code} ({name})" in text
    assert tool in text
    assert "copy it" not in text


def test_what_openslide_does_not_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words say which compression; copying the file again would not help. DICOM has a command of its own."""
    path = write_raw(tmp_path / "a.tif", picture_tags((64, 48), TILE, compression=34661), [bytes(100)])
    with pytest.raises(NotASlide, match="compression: 34661; leave out the reader, or convert it: vips"):
        open_slide(str(path), reader="openslide")

    def refuse(name: str) -> None:
        raise openslide.OpenSlideError(f"Reading {name}: Unsupported transfer syntax 1.2.840.10008.1.2.4.80")

    monkeypatch.setattr(openslide, "OpenSlide", refuse)
    with pytest.raises(NotASlide, match=r"DICOM in JPEG-LS .*2\.4\.80.*gdcmconv --raw"):
        open_slide(str(path), reader="openslide")


REFUSED: dict[str, tuple[dict[int, tuple[int, Any]], str]] = {
    "32 bits": ({258: (3, [32] * 3)}, "32 bits per sample.*vips scale"),
    "floats": ({258: (3, [32] * 3), 339: (3, [3] * 3)}, "32 bits.*floating point.*vips scale"),
    "signed": ({339: (3, [2] * 3)}, "signed.*vips scale"),
    "different bits": ({258: (3, [5, 6, 5])}, "5/6/5 bits.*vips scale"),
    "odd bits": ({258: (3, [9] * 3)}, "9 bits per sample.*vips scale"),
    "Lab of ICC": ({262: (3, 9)}, "photometric 9 .ICC L.*vips colourspace"),
    "colour filters": ({262: (3, 32803)}, "colour filters.*vips colourspace"),
    "grey of three": ({262: (3, 1)}, "3 samples of photometric 1 .grey.*vips extract_band"),
    "ten samples": ({277: (3, 10), 258: (3, [8] * 10)}, "10 samples.*vips extract_band"),
    "inks": ({262: (3, 5), 277: (3, 4), 258: (3, [8] * 4), 332: (3, 2)}, "inks.*vips colourspace"),
    "palette without colours": ({262: (3, 3), 277: (3, 1), 258: (3, 8)}, "palette.*vips tiffsave"),
    "predictor of floats": ({317: (3, 3)}, "predictor 3 .*floating.*vips tiffsave"),
    "predictor of four bits": ({258: (3, [4] * 3), 317: (3, 2)}, "predictor 2 of 4-bit.*vips tiffsave"),
    "depths": ({32997: (4, 3)}, "several depths.*bfconvert"),
    "chroma of three": ({262: (3, 6), 530: (3, [3, 1])}, "YCbCr.*chroma .3, 1.*vips tiffsave"),
    "fax of colours": ({259: (3, 4)}, "CCITT fax 4 of 8 bits.*vips tiffsave"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("reader", [None, "tiff"])
def test_what_is_no_picture_is_named_with_the_way_out(tmp_path: Path, case: str, reader: str | None) -> None:
    """Numbers, colours and layouts that are not shown: which, and a command that makes a slide of them."""
    tags, words = REFUSED[case]
    path = write_raw(
        tmp_path / "a.tif",
        picture_tags((WIDTH, HEIGHT), TILE, more=tags),
        [bytes(TILE[0] * TILE[1] * 12)] * 6,
    )
    with pytest.raises(NotASlide, match=words):
        open_slide(str(path), reader=reader)


def test_missing_tags_are_guessed_as_libtiff_does(tmp_path: Path) -> None:
    """Without the photometric tag three samples are RGB, one is grey."""
    for image in (IMAGE, IMAGE[..., 0]):
        samples = 1 if image.ndim == 2 else 3
        tags = picture_tags((WIDTH, HEIGHT), TILE, samples=samples)
        del tags[262]
        path = write_raw(tmp_path / "a.tif", tags, [tile.tobytes() for tile in tiles_of(image, TILE)])
        with open_slide(str(path)) as slide:
            assert np.array_equal(
                slide.read_region(0, 0, WIDTH, HEIGHT)[..., 1], np.atleast_3d(image)[..., samples // 2]
            )


def test_planes_of_which_some_are_left_out(tmp_path: Path) -> None:
    """A tile without any of its planes is blank; one that lacks some is damage."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.moveaxis(IMAGE, 2, 0), photometric="rgb", planarconfig="separate", tile=TILE[::-1],
                     compression="zlib", metadata=None)  # fmt: skip
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages.first.tags[325]
        where, size = tag.valueoffset, {3: 2, 4: 4}[int(tag.dtype)]
    for number in (0, 6, 12, 1):  # all three planes of the first tile, one of the second
        data[where + number * size : where + (number + 1) * size] = bytes(size)
    path.write_bytes(data)
    with open_slide(str(path)) as slide:
        canvas = slide.reader.read(Block(0, 0, WIDTH, HEIGHT, 1.0, 1.0))
    assert canvas.failed.tolist() == [[64, 0, 128, 48]]
    assert (canvas.pixels[:48, :128] == 255).all()
    assert np.array_equal(canvas.pixels[48:], IMAGE[48:])
