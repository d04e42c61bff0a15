"""The direct TIFF reader: every variant, exact positions, and damage that is listed, never silent."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest

from helpers.area import area_average
from helpers.made_slides import SIZE, Board, Made, overwrite, tile_at
from helpers.stored import stored
from wsi_mmm.errors import MppUnknown, NotASlide, OptionError, SlideDamaged, SlideNotFound
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.fake import VARIANTS, form_of, pyramid, synthetic_slide
from wsi_mmm.slides.tiff.directories import read_directories
from wsi_mmm.slides.tiff.reader import TiffReader
from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff
from wsi_mmm.storage.store import open_store
from wsi_mmm.types import U8, Block, Tiles

LOSSLESS = ("bigtiff-none", "lzw", "deflate", "zstd", "none", "strips")


def variant_file(made: Made, folder: Path, variant: str) -> Path:
    """Write the small slide's picture in another form."""
    path = folder / f"{variant}.tiff"
    write_tiff(path, list(pyramid(made.image)), form_of(variant, SIZE["width"], SIZE["height"], mpp=0.5))
    return path


def set_count(path: Path, level: int, number: int, count: int) -> None:
    """Change the byte count of a native tile in its table."""
    store = open_store(str(path))
    entry = read_directories(store)[level].entries[325]
    store.close()
    overwrite(path, entry.offset + 4 * number, struct.pack("<I", count))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "strips"])
def test_every_variant_opens_with_its_levels_and_resolution(small_slide: Made, tmp_path: Path, variant: str) -> None:
    """Size, levels and mpp are found in each form, and the picture is the one that was stored."""
    with open_slide(str(variant_file(small_slide, tmp_path, variant))) as slide:
        info = slide.info
        assert (info.width, info.height, info.reader) == (1100, 820, "tiff")
        assert [(v.width, v.height) for v in info.levels] == [(1100, 820), (275, 205)]
        assert info.mpp_x == (None if variant == "no-mpp" else pytest.approx(0.5, rel=1e-6))
        error = np.abs(slide.read_region(0, 0, 1100, 820).astype(int) - small_slide.image)
        assert error.max() == 0 if variant in LOSSLESS else error.mean() < 3.5


def test_aperio_text_gives_objective_and_properties(small_slide: Made, tmp_path: Path) -> None:
    """AppMag and MPP of an SVS are read."""
    with open_slide(str(variant_file(small_slide, tmp_path, "svs"))) as slide:
        assert (slide.info.vendor, slide.info.objective) == ("aperio", 20.0)
        assert slide.info.properties["aperio.MPP"] == "0.5"


def test_strips_are_read_exactly_with_one_warning_of_the_cost(small_slide: Made, tmp_path: Path) -> None:
    """A TIFF in strips works, and says that it is slow in a warning and in its properties."""
    path = variant_file(small_slide, tmp_path, "strips")
    with pytest.warns(UserWarning, match="stored in strips"):
        slide = open_slide(str(path))
    assert np.array_equal(slide.read_region(0, 0, 1100, 820), small_slide.image)
    assert "whole rows" in slide.info.properties["wsi_mmm.cost"]
    slide.close()


def test_big_endian_files_are_read(tmp_path: Path) -> None:
    """Byte order MM is as good as II."""
    import tifffile

    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "mm.tif", image, byteorder=">", tile=(128, 128), photometric="rgb", compression="zlib")
    with open_slide(str(tmp_path / "mm.tif")) as slide:
        assert np.array_equal(slide.read_region(0, 0, 400, 300), image)


