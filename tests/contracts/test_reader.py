"""What every Reader holds: one suite for the array fake, the TIFF reader, OpenSlide, tiffslide, a slide service and
the App API of the EMPAIA platform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.area import area_average
from helpers.empaia_platform import FakePlatform, served
from helpers.wsi_service import FakeService, described
from wsi_mmm.slides.base import Reader, Slide, TileReader
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.slides.registry import READERS
from wsi_mmm.slides.service.app_api import open_app_slide
from wsi_mmm.tiles.stream import read_tiles
from wsi_mmm.types import U8, Block, Tiles

Open = Callable[[], Reader]
NAMES = ("array", "tiff", "openslide", "tiffslide", "wsi-service", "app-api")


@pytest.fixture(scope="module")
def top(tiny_slide: Path) -> U8:
    """Level 0 of the slide as the TIFF reader decodes it."""
    reader = READERS["tiff"](str(tiny_slide))
    pixels = reader.read(Block(0, 0, 1536, 1152, 1.0, 1.0)).pixels
    reader.close()
    return pixels


@pytest.fixture(scope="module")
def service(tiny_slide: Path) -> Iterator[str]:
    """The slide behind a service; yields its address there."""
    with Slide(READERS["openslide"](str(tiny_slide))) as slide, FakeService({"tiny": slide}) as web:
        yield f"{web.url}/v3/slides/tiny"


@pytest.fixture(scope="module")
def job(tiny_slide: Path) -> Iterator[str]:
    """The slide as the input of a job whose variables are set; yields its address there."""
    with Slide(READERS["openslide"](str(tiny_slide))) as slide, pytest.MonkeyPatch.context() as patch:
        made = FakePlatform(inputs={"slide": described(slide, "tiny")}, slides={"tiny": slide})
        with served(made) as platform:
            for name, value in (("APP_API", made.job.api), ("JOB_ID", made.job.id), ("TOKEN", made.job.token)):
                patch.setenv(f"EMPAIA_{name}", value)
            yield f"empaia://{platform.job.id}/slide"


@pytest.fixture(params=NAMES)
def reader(request: pytest.FixtureRequest, tiny_slide: Path, top: U8, service: str, job: str) -> Iterator[Reader]:
    """Each adapter, open on the same picture."""
    if request.param == "app-api":
        opened: Reader = open_app_slide(job)
        yield opened
        opened.close()
        return
    where = service if request.param == "wsi-service" else str(tiny_slide)
    opened = ArrayReader(top) if request.param == "array" else READERS[request.param](where)
    yield opened
    opened.close()


def test_info_says_size_levels_resolution_and_fingerprint(reader: Reader) -> None:
    """Levels start with level 0, downsamples are ratios of sizes, mpp is in micrometres."""
    info = reader.info
    assert (info.width, info.height) == (1536, 1152)
    assert (info.levels[0].width, info.levels[0].height, info.levels[0].downsample_x) == (1536, 1152, 1.0)
    for level in info.levels:
        assert level.downsample_x == info.width / level.width
        assert level.downsample_y == info.height / level.height
        assert level.tile_width > 0
        assert level.tile_height > 0
    assert info.mpp_x == pytest.approx(0.5, rel=1e-6)
    assert info.mpp_y == pytest.approx(0.5, rel=1e-6)
    assert len(info.fingerprint) == 32
    int(info.fingerprint, 16)


def test_level_0_is_returned_pixel_for_pixel(reader: Reader, top: U8) -> None:
    """Any rectangle of level 0 equals the decoded picture, white around it."""
    for x, y, width, height in [(0, 0, 1536, 1152), (255, 257, 300, 2), (-20, -10, 50, 40), (1500, 1140, 100, 60)]:
        canvas = reader.read(Block(x, y, width, height, 1.0, 1.0))
        want = np.full((height, width, 3), 255, np.uint8)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, 1536), min(y + height, 1152)
        want[y0 - y : y1 - y, x0 - x : x1 - x] = top[y0:y1, x0:x1]
        assert np.array_equal(canvas.pixels, want)
        assert canvas.pixels.dtype == np.uint8
        assert canvas.failed.shape == (0, 4)


@pytest.mark.parametrize("scale", [1.7, 1.9011, 2.0, 3.3, 4.0, 7.9])
def test_other_scales_are_the_area_average_within_two_grey_levels(reader: Reader, top: U8, scale: float) -> None:
    """At any scale below the thumbnails' the mean difference to averaging level 0 is small."""
    width, height = int(1500 / scale), int(1100 / scale)
    got = reader.read(Block(0, 0, width, height, scale, scale)).pixels
    want = area_average(top, (height, width), (scale, scale), (0, 0))
    assert np.abs(got - want).mean() < 2


