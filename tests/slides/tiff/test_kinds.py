"""Kinds of TIFF beyond the common ones: right pixels, or one line that says why not."""

from __future__ import annotations

import base64
import contextlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from wsi_mmm.errors import NotASlide, SlideDamaged
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.tiff import writer
from wsi_mmm.slides.tiff.directories import read_directories
from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff
from wsi_mmm.storage.store import open_store
from wsi_mmm.types import U8, Block

# A ramp of 64 x 64 px as Aperio's 33003 holds it: YCbCr, chroma halved in width (made with opj_compress).
HALVED = base64.b64decode(
    "/0//UQAvAAAAAABAAAAAQAAAAAAAAAAAAAAAQAAAAEAAAAAAAAAAAAADBwEBBwIBBwIB/1IADAAAAAEAAgQEAAH/XAAKQEBISFBISFD/ZAAlAAFD"
    "cmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjD/kAAKAAAAAAFvAAH/k8fToQCdejKQEpiS2pl/rICi7fDGIQV8T9FgcP4MmxP+SS20hBWp"
    "Srej4UfEbwwt2o3VDvoo2CIUAL0aVQOdFuyYOETQxctAAM730MwM2tK4leZZj6Bl9+7mU9o/L+NRw7EhvK53um+iHWwAxT/aNgNerZII4NYuHjcu"
    "aXgG7Smnok1IRvby/vfD5qKAIhQOSHeGXmej3eg90lkqNJFt2LkY8c6cZ1m7pEYLB8fWVxW+Eahh80A63i2seNKOhy2qca/5vIuDi+PHmgDIWM24"
    "zgV/x9NRFABRIyaRsH4jxjBJJmVgZqU6GOK0tIWQ7j/dng07EM7grbO5UJixr5eS/Squ3MsYjQpAYzaP8OuXrQeSJOWNM50I8YuGwAsAI7o1To45"
    "q2YPoByiY566AONC+HW1j1XMfUXnyTDAOsAX+0AckRNPI7CXNd6v9+bSx0TLDnSvPDfAOHA19XEP0OwCgICA/9k="
)
TILES: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb"}


@pytest.fixture(scope="module")
def image() -> U8:
    """uint8[317, 401, 3] of coloured squares."""
    squares = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    return np.kron(squares, np.ones((8, 8, 1), np.uint8))[:317, :401]


def shown(path: Path) -> U8:
    """All of level 0."""
    with open_slide(str(path)) as slide:
        return slide.read_region(0, 0, slide.info.width, slide.info.height)