def test_grey_tiffs_read_as_rgb(tmp_path: Path) -> None:
    """One sample per pixel is repeated in three channels."""
    import tifffile

    image = np.random.default_rng(0).integers(0, 256, (300, 400), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "grey.tif", image, tile=(128, 128), photometric="minisblack")
    with open_slide(str(tmp_path / "grey.tif")) as slide:
        assert np.array_equal(slide.read_region(0, 0, 400, 300), np.repeat(image[..., None], 3, axis=2))


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_positions_are_exact_on_every_level_of_a_shifted_checkerboard(board: Board, scale: int) -> None:
    """Each level shows the squares where level 0 has them, to the pixel, at any place."""
    with open_slide(str(board.path)) as slide:
        source = next(s for s in slide.reader._sources if s.downsample_x == scale)  # type: ignore[attr-defined]
        for x, y in [(0, 0), (37, 91), (120, 64)]:
            block = Block(x, y, 150, 120, scale, scale)
            want = board.image[y * scale : (y + 120) * scale, x * scale : (x + 150) * scale].astype(int)
            want = want.reshape(120, scale, 150, scale, 3).mean(axis=(1, 3))
            assert np.abs(slide.reader.read(block).pixels - want).max() <= 1
            window = (x, y, x + 150, y + 120)
            level, _ = stored(slide.reader, source, window)
            assert np.abs(level - want).max() <= 2  # each level was rounded once more


@pytest.mark.parametrize("mpp", [0.25, 0.37, 0.5, 1.0, 1.3, 2.0, 4.0])
def test_a_region_lies_where_it_is_asked_for_at_any_mpp(board: Board, mpp: float) -> None:
    """The area average of level 0 is met within 2 grey levels on average, from an odd corner."""
    scale = mpp / 0.25
    with open_slide(str(board.path)) as slide:
        got = slide.read_region(301, 203, 100, 80, mpp)
    crop = board.image[200 : 210 + int(80 * scale), 300 : 310 + int(100 * scale)]
    want = area_average(crop, (80, 100), (scale, scale), (3, 1))
    assert np.abs(got - want).mean() < 2


