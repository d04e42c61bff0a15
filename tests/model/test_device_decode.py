"""Decoding on the model's device: the reader's pixels, its edges and its failures, here with the CPU's decoder."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.model.device_decode import Codec, DeviceDecoder, ability, averaged, torchvision_codec
from wsi_mmm.slides.base import EncodedReader
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.slides.registry import READERS
from wsi_mmm.slides.resample.scaled import sources_of
from wsi_mmm.slides.resample.weights import Weights, averages, taps
from wsi_mmm.slides.tiff.encoded import COARSEST
from wsi_mmm.slides.tiff.reader import TiffReader
from wsi_mmm.types import I64, U8, Tiles

if TYPE_CHECKING:
    from conftest import RealData

CPU = torch.device("cpu")
CASES = [
    (1.0, 256, 256),  # native tiles themselves
    (1.0, 200, 180),  # cut from them
    (2.0, 256, 256),
    (1.9011, 224, 192),
    (3.0, 128, 96),
    (COARSEST, 64, 64),
]


def a_reader(path: Path, *, exact: bool = False) -> TiffReader:
    """The TIFF reader; ``exact``: one that averages full pixels where its codec would decode to 1/2, 1/4 or 1/8."""
    reader = READERS["tiff"](str(path))
    assert isinstance(reader, TiffReader)
    if exact:
        reader._sources = sources_of(reader.info.levels)
    return reader


def everywhere(reader: TiffReader, scale: float, size: int, stride: int, share: float = 0.67) -> Tiles:
    """Two tiles in three of a grid that reaches beyond the slide, always the same ones."""
    columns, rows = int(reader.info.width / scale / stride) + 1, int(reader.info.height / scale / stride) + 1
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2) * stride
    chosen = grid[np.random.default_rng(1).random(len(grid)) < share]
    return Tiles(chosen.astype(np.int64), size, scale, scale, size - stride)


def by_reader(reader: TiffReader, tiles: Tiles) -> tuple[U8, I64]:
    """The tiles and failures that the reader itself gives."""
    out = np.full((len(tiles.xy), tiles.size, tiles.size, 3), 7, np.uint8)
    return out, reader.read_tiles(tiles, list(out))


@pytest.mark.parametrize(("scale", "size", "stride"), CASES)
def test_decoded_tiles_are_the_readers_to_the_bit(tiny_slide: Path, scale: float, size: int, stride: int) -> None:
    """Whole, cut, overlapping, averaged, at the slide's edge and beyond it."""
    reader = a_reader(tiny_slide)
    tiles = everywhere(reader, scale, size, stride)
    assert not reader.obstacle(tiles)
    got = DeviceDecoder(CPU).decode(reader.read_encoded(tiles))
    want, failed = by_reader(a_reader(tiny_slide, exact=True), tiles)
    assert not len(failed) and not len(got.failed)
    assert np.array_equal(got.pixels.numpy(), want)


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_the_codecs_own_reduction_lies_near(tiny_slide: Path, scale: float) -> None:
    """Where the reader lets its codec decode to 1/2 or 1/4, the mean difference is below one grey level."""
    reader = a_reader(tiny_slide)
    tiles = everywhere(reader, scale, 128, 128)
    got = DeviceDecoder(CPU).decode(reader.read_encoded(tiles)).pixels.numpy()
    want, _ = by_reader(reader, tiles)
    assert 0 < np.abs(got.astype(int) - want).mean() < 1


def overwritten(slide: Path, folder: Path, number: int, data: bytes, *, skip: int = 0) -> Path:
    """A copy of a slide whose level-0 tile ``number`` holds ``data`` from byte ``skip`` on; its length stays."""
    reader, path = a_reader(slide), folder / f"{number}.tiff"
    at, length = int(reader._offsets[0][number]), int(reader._counts[0][number])
    content = bytearray(slide.read_bytes())
    content[at + skip : at + length] = (data + bytes(length))[: length - skip]
    path.write_bytes(content)
    return path


def recoded(reader: TiffReader, number: int, **how: object) -> bytes:
    """Another JPEG of a native tile."""
    (raw,) = reader._bytes(0, [number])
    buffer = io.BytesIO()
    Image.open(io.BytesIO(bytes(raw))).save(buffer, "JPEG", **how)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).bytes(9000)


@pytest.mark.parametrize("scale", [1.0, 1.9011, 2.0])
@pytest.mark.parametrize(
    ("data", "skip"), [(NOISE, 700), (b"\xff\xd8", 0), (b"no jpeg", 0), (b"", 0)],
    ids=["entropy noise", "header only", "other bytes", "zeros"],
)  # fmt: skip
def test_damage_is_white_and_listed_as_the_reader_does(
    tiny_slide: Path, tmp_path: Path, data: bytes, skip: int, scale: float
) -> None:
    """Also noise within the coded data, which the device's decoder passes over without a word."""
    path = overwritten(tiny_slide, tmp_path, 8, data, skip=skip)
    reader = a_reader(path)
    tiles = everywhere(reader, scale, 256, 256, share=1.0)
    encoded = reader.read_encoded(tiles)
    want, failed = by_reader(a_reader(path, exact=True), tiles)
    assert encoded.failed.tolist() == failed.tolist() == [[512, 256, 768, 512]]
    got = DeviceDecoder(CPU).decode(encoded)
    assert not len(got.failed)
    assert np.array_equal(got.pixels.numpy(), want)