@pytest.mark.parametrize("scale", [1.0, 1.9011, 2.0, 4.0, 11.3, 0.7])
def test_a_pixel_is_the_same_in_every_block(reader: Reader, scale: float) -> None:
    """Blocks cut the plane anyhow: the bits stay, also when read in another order by several threads."""
    width, height = min(700, int(1600 / scale)), min(600, int(1200 / scale))
    whole = reader.read(Block(0, 0, width, height, scale, scale)).pixels
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(12):
        x, y = int(rng.integers(0, width - 1)), int(rng.integers(0, height - 1))
        w, h = int(rng.integers(1, width - x + 1)), int(rng.integers(1, height - y + 1))
        blocks.append(Block(x, y, w, h, scale, scale))
    with ThreadPoolExecutor(3) as pool:
        for block, canvas in zip(blocks, pool.map(reader.read, blocks), strict=True):
            part = whole[block.y : block.y + block.height, block.x : block.x + block.width]
            assert np.array_equal(canvas.pixels, part)


def test_far_outside_is_white_and_costs_nothing(reader: Reader) -> None:
    """A block beyond the slide is white; nothing is decoded for it."""
    before = reader.stats().tiles_decoded
    for scale in (1.0, 3.7, 0.5):
        assert (reader.read(Block(10**6, -(10**6), 40, 30, scale, scale)).pixels == 255).all()
    assert reader.stats().tiles_decoded == before


def test_native_tiles_are_decoded_once_while_memory_lasts(reader: Reader) -> None:
    """Two threads reading overlapping blocks decode no tile twice."""
    blocks = [Block(x, y, 400, 400, 1.0, 1.0) for y in range(0, 900, 100) for x in range(0, 1200, 100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(reader.read, blocks))
    assert reader.stats().tiles_decoded <= 6 * 5


@pytest.mark.parametrize("scale", [1.0, 1.9011, 4.0])
def test_tiles_are_those_of_blocks_whether_fetched_before_or_not(reader: Reader, scale: float) -> None:
    """Read together, one by one, and from bytes that were fetched for all: the same pixels; nothing is fetched anew."""
    side = np.arange(0, int(1100 / scale), 130)
    tiles = Tiles(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), 150, scale, scale, 20)
    ahead = None
    if isinstance(reader, TileReader):
        fetched = reader.fetch([replace(tiles, xy=tiles.xy[:7]), replace(tiles, xy=tiles.xy[7:])])
        before = reader.stats().bytes_read
        ahead, failed = read_tiles(reader, tiles, fetched)
        assert reader.stats().bytes_read == before and not failed.any()
    want = [reader.read(Block(x, y, 150, 150, scale, scale)).pixels for x, y in tiles.xy.tolist()]
    assert np.array_equal(read_tiles(reader, tiles)[0], want)
    assert ahead is None or np.array_equal(ahead, want)


def test_thumbnail_and_region_of_a_slide(reader: Reader, top: U8) -> None:
    """The Slide around any reader gives regions at an mpp and a thumbnail of the whole."""
    slide = Slide(reader)
    assert slide.thumbnail(300).shape == (225, 300, 3)
    assert abs(float(slide.thumbnail(300).mean()) - float(top.mean())) < 2
    region = slide.read_region(100, 120, 64, 48, 1.0)
    want = area_average(top, (48, 64), (2, 2), (120, 100))
    assert np.abs(region - want).mean() < 2


def test_statistics_never_go_back(reader: Reader) -> None:
    """Counters are cumulative."""
    first = reader.stats()
    reader.read(Block(0, 0, 600, 600, 1.0, 1.0))
    second = reader.stats()
    assert second.tiles_decoded >= first.tiles_decoded
    assert second.bytes_read >= first.bytes_read


def test_all_file_readers_give_the_same_fingerprint(tiny_slide: Path) -> None:
    """The name of a slide does not depend on who reads it."""
    readers = [READERS[name](str(tiny_slide)) for name in NAMES[1:4]]
    assert len({r.info.fingerprint for r in readers}) == 1
    assert [r.info.reader for r in readers] == list(NAMES[1:4])
    for opened in readers:
        opened.close()