def test_jpeg_reductions_stay_close_to_the_area_average(small_slide: Made) -> None:
    """At 1/2, 1/4 and 1/8 the codec's own scaling is within 2 grey levels of averaging level 0."""
    with open_slide(str(small_slide.path)) as slide:
        top = slide.read_region(0, 0, 1100, 820)
        for scale in (2, 4, 8):
            got = slide.reader.read(Block(0, 0, 1100 // scale, 820 // scale, scale, scale)).pixels
            want = area_average(top, (820 // scale, 1100 // scale), (scale, scale), (0, 0))
            assert np.abs(got - want).mean() < 2, scale
        decoded = slide.reader.stats().tiles_decoded
        assert decoded == 20 * 4  # every native tile once per scale


def test_padding_beyond_the_edge_never_shows(small_slide: Made) -> None:
    """The dark padding of the last tiles is not mixed into reduced pixels."""
    with open_slide(str(small_slide.path)) as slide:
        for scale in (2, 4, 8):
            width = 1100 // scale
            column = slide.reader.read(Block(width - 1, 0, 2, 40, scale, scale)).pixels
            assert column.min() > 150, scale


def test_a_corrupt_tile_is_white_and_listed(copy_slide: Path) -> None:
    """One bad JPEG costs its own 256 x 256 px, and a region across it raises with its place."""
    at, length = tile_at(copy_slide, 0, 6)
    overwrite(copy_slide, at + length // 2, b"\xff\xd9" + bytes(length // 2 - 2))
    with open_slide(str(copy_slide)) as slide:
        canvas = slide.reader.read(Block(0, 0, 1100, 820, 1.0, 1.0))
        assert canvas.failed.tolist() == [[256, 256, 512, 512]]
        assert (canvas.pixels[256:512, 256:512] == 255).all()
        assert slide.reader.read(Block(0, 0, 250, 250, 1.0, 1.0)).failed.shape == (0, 4)
        with pytest.raises(SlideDamaged, match=r"level-0 px \(256, 256\)"):
            slide.read_region(0, 0, 600, 600)
        assert slide.thumbnail(400).shape == (298, 400, 3)


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\xd8", b"no jpeg at all"], ids=["entropy noise", "header only", "other bytes"]
)
def test_any_kind_of_broken_jpeg_is_a_failed_tile(copy_slide: Path, damage: bytes) -> None:
    """Noise in the coded data, a cut header or foreign bytes: listed every time, at every reduction."""
    at, length = tile_at(copy_slide, 0, 6)
    noise = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8).tobytes()
    overwrite(
        copy_slide, at + (700 if not damage else 0), (damage + bytes(length))[:length] if damage else noise[:-700]
    )
    with open_slide(str(copy_slide)) as slide:
        for scale in (1.0, 2.0, 4.0):
            block = Block(0, 0, int(1100 / scale), int(820 / scale), scale, scale)
            assert slide.reader.read(block).failed.tolist() == [[256, 256, 512, 512]], scale


@pytest.mark.parametrize("variant", ["jpeg2000", "lzw", "deflate", "zstd", "none"])
def test_broken_tiles_of_other_codecs_are_listed(small_slide: Made, tmp_path: Path, variant: str) -> None:
    """A tile of zeros with a lying table is a failure for each codec (uncompressed data is cut short instead)."""
    path = variant_file(small_slide, tmp_path, variant)
    at, length = tile_at(path, 0, 6)
    overwrite(path, at, b"\x12" * length)
    if variant == "none":
        set_count(path, 0, 6, 100)
    with open_slide(str(path)) as slide:
        assert len(slide.reader.read(Block(0, 0, 1100, 820, 1.0, 1.0)).failed) == 1


def test_a_jpeg_that_claims_another_size_is_refused(copy_slide: Path) -> None:
    """A tile that would decode to 65500 x 65500 px fails without memory being taken for it."""
    at, length = tile_at(copy_slide, 0, 6)
    data = copy_slide.read_bytes()[at : at + length]
    overwrite(copy_slide, at + data.index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500))
    with open_slide(str(copy_slide)) as slide:
        assert len(slide.reader.read(Block(0, 0, 1100, 820, 1.0, 1.0)).failed) == 1


def test_a_tile_left_out_is_blank_on_level_0_and_made_from_level_0_above(small_slide: Made, tmp_path: Path) -> None:
    """Byte count 0 is no damage: white on level 0; a level's missing tile comes from the finer one."""
    path = tmp_path / "sparse.tiff"
    write_tiff(path, list(pyramid(small_slide.image)), TiffForm("none", mpp=0.5))
    with open_slide(str(path)) as slide:
        source = slide.reader._sources[1]  # type: ignore[attr-defined]
        want, _ = stored(slide.reader, source, (0, 0, 275, 205))
    set_count(path, 0, 0, 0)
    set_count(path, 1, 0, 0)
    with open_slide(str(path)) as slide:
        gone = slide.read_region(0, 0, 1100, 820)
        assert (gone[:256, :256] == 255).all()
        assert np.array_equal(gone[256:], small_slide.image[256:])
        got, failed = stored(slide.reader, slide.reader._sources[1], (0, 0, 275, 205))  # type: ignore[attr-defined]
        assert len(failed) == 0
        assert np.abs(got[70:, 70:].astype(int) - want[70:, 70:]).mean() < 1


def test_a_file_cut_in_its_tiles_opens_and_lists_them_when_the_tables_come_first(
    small_slide: Made, tmp_path: Path
) -> None:
    """Tiles beyond the end of a truncated file fail one by one."""
    import tifffile

    path = tmp_path / "head.tif"
    tifffile.imwrite(path, small_slide.image, tile=(256, 256), photometric="rgb", compression=None)
    path.write_bytes(path.read_bytes()[:-300_000])
    with open_slide(str(path)) as slide:
        canvas = slide.reader.read(Block(0, 0, 1100, 820, 1.0, 1.0))
        assert 0 < len(canvas.failed) < 20
        for x0, y0, x1, y1 in canvas.failed:
            assert (canvas.pixels[y0:y1, x0:x1] == 255).all()


@pytest.mark.parametrize("keep", [0.999, 0.7, 0.3])
def test_a_file_without_its_tables_is_damaged(small_slide: Made, tmp_path: Path, keep: float) -> None:
    """Truncation before the directories is one clear error."""
    data = small_slide.path.read_bytes()
    (tmp_path / "cut.tiff").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(SlideDamaged, match="truncated"):
        open_slide(str(tmp_path / "cut.tiff"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello, this is text and nothing else", "no format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "plain PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "plain JPEG"),
        (b"II*\0", "only 4 bytes"),
    ],
)
def test_what_is_no_slide_says_so(tmp_path: Path, content: bytes, words: str) -> None:
    """Empty files, text and photos are NotASlide with what they are."""
    (tmp_path / "file.svs").write_bytes(content)
    with pytest.raises(NotASlide, match=words):
        open_slide(str(tmp_path / "file.svs"))


def test_a_missing_file_and_a_folder_are_not_found(tmp_path: Path) -> None:
    """Both name what to give instead."""
    with pytest.raises(SlideNotFound, match="no such file"):
        open_slide(str(tmp_path / "none.svs"))
    with pytest.raises(SlideNotFound, match="folder"):
        open_slide(str(tmp_path))


def test_directories_in_a_loop_and_absurd_claims_are_damage(copy_slide: Path, tmp_path: Path) -> None:
    """A directory that points to itself, or a width of 4 billion, ends at once."""
    data = bytearray(copy_slide.read_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    number = struct.unpack_from("<H", data, first)[0]
    loop = bytearray(data)
    struct.pack_into("<I", loop, first + 2 + number * 12, first)
    copy_slide.write_bytes(loop)
    with pytest.raises(SlideDamaged, match="loop"):
        open_slide(str(copy_slide))
    wide = bytearray(data)
    for n in range(number):
        tag = struct.unpack_from("<H", wide, first + 2 + n * 12)[0]
        if tag == 256:
            struct.pack_into("<I", wide, first + 2 + n * 12 + 8, 0xFFFFFFF0)
    copy_slide.write_bytes(wide)
    with pytest.raises(SlideDamaged, match="claims"):
        open_slide(str(copy_slide))


def test_random_damage_to_the_directories_never_escapes_the_error_tree(copy_slide: Path) -> None:
    """Whatever bytes of the tables are hit, opening and reading end in our errors or in a picture."""
    data = copy_slide.read_bytes()
    first = struct.unpack_from("<I", data, 4)[0]
    rng = np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(data)
        for at in rng.integers(first - 400, len(data), 3):
            broken[at] = rng.integers(0, 256)
        copy_slide.write_bytes(broken)
        with contextlib.suppress(SlideDamaged, NotASlide, UserWarning), open_slide(str(copy_slide)) as slide:
            slide.thumbnail(64)


def test_pictures_of_numbers_are_refused_with_the_reason(tmp_path: Path) -> None:
    """A TIFF of more bits than a picture has says what it is."""
    import tifffile

    image = np.zeros((512, 512), np.uint32)
    tifffile.imwrite(tmp_path / "deep.tif", image, tile=(256, 256), photometric="minisblack")
    with pytest.raises(NotASlide, match="32 bits"):
        open_slide(str(tmp_path / "deep.tif"), reader="tiff")


def test_a_slide_without_mpp_opens_and_scale_names_the_fix(small_slide: Made, tmp_path: Path) -> None:
    """Level 0 can be read; a physical scale needs the override."""
    path = variant_file(small_slide, tmp_path, "no-mpp")
    with open_slide(str(path)) as slide:
        assert slide.read_region(0, 0, 10, 10).shape == (10, 10, 3)
        with pytest.raises(MppUnknown, match=r"open_slide\(uri, mpp=0\.25\)"):
            slide.scale(0.5)
    with open_slide(str(path), mpp=0.25) as slide:
        assert slide.scale(0.5) == (2.0, 2.0)


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_mpp_is_refused(small_slide: Made, mpp: float) -> None:
    """Zero, negative, NaN and infinite mpp are OptionErrors, for the slide and for a region."""
    with pytest.raises(OptionError, match="mpp must be"):
        open_slide(str(small_slide.path), mpp=mpp)
    with open_slide(str(small_slide.path)) as slide, pytest.raises(OptionError, match="mpp must be"):
        slide.read_region(0, 0, 8, 8, mpp)


def test_small_files_need_few_requests(small_slide: Made) -> None:
    """Opening reads directories and samples in few merged requests, and a whole level in few more."""
    reader = TiffReader(open_store(str(small_slide.path)))
    opened = reader.stats().requests
    reader.read(Block(0, 0, 1100, 820, 1.0, 1.0))
    assert opened <= 12
    assert reader.stats().requests - opened <= 2
    reader.close()


def test_the_same_arguments_make_the_same_file(tmp_path: Path) -> None:
    """The synthetic slide is a pure function of its arguments."""
    made = [synthetic_slide(tmp_path / f"{n}.tiff", 5, width=600, height=400, nuclei=20) for n in (1, 2)]
    assert (tmp_path / "1.tiff").read_bytes() == (tmp_path / "2.tiff").read_bytes()
    assert np.array_equal(made[0].polygons, made[1].polygons)
    assert (
        open_slide(str(tmp_path / "1.tiff")).info.fingerprint == open_slide(str(tmp_path / "2.tiff")).info.fingerprint
    )


def test_nuclei_are_dark_where_the_truth_says(small_slide: Made) -> None:
    """Inside the outlines the picture is darker and bluer than right outside."""
    image: U8 = small_slide.image
    truth = small_slide.truth
    assert len(truth.centers) >= 50
    assert (truth.radii <= 9.01).all()
    assert (truth.radii >= 4.9).all()
    inside = np.array([image[int(y), int(x)] for x, y in truth.centers])
    edge = truth.polygons.mean(axis=1) + 2.2 * (truth.polygons[:, 0] - truth.polygons.mean(axis=1))
    outside = np.array([image[int(y), int(x)] for x, y in edge])
    assert inside[:, 0].mean() < outside[:, 0].mean() - 40
    assert (inside[:, 2] > inside[:, 0]).mean() > 0.9


@pytest.mark.parametrize(("scale", "size"), [(1.0, 256), (2.0, 256), (1.3, 256)])
def test_a_damaged_native_tile_is_white_in_the_tiles_it_touches_and_listed(
    copy_slide: Path, scale: float, size: int
) -> None:
    """Decoded in place, side by side or cut: its neighbours are whole."""
    with open_slide(str(copy_slide)) as slide:
        at = int(slide.reader._offsets[0][1])  # type: ignore[attr-defined]
        count = int(slide.reader._counts[0][1])  # type: ignore[attr-defined]
    tiles = Tiles(np.array([[0, 0], [256, 0]]), size, scale, scale)
    with open_slide(str(copy_slide)) as slide:
        want = [np.zeros((size, size, 3), np.uint8) for _ in range(2)]
        slide.reader.read_tiles(tiles, want)  # type: ignore[attr-defined]
    overwrite(copy_slide, at + count // 2, b"\xff\xd9" * 20)
    with open_slide(str(copy_slide)) as slide:
        got = [np.zeros((size, size, 3), np.uint8) for _ in range(2)]
        failed = slide.reader.read_tiles(tiles, got)  # type: ignore[attr-defined]
    assert failed.tolist() == [[256, 0, 512, 256]]
    for n in range(2):
        different = (got[n] != want[n]).any(axis=2)
        x = np.flatnonzero(different.any(axis=0)) + n * 256
        assert (got[n][different] > 200).all() or scale != 1.0
        assert len(x) == 0 or (x.min() * scale >= 255 - scale and x.max() * scale <= 512)
    assert any((g != w).any() for g, w in zip(got, want, strict=True))