def test_a_tile_that_the_file_leaves_out_is_white_and_no_failure(tiny_slide: Path, tmp_path: Path) -> None:
    """As the reader has it."""
    reader = a_reader(tiny_slide)
    reader._counts[0][8] = 0
    exact = a_reader(tiny_slide, exact=True)
    exact._counts[0][8] = 0
    tiles = everywhere(reader, 1.9011, 224, 192, share=1.0)
    encoded = reader.read_encoded(tiles)
    want, failed = by_reader(exact, tiles)
    assert not len(encoded.failed) and not len(failed)
    assert np.array_equal(DeviceDecoder(CPU).decode(encoded).pixels.numpy(), want)


@pytest.mark.parametrize("how", [{"progressive": True, "quality": 30}, {"quality": 30, "keep_rgb": True}], ids=str)
def test_odd_tiles_among_others_go_as_pixels(tiny_slide: Path, tmp_path: Path, how: dict[str, object]) -> None:
    """A progressive tile, or one stored as RGB: the reader's codec decodes it, to the reader's own tiles."""
    odd = recoded(a_reader(tiny_slide), 8, **how)
    path = overwritten(tiny_slide, tmp_path, 8, odd)
    reader = a_reader(path)
    tiles = everywhere(reader, 1.9011, 224, 192, share=1.0)
    encoded = reader.read_encoded(tiles)
    assert sum(isinstance(native, np.ndarray) for native in encoded.natives) == 1
    want, failed = by_reader(a_reader(path, exact=True), tiles)
    assert not len(encoded.failed) and not len(failed)
    assert np.array_equal(DeviceDecoder(CPU).decode(encoded).pixels.numpy(), want)