def patched(path: Path, tag: int, value: int) -> None:
    """Change the short value of a tag of the first directory."""
    data = bytearray(path.read_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    for n in range(struct.unpack_from("<H", data, first)[0]):
        if struct.unpack_from("<H", data, first + 2 + 12 * n)[0] == tag:
            struct.pack_into("<H", data, first + 2 + 12 * n + 8, value)
    path.write_bytes(data)


@pytest.mark.parametrize("photometric", [2, 6])
def test_jpeg_2000_with_halved_chroma_has_the_colours_of_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photometric: int
) -> None:
    """Aperio's 33003 with subsampled YCbCr is turned into RGB once, not twice, whatever the photometric tag says."""
    y, x = np.mgrid[:64, :64]
    want = np.stack([200 - x, 90 + y, 140 + (x + y) / 2], axis=-1)
    monkeypatch.setattr(writer, "_tile_encoder", lambda form: lambda pixels: HALVED)
    write_tiff(tmp_path / "a.tiff", [want.astype(np.uint8)], TiffForm("jpeg2000-ycc", tile=64))
    patched(tmp_path / "a.tiff", 262, photometric)
    assert np.abs(shown(tmp_path / "a.tiff") - want).mean() < 2


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", "zstd", "jpeg2000"])
@pytest.mark.parametrize("form", [{"tile": (128, 128)}, {"rowsperstrip": 50}], ids=["tiles", "strips"])
@pytest.mark.filterwarnings("ignore:.*stored in strips")
def test_lossless_codecs_give_the_picture_back(
    tmp_path: Path, image: U8, compression: str, form: dict[str, Any]
) -> None:
    """Tiles and strips, the shorter last strip included, as tifffile writes them in big-endian BigTIFF."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", compression=compression, byteorder=">", bigtiff=True, **form)
    assert np.array_equal(shown(path), image)


@pytest.mark.filterwarnings("ignore:.*stored in strips")
def test_a_strip_that_ends_early_is_listed(tmp_path: Path, image: U8) -> None:
    """Only the last strip may have fewer rows; another that does is damage, not white rows."""
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", rowsperstrip=50)
    store = open_store(str(tmp_path / "a.tif"))
    entry = read_directories(store)[0].entries[279]
    store.close()
    data = bytearray((tmp_path / "a.tif").read_bytes())
    struct.pack_into("<H" if entry.kind == 3 else "<I", data, entry.offset + (2 if entry.kind == 3 else 4), 401 * 3 * 9)
    (tmp_path / "a.tif").write_bytes(data)
    with open_slide(str(tmp_path / "a.tif")) as slide:
        assert slide.reader.read(Block(0, 0, 401, 317, 1.0, 1.0)).failed.tolist() == [[0, 50, 401, 100]]


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_what_is_transparent_is_white(tmp_path: Path, image: U8, kind: str) -> None:
    """Black pixels without opacity are glass, in both kinds of alpha."""
    opaque = np.full_like(image[..., :1], 255)
    rgba = np.concatenate([image, opaque], axis=2)
    rgba[:100, :100] = 0
    tifffile.imwrite(tmp_path / "a.tif", rgba, extrasamples=[kind], **TILES)
    want = image.copy()
    want[:100, :100] = 255
    assert np.array_equal(shown(tmp_path / "a.tif"), want)


def test_white_is_zero_is_turned_round_in_every_codec(tmp_path: Path, image: U8) -> None:
    """Photometric 0 is the negative, in JPEG tiles too."""
    for compression in (None, "jpeg"):
        tifffile.imwrite(
            tmp_path / "a.tif", image[..., 0], tile=(128, 128), photometric="miniswhite", compression=compression
        )
        assert np.abs(shown(tmp_path / "a.tif")[..., 1] - (255.0 - image[..., 0])).mean() < 1


def test_planes_and_sixteen_bits_are_read_as_openslide_reads_them(tmp_path: Path, image: U8) -> None:
    """Colours in separate planes and 16-bit colours come out right, by either reader, which is recorded."""
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(image, 2, 0), planarconfig="separate", **TILES)
    tifffile.imwrite(tmp_path / "b.tif", image.astype(np.uint16) * 257, **TILES)
    for name, reader in ((name, reader) for name in ("a.tif", "b.tif") for reader in (None, "openslide")):
        with open_slide(str(tmp_path / name), reader=reader) as slide:
            assert np.array_equal(slide.read_region(0, 0, 401, 317), image)
            assert slide.info.reader == (reader or "tiff")


@pytest.mark.parametrize(("dtype", "words"), [(np.float32, "32 bits"), (np.int8, "unsigned"), (np.uint32, "32 bits")])
def test_numbers_that_are_no_colours_are_refused(tmp_path: Path, image: U8, dtype: Any, words: str) -> None:
    """Floats and signed numbers are NotASlide with the reason and the way out."""
    tifffile.imwrite(tmp_path / "a.tif", (image[..., 0] > 99).astype(dtype), tile=(128, 128), photometric="minisblack")
    with pytest.raises(NotASlide, match=f"{words}.*convert it"):
        open_slide(str(tmp_path / "a.tif"))


def test_an_ome_tiff_of_single_channels_is_refused(tmp_path: Path, image: U8) -> None:
    """Channels in images of their own are not shown as the grey of the first."""
    axes = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.moveaxis(image, 2, 0), ome=True, metadata=axes, tile=(128, 128), photometric="minisblack")
    with pytest.raises(NotASlide, match=r"3 grey images.*convert"):
        open_slide(str(path))


@pytest.mark.parametrize(
    ("unit", "per_unit", "mpp"),
    [("CENTIMETER", 20000, 0.5), ("INCH", 50800, 0.5), ("INCH", 300, None), ("NONE", 20000, None)],
)
def test_resolution_tags_are_believed_where_they_can_be_meant(
    tmp_path: Path, image: U8, unit: str, per_unit: int, mpp: float | None
) -> None:
    """Centimetres, and inches of a microscope; 300 dots per inch is a habit of writers, not a resolution."""
    tifffile.imwrite(tmp_path / "a.tif", image, resolution=(per_unit, per_unit), resolutionunit=unit, **TILES)
    with open_slide(str(tmp_path / "a.tif")) as slide:
        assert slide.info.mpp_x == (None if mpp is None else pytest.approx(mpp))


def test_resolutions_of_the_two_axes_may_differ(tmp_path: Path, image: U8) -> None:
    """Each axis is scaled by its own mpp."""
    tifffile.imwrite(tmp_path / "a.tif", image, resolution=(20000, 10000), resolutionunit="CENTIMETER", **TILES)
    with open_slide(str(tmp_path / "a.tif")) as slide:
        assert slide.scale(1.0) == pytest.approx((2.0, 1.0))
        got = slide.read_region(8, 8, 160, 280, mpp=1.0)
    want = image[8:288, 8:328].reshape(280, 160, 2, 3).mean(axis=2)
    assert np.abs(got - want).max() <= 1


def test_a_tile_that_claims_more_bytes_than_it_can_have_is_not_fetched(tmp_path: Path, image: U8) -> None:
    """The claim is listed as a failure; the bytes of the whole file are not read for it."""
    path = tmp_path / "a.tif"
    write_tiff(path, [np.tile(image, (4, 4, 1))], TiffForm("none", tile=128, mpp=0.5))
    store = open_store(str(path))
    entry = read_directories(store)[0].entries[325]
    store.close()
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, entry.offset, 3_000_000)
    path.write_bytes(data)
    with open_slide(str(path)) as slide:
        before = slide.reader.stats().bytes_read
        assert slide.reader.read(Block(0, 0, 128, 128, 1.0, 1.0)).failed.tolist() == [[0, 0, 128, 128]]
        assert slide.reader.stats().bytes_read == before


def test_sub_directories_that_are_also_chained_are_levels_once(tmp_path: Path, image: U8) -> None:
    """Some writers link SubIFDs one to the next: no loop, and each level is found."""
    levels = [np.tile(image, (4, 4, 1)), np.tile(image, (4, 4, 1))[::2, ::2], np.tile(image, (4, 4, 1))[::4, ::4]]
    path = tmp_path / "a.tif"
    write_tiff(path, levels, TiffForm("deflate", tile=128, sub_ifds=True, mpp=0.5))
    store = open_store(str(path))
    first, second = read_directories(store)[0].sub
    store.close()
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, first.offset + 2 + 12 * len(first.entries), second.offset)
    path.write_bytes(data)
    with open_slide(str(path)) as slide:
        assert len(slide.info.levels) == 3


def test_one_huge_strip_says_what_to_do(tmp_path: Path) -> None:
    """An image in one strip of a gigabyte is no damage: it has to be converted."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    for tag in (256, 257, 278):
        patched(tmp_path / "a.tif", tag, 30000)
    with pytest.raises(NotASlide, match=r"strips of 30000 x 30000.*convert it"):
        open_slide(str(tmp_path / "a.tif"))


def test_wrong_types_and_counts_of_tags_stay_in_the_error_tree(tmp_path: Path, image: U8) -> None:
    """A tag whose type, count or value was hit ends in our errors or in a picture."""
    path = tmp_path / "a.tif"
    write_tiff(path, [image], TiffForm("deflate", tile=128, mpp=0.5))
    data = path.read_bytes()
    first = struct.unpack_from("<I", data, 4)[0]
    number = struct.unpack_from("<H", data, first)[0]
    rng = np.random.default_rng(2)
    for _ in range(200):
        broken = bytearray(data)
        at = first + 2 + 12 * int(rng.integers(number))
        struct.pack_into("<H", broken, at + 2, int(rng.integers(20)))
        struct.pack_into("<I", broken, at + 4, int(rng.choice([0, 1, 2, 1000, 2**31, 2**32 - 1])))
        struct.pack_into("<I", broken, at + 8, int(rng.choice([0, 1, 3, 7, 0x7FC00000, 0x7F800000, len(data) - 3])))
        path.write_bytes(broken)
        with contextlib.suppress(SlideDamaged, NotASlide, UserWarning), open_slide(str(path)) as slide:
            slide.thumbnail(64)
