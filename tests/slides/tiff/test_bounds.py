"""What a small hostile TIFF may cost: every bound is in its error, and opening takes a moment."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from wsi_mmm.errors import NotASlide, SlideDamaged, WsiError
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.tiff import verify
from wsi_mmm.types import Block

SECONDS = 4.0  # of a processor; each takes less than one
Entry = tuple[int, int, int, int | bytes]  # tag, type, count, value or bytes stored elsewhere


@contextmanager
def soon() -> Iterator[None]:
    """A generous limit on what the processor does, so that work without bound fails and a busy machine does not."""
    begin = time.process_time()
    yield
    assert time.process_time() - begin < SECONDS


def page(side: int = 64, tile: int = 16, tiles: int | None = None, stored: bool = True) -> list[Entry]:
    """Tags of a grey picture whose tiles all lie at one place, or are all left out."""
    number = tiles or (-(-side // tile)) ** 2
    places = b"".join(struct.pack("<I", 8) for _ in range(number))
    lengths = struct.pack("<I", tile * tile if stored else 0) * number
    return [
        (256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
        (322, 4, 1, tile), (323, 4, 1, tile), (324, 4, number, places), (325, 4, number, lengths),
    ]  # fmt: skip


def write(path: Path, pages: Sequence[Sequence[Entry]], *, loop: bool = False) -> Path:
    """A classic TIFF with these directories; ``loop``: the last one leads to the first."""
    out = bytearray(b"II*\0" + bytes(4) + bytes(1024))
    where, first = 4, 0
    for tags in pages:
        rows = []
        for tag, kind, count, value in sorted(tags, key=lambda one: one[0]):
            if isinstance(value, bytes) and len(value) > 4:
                rows.append(struct.pack("<HHII", tag, kind, count, len(out)))
                out += value
            else:
                raw = value if isinstance(value, bytes) else struct.pack("<I", value)
                rows.append(struct.pack("<HHI", tag, kind, count) + raw.ljust(4, b"\0"))
        struct.pack_into("<I", out, where, len(out))
        first = first or len(out)
        out += struct.pack("<H", len(rows)) + b"".join(rows)
        where = len(out)
        out += bytes(4)
    if loop:
        struct.pack_into("<I", out, where, first)
    path.write_bytes(out)
    return path


def described(path: Path, text: bytes) -> Path:
    """A slide with this ImageDescription."""
    return write(path, [[*page(), (270, 2, len(text), text)]])


OME = b'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
LONG = 15_000_000
TEXTS = {
    "one word": b"<" + b"a" * LONG,
    "many brackets": b"<" * LONG,
    "pipes of Aperio": b"Aperio" + b"|a=1" * (LONG // 4),
    "pages of ImageJ": b"ImageJ=1\n" + b"images=1\n" * (LONG // 9),
    "crops of Aperio": b"Aperio" + b"[0,0 1x1]" * (LONG // 9),
    "PerkinElmer": b"<PerkinElmer-QPI-ImageDescription>" + b"<ImageType>" * (LONG // 11),
    "scanner": b"<DataObject" * (LONG // 11),
    "digits": b"Aperio |MPP = " + b"1" * LONG,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_long_descriptions_are_read_once(tmp_path: Path, kind: str) -> None:
    """15 MB of what the vendors' patterns look for: the slide opens, or is refused."""
    path = described(tmp_path / "a.tif", TEXTS[kind])
    with soon(), suppress(WsiError), open_slide(str(path)) as slide:
        assert sum(map(len, slide.info.properties.values())) < 100_000


XML = {
    "planes": OME + b'<Image><Pixels SizeC="1">' + b'<TiffData IFD="0"/>' * 300_000 + b"</Pixels></Image></OME>",
    "images": OME + b'<Image><Pixels SizeC="3"/></Image>' * 300_000 + b"</OME>",
    "deep": OME + b"<Image>" * 400_000 + b"</Image>" * 400_000 + b"</OME>",
}


@pytest.mark.parametrize("kind", XML)
def test_the_elements_of_ome_xml_are_bounded(tmp_path: Path, kind: str) -> None:
    """The error says how many are read."""
    path = described(tmp_path / "a.ome.tif", XML[kind])
    with soon(), pytest.raises(NotASlide, match=r"more than 100000 elements or 500000 attributes"):
        open_slide(str(path))


BELOW = {
    "deep": OME + b"<Image>" * 40_000 + b"</Image>" * 40_000 + b"</OME>",
    "images": OME + b'<Image Name="x"><Pixels SizeC="1"/></Image>' * 40_000 + b"</OME>",
    "attributes": OME + b"<Image " + b" ".join(b'a%d="1"' % n for n in range(200_000)) + b"/></OME>",
    "expanding": b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + OME + b"<Image Name='&b;'/></OME>",
}


