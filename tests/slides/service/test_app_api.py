"""Slides of an EMPAIA job: lossless pictures hold what tiles need and little else, and its pixels are the slide's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from helpers.empaia_platform import FakePlatform, Fault, served
from helpers.wsi_service import described
from wsi_mmm.errors import StorageError
from wsi_mmm.slides import Slide, fake, open_slide
from wsi_mmm.slides.base import Fetched
from wsi_mmm.slides.service import reader
from wsi_mmm.slides.service.app_api import open_app_slide
from wsi_mmm.types import Block, Tiles

WSI_ID = "b10648a7-340d-43fc-a2d9-4d91cc86f33f"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    """A slide of 5 megapixels: too large for one picture."""
    path = tmp_path_factory.mktemp("slide") / "large.tiff"
    fake.synthetic_slide(path, width=2500, height=2000, nuclei=200)
    with open_slide(str(path)) as slide:
        yield slide


@pytest.fixture
def platform(stored: Slide, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePlatform]:
    """It says that the slide has that level only."""
    said = described(stored, WSI_ID)
    said |= {"levels": said["levels"][:1], "num_levels": 1}  # type: ignore[index]
    made = FakePlatform(inputs={"slide": said}, slides={WSI_ID: stored})
    with served(made):
        for name, value in (("APP_API", made.job.api), ("JOB_ID", made.job.id), ("TOKEN", made.job.token)):
            monkeypatch.setenv(f"EMPAIA_{name}", value)
        yield made


def opened(platform: FakePlatform, query: str = "") -> Any:
    return open_app_slide(f"empaia://{platform.job.id}/slide{query}")


def windows(platform: FakePlatform) -> list[list[int]]:
    """x, y, width, height of the regions asked for so far, in the order of the slide."""
    found = [line.split("/") for line in platform.log if "/regions/" in line]
    return sorted([int(one[6]), int(one[7]), int(one[9]), int(one[10])] for one in found)


# ------------------------------------------------------------------------------------------------ reading


def test_pixels_are_those_of_the_slide(stored: Slide, platform: FakePlatform) -> None:
    """In any block, also by several threads and at the edges of the slide."""
    reader = opened(platform)
    rng = np.random.default_rng(1)
    blocks = [
        Block(int(rng.integers(-50, 2300)), int(rng.integers(-50, 1900)), 300, 200, scale, scale)
        for scale in (1.0, 1.0, 1.3, 1.0, 1.7, 1.0, 1.0, 1.3)
    ]
    with ThreadPoolExecutor(3) as pool:
        for block, canvas in zip(blocks, pool.map(reader.read, blocks), strict=True):
            assert np.array_equal(canvas.pixels, stored.reader.read(block).pixels)
            assert canvas.failed.shape == (0, 4)


def test_only_what_lies_under_tiles_is_asked_for_and_once(platform: FakePlatform) -> None:
    """Two neighbouring blocks: a rectangle for the first, and what is new for the second."""
    reader = opened(platform)
    first = Tiles(np.array([[256, 256], [704, 256], [256, 704], [704, 704]]), 512, 1.0, 1.0, 64)
    reader.read_tiles(first, list(np.empty((4, 512, 512, 3), np.uint8)))
    assert windows(platform) == [[256, 256, 1024, 1024]]
    reader.read_tiles(first, list(np.empty((4, 512, 512, 3), np.uint8)))
    right = Tiles(np.array([[1152, 256]]), 512, 1.0, 1.0, 64)
    reader.read_tiles(right, list(np.empty((1, 512, 512, 3), np.uint8)))
    assert windows(platform) == [[256, 256, 1024, 1024], [1280, 256, 512, 512]]


def test_the_whole_slide_is_few_pictures(stored: Slide, platform: FakePlatform) -> None:
    """Each px once, and a small picture more for the fingerprint."""
    reader = opened(platform)
    assert len(reader.info.fingerprint) == 32
    assert windows(platform) == [[1250 - 128, 1000 - 128, 256, 256]]
    reader.read(Block(0, 0, 500, 400, 5.0, 5.0))
    given = windows(platform)
    assert len(given) == 1 + 2 and sum(width * height for *_, width, height in given) == 2500 * 2000 + 256**2


def test_jpeg_is_asked_for_on_a_fixed_grid(platform: FakePlatform) -> None:
    """Whatever block is read: where a lossy picture begins changes its pixels."""
    reader = opened(platform, "?image_format=jpeg")
    reader.read(Block(300, 300, 100, 100, 1.0, 1.0))
    assert windows(platform) == [[0, 0, 1024, 1024]]


def test_what_was_fetched_before_is_used(stored: Slide, platform: FakePlatform) -> None:
    """Bytes that are at hand are not asked for again; what is not among them is."""
    reader = opened(platform)
    tiles = Tiles(np.array([[256, 256]]), 256, 1.0, 1.0, 0)
    fetched = reader.fetch([tiles])
    assert len(fetched.data) == 1
    asked, out = len(platform.log), np.empty((2, 256, 256, 3), np.uint8)
    both = Tiles(np.array([[256, 256], [512, 256]]), 256, 1.0, 1.0, 0)
    reader.read_tiles(both, list(out), Fetched(fetched.level, fetched.data))
    assert windows(platform)[-1] == [512, 256, 256, 256] and len(platform.log) == asked + 1
    assert np.array_equal(out[0], stored.read_region(256, 256, 256, 256))


def test_a_damaged_picture_is_white_and_named(platform: FakePlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, and nothing beside it."""
    monkeypatch.setattr(reader, "decode_picture", lambda *_, **__: "damaged")
    canvas = opened(platform).read(Block(300, 300, 300, 300, 1.0, 1.0))
    assert (canvas.pixels == 255).all()
    x0, y0 = canvas.failed[:, :2].min(axis=0)
    x1, y1 = canvas.failed[:, 2:].max(axis=0)
    assert (x0, y0, x1, y1) == (256, 256, 768, 768)


def test_a_refusal_is_an_error(platform: FakePlatform) -> None:
    """Nothing is made up; the next attempt asks again."""
    platform.faults.append(Fault("/regions", 500))
    reader = opened(platform)
    with pytest.raises(StorageError):
        reader.read(Block(300, 300, 300, 300, 1.0, 1.0))
    assert reader.read(Block(300, 300, 300, 300, 1.0, 1.0)).failed.shape == (0, 4)
    reader.close()
    with pytest.raises(StorageError, match="closed"):
        reader.read(Block(900, 900, 100, 100, 1.0, 1.0))