def test_shared_tables_are_put_into_every_stream(real_data: RealData) -> None:
    """A slide whose tables stand once in the file; its tiles are RGB, so it is not handed over as it is."""
    reader = a_reader(real_data.slide("cmu-1-small-region.svs"))
    tiles = Tiles(np.array([[240, 240]]), 240, 1.0, 1.0)
    assert reader.obstacle(tiles) == "its JPEG tiles are not stored as YCbCr"


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("jpeg2000", "compressed with JPEG 2000"),
        ("lzw", "compressed with LZW"),
        ("strips", "stored in strips"),
        ("rgb", "its JPEG tiles are not stored as YCbCr"),
    ],
)
def test_what_another_decoder_would_get_wrong_is_not_handed_over(tmp_path: Path, variant: str, why: str) -> None:
    """Said in words, for the whole slide."""
    path = tmp_path / f"{variant}.tiff"
    synthetic_slide(path, seed=1, width=300, height=260, nuclei=2, variant=variant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # strips are slow, which the reader says
        reader = a_reader(path)
    assert reader.obstacle(Tiles(np.zeros((1, 2), np.int64), 256, 1.0, 1.0)) == why


@pytest.mark.parametrize(
    ("scale", "size", "why"), [(0.9, 64, "finer"), (8.0, 64, "coarser"), (4.0, 2048, "tiles of 2048 px"), (4.0, 64, "")]
)
def test_scales_that_are_handed_over(tiny_slide: Path, scale: float, size: int, why: str) -> None:
    """From the slide's own pixels to a quarter, whatever the block."""
    found = a_reader(tiny_slide).obstacle(Tiles(np.zeros((1, 2), np.int64), size, scale, scale))
    assert found.startswith(why) if why else not found


def test_only_readers_of_native_tiles_hand_them_over(tiny_slide: Path) -> None:
    """The TIFF reader does; OpenSlide does not."""
    assert isinstance(READERS["tiff"](str(tiny_slide)), EncodedReader)
    assert not isinstance(READERS["openslide"](str(tiny_slide)), EncodedReader)


@pytest.mark.parametrize("scale", [1.0, 1.9011])
def test_small_canvases_and_small_groups_change_no_pixel(
    tiny_slide: Path, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by cutting the work, not the pictures."""
    reader = a_reader(tiny_slide)
    tiles = everywhere(reader, scale, 224, 192)
    whole = reader.read_encoded(tiles)
    want = DeviceDecoder(CPU).decode(whole).pixels
    monkeypatch.setattr("wsi_mmm.slides.tiff.encoded.CANVAS_PIXELS", 1 << 19)
    monkeypatch.setattr("wsi_mmm.model.device_decode.TOGETHER", 3)
    monkeypatch.setattr("wsi_mmm.model.device_decode.BAND_PIXELS", 1)
    small = reader.read_encoded(tiles)
    assert len(small.patches) > len(whole.patches)
    assert torch.equal(DeviceDecoder(CPU).decode(small).pixels, want)


# ---------------------------------------------------------------- a device that refuses


def refusing(refused: Callable[[Tensor], bool]) -> Codec:
    """The CPU's decoder, but all fails when one stream is ``refused``."""
    codec = torchvision_codec(CPU)

    def decode(inputs: list[Tensor]) -> list[Tensor]:
        if any(refused(stream) for stream in inputs):
            raise RuntimeError("refused")
        return codec(inputs)

    return decode


def test_what_the_device_refuses_the_cpu_decodes(tiny_slide: Path) -> None:
    """Tile by tile: no companion is lost."""
    reader = a_reader(tiny_slide)
    encoded = reader.read_encoded(everywhere(reader, 2.0, 256, 256))
    length = len(encoded.natives[5])
    got = DeviceDecoder(CPU, refusing(lambda stream: len(stream) == length)).decode(encoded)
    assert not len(got.failed)
    assert torch.equal(got.pixels, DeviceDecoder(CPU).decode(encoded).pixels)


def test_what_nobody_decodes_is_white_and_listed(tiny_slide: Path) -> None:
    """With its place on level 0."""
    reader = a_reader(tiny_slide)
    tiles = Tiles(np.array([[0, 0], [256, 0]]), 256, 1.0, 1.0)
    encoded = reader.read_encoded(tiles)
    broken = replace(encoded, natives=(encoded.natives[0], b"\xff\xd8 nothing"))
    got = DeviceDecoder(CPU).decode(broken)
    assert got.failed.tolist() == [[256, 0, 512, 256]]
    assert (got.pixels[1] == 255).all() and not (got.pixels[0] == 255).all()


def test_a_device_that_decodes_nothing_is_an_error(tiny_slide: Path) -> None:
    """Else the CPU would do all the work, and nobody would know."""
    reader = a_reader(tiny_slide)
    encoded = reader.read_encoded(Tiles(np.array([[0, 0], [256, 0]]), 256, 1.0, 1.0))
    with pytest.raises(ModelError, match="decodes none of 2 JPEG tiles; run with --decode cpu"):
        DeviceDecoder(CPU, refusing(lambda _: True)).decode(encoded)


def test_the_doctor_is_told_what_a_device_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """In words, whatever is missing."""
    assert ability(CPU) == "decodes JPEG"
    monkeypatch.setattr("wsi_mmm.model.device_decode.torchvision_codec", lambda device: refusing(lambda _: True))
    assert ability(CPU) == "decodes no JPEG (refused)"
    monkeypatch.setattr(
        "wsi_mmm.model.device_decode.torchvision_codec", lambda device: lambda _: [torch.zeros(3, 64, 64)]
    )
    assert "wrongly" in ability(CPU)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("scale", [1.0, 1.25, 1.9011, 2.0, 2.6, 4.0])
def test_averages_are_the_compiled_loops_to_the_bit(scale: float) -> None:
    """On noise, black and white."""
    numbers = np.random.default_rng(2)
    for picture in (numbers.integers(0, 256, (120, 150, 3), np.uint8), np.full((120, 150, 3), 255, np.uint8)):
        rows, columns = taps(3, 25, scale), taps(1, 30, scale)
        want = np.empty((25, 30, 3), np.uint8)
        window = picture[rows.first : rows.stop, columns.first : columns.stop]
        Weights(rows, columns).average(np.ascontiguousarray(window), rows.first, 0, 25, want)
        got = averaged(torch.from_numpy(picture), averages(rows, 0), averages(columns, 0))
        assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("name", ["crohn_HE4_1.21Gpx.svs", "metaplasia_HE.svs", "hpylori_giemsa.svs"])
@pytest.mark.parametrize(("scale", "size", "stride"), [(1.0, 256, 256), (1.9011, 224, 192), (2.0, 256, 256)])
def test_real_slides(real_data: RealData, name: str, scale: float, size: int, stride: int) -> None:
    """To the bit of the average of level 0; with the codec's own reduction to a half, one grey level on average."""
    reader = a_reader(real_data.slide(name))
    middle = np.array([reader.info.width, reader.info.height]) // 2 / scale // stride * stride
    tiles = Tiles((middle + np.argwhere(np.ones((3, 3))) * stride).astype(np.int64), size, scale, scale, size - stride)
    got = DeviceDecoder(CPU).decode(reader.read_encoded(tiles)).pixels.numpy()
    want, _ = by_reader(a_reader(real_data.slide(name), exact=True), tiles)
    assert np.array_equal(got, want)
    assert np.abs(got.astype(int) - by_reader(reader, tiles)[0]).mean() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("scale", "size", "stride"), CASES)
def test_a_gpus_tiles_lie_near(tiny_slide: Path, scale: float, size: int, stride: int) -> None:
    """nvJPEG enlarges halved chroma in its own way: on average less than three grey levels apart."""
    reader = a_reader(tiny_slide)
    encoded = reader.read_encoded(everywhere(reader, scale, size, stride))
    got = DeviceDecoder(torch.device("cuda")).decode(encoded)
    want = DeviceDecoder(CPU).decode(encoded).pixels.numpy()
    assert not len(got.failed)
    assert np.abs(got.pixels.cpu().numpy().astype(int) - want).mean() < 3