@pytest.mark.parametrize("kind", BELOW)
def test_ome_xml_within_the_bounds_takes_a_moment(tmp_path: Path, kind: str) -> None:
    """Nested and repeated images cost their number once, not its square; the first directory is the slide."""
    path = described(tmp_path / "a.ome.tif", BELOW[kind])
    with soon(), open_slide(str(path)) as slide:
        assert (slide.info.width, slide.info.vendor) == (64, "ome")
        assert sum(map(len, slide.info.properties.values())) < 100_000


def test_a_description_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    """Not read, and said."""
    path = described(tmp_path / "a.tif", b"Aperio" + bytes(17 << 20))
    with soon(), pytest.raises(NotASlide, match=r"description of 17825798 bytes; at most 16777216"):
        open_slide(str(path))


def test_directories_are_bounded(tmp_path: Path) -> None:
    """Chained, as SubIFDs, or in a loop."""
    few = [(256, 4, 1, 64), (257, 4, 1, 64)]
    with soon(), pytest.raises(NotASlide, match="more than 1024 images"):
        open_slide(str(write(tmp_path / "a.tif", [page(), *[few] * 100_000])))
    offsets = b"".join(struct.pack("<I", 8 + n) for n in range(16_000))
    with soon(), pytest.raises(WsiError, match=r"more than 1024|claims \d+ tags"):
        open_slide(str(write(tmp_path / "b.tif", [[*page(), (330, 4, len(offsets) // 4, offsets)]])))
    with soon(), pytest.raises(SlideDamaged, match="form a loop"):
        open_slide(str(write(tmp_path / "c.tif", [page()] * 3, loop=True)))


def test_tags_and_their_values_are_bounded(tmp_path: Path) -> None:
    """Of one directory, and of all together; values that many directories share count every time."""
    many = [(1000 + n, 3, 1, 0) for n in range(4097)]
    with soon(), pytest.raises(SlideDamaged, match="claims 4107 tags, where 1 to 4096"):
        open_slide(str(write(tmp_path / "a.tif", [[*page(), *many]])))
    with soon(), pytest.raises(NotASlide, match="more than 65536 tags"):
        open_slide(str(write(tmp_path / "b.tif", [page(), *[many[:4000]] * 17])))
    wide = [(tag, 3, 32_000, bytes(64_000)) for tag in (254, 258, 277, 339)]
    with soon(), pytest.raises(NotASlide, match="more than 67108864 bytes"):
        open_slide(str(write(tmp_path / "c.tif", [page(), *[[*page()[:2], *wide]] * 300])))


def test_tiles_are_bounded(tmp_path: Path) -> None:
    """A table of nine million is not read; the file is mostly a hole."""
    path = write(tmp_path / "a.tif", [page()])
    data = bytearray(path.read_bytes())
    for tag in (324, 325):
        at = data.index(struct.pack("<HHI", tag, 4, 16))
        struct.pack_into("<II", data, at + 4, 9_000_000, 8)
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(40_000_000)
    with soon(), pytest.raises(NotASlide, match="image of 9000000 tiles or strips; at most 8388608"):
        open_slide(str(path))


@pytest.mark.parametrize(("side", "tile"), [(1 << 24, 1 << 14), (1 << 19, 1 << 13)])
def test_sizes_that_nobody_could_read_through_are_refused(tmp_path: Path, side: int, tile: int) -> None:
    """Though all is left out, a picture of the slide would average every pixel of it."""
    path = write(tmp_path / "a.tif", [page(side, tile, stored=False)])
    with (
        soon(),
        pytest.raises(NotASlide, match=rf"claims {side} x {side} px.*at most 1099511627776 and 4294967296 px"),
    ):
        open_slide(str(path))


def test_a_level_that_leaves_everything_out_does_not_help(tmp_path: Path) -> None:
    """It is read from the finer one."""
    levels = [page(1 << 19, 1 << 13, stored=False), [*page(1 << 12, 1 << 10, stored=False), (254, 4, 1, 1)]]
    with soon(), pytest.raises(NotASlide, match=r"would read 2\.75e\+11 of them"):
        open_slide(str(write(tmp_path / "a.tif", levels)))


def test_a_large_sparse_slide_is_read(tmp_path: Path) -> None:
    """Within the bound: 8,000 px each way, most of it left out."""
    with soon(), open_slide(str(write(tmp_path / "a.tif", [page(8_000, 256, stored=False)]))) as slide:
        assert slide.thumbnail(100).min() == 255
        assert len(slide.reader.read(Block(0, 0, 50, 50, 160.0, 160.0)).failed) == 0


def test_pages_that_only_their_size_speaks_for_are_compared_up_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of them would each be decoded."""
    asked = []
    monkeypatch.setattr(verify, "_same_picture", lambda *planes: asked.append(planes) is not None)
    path = write(tmp_path / "a.tif", [page(640), *(page(16 * n) for n in range(39, 5, -1))])
    with soon(), open_slide(str(path)) as slide:
        assert len(slide.info.levels) == 1
    assert len(asked) == 16
