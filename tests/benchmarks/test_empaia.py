"""The benchmark of the EMPAIA app counts rightly, and sees what breaks a bar."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from benchmarks.empaia_tally import (
    MeasuredPlatform,
    Picture,
    Post,
    Window,
    asked,
    by_kind,
    covered,
    least,
    level_read,
    of_nuclei,
    on_level,
    parity,
    requests_for,
)
from empaia.test_posting import answer, published
from wsi_mmm.empaia.app import LIMITS
from wsi_mmm.empaia.client import AppApi
from wsi_mmm.empaia.posting import post_all
from wsi_mmm.model.card import read_card
from wsi_mmm.slides import fake, open_slide
from wsi_mmm.types import Level

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10]]


def shifted(by: int) -> list[list[int]]:
    return [[x + by, y] for x, y in SQUARE]


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("most", [10**9, 700, 1])
def test_every_px_of_boxes_is_covered_once(most: int) -> None:
    """Overlapping and distant ones, whatever a picture may hold; a picture is a row at least."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 60, (40, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 9, (40, 2))], axis=1)
    wanted, given = np.zeros((80, 80), int), np.zeros((80, 80), int)
    for x0, y0, x1, y1 in boxes:
        wanted[y0:y1, x0:x1] = 1
    windows = covered(boxes, most)
    for x, y, width, height in windows:
        given[y : y + height, x : x + width] += 1
    assert np.array_equal(given, wanted)
    assert all(one.pixels <= most or one.height == 1 for one in windows)


def test_a_row_of_overlapping_tiles_is_one_picture() -> None:
    """Nothing is cut that need not be."""
    row = np.array([[x, 0, x + 512, 512] for x in range(0, 4480, 448)])
    assert covered(row) == [Window(0, 0, 4032 + 512, 512)]


def test_boxes_on_a_level_are_whole_px_inside_of_it() -> None:
    """Every px that a box touches; nothing beyond the edge."""
    level = Level(100, 50, 4.0, 4.0, 256, 256)
    assert on_level(np.array([[-8, 2, 9, 300]]), level).tolist() == [[0, 0, 3, 50]]


def test_the_least_and_what_was_asked() -> None:
    """Calls of a megapixel each, and again for what had been given before; the level that most px are of is read."""
    one = Picture(0, Window(0, 0, 1000, 1000), "png", 500)
    other = Picture(2, Window(0, 0, 300, 300), "png", 90)
    found = asked([one, one, other])
    assert (found.calls, found.size, found.pixels, found.again) == (3, 1090, 2_090_000, 1)
    assert level_read([other, other, other, one]) == 0
    fewest = least([Window(0, 0, 1000, 2500), Window(0, 0, 500, 100)], [70, 30])
    assert (fewest.calls, fewest.size, fewest.pixels, fewest.fewest) == (3, 100, 2_550_000, 1)


def test_a_platform_writes_down_its_pictures(tmp_path: Any) -> None:
    """Level, place, format and bytes of regions and native tiles; not of what it refuses."""
    path = tmp_path / "slide.tiff"
    fake.synthetic_slide(path, width=700, height=600, nuclei=3)
    wsi = "b10648a7-340d-43fc-a2d9-4d91cc86f33f"

    async def ask(slide: Any) -> tuple[MeasuredPlatform, list[bytes]]:
        async with MeasuredPlatform(slides={wsi: slide}) as platform, AppApi(platform.job) as api:
            got = [await api.region(wsi, 0, (5, 6, 70, 80), kind="png"), await api.tile(wsi, 0, (1, 0))]
            with pytest.raises(Exception, match="422"):
                await api.region(wsi, 99, (0, 0, 1, 1))
            return platform, got

    with open_slide(str(path)) as slide:
        platform, got = asyncio.run(ask(slide))
        side = slide.info.levels[0].tile_width
    assert [one.size for one in platform.pictures] == [len(data) for data in got]
    assert [(one.window, one.format) for one in platform.pictures] == [
        (Window(5, 6, 70, 80), "png"),
        (Window(side, 0, side, slide.info.levels[0].tile_height), "jpeg"),
    ]


# ------------------------------------------------------------------------------------------------ posts


@pytest.mark.parametrize("forgets", [False, True])
def test_posts_by_kind_are_all_that_was_posted(tmp_path: Any, forgets: bool) -> None:
    """As many as the platform has seen, with as many bytes; nuclei are three collections and what fills them."""
    card = read_card("default")
    results = published(tmp_path, card, 300, **{f"stain:{name}": [0.25] * 2 for name in card.tasks[1].classes})

    async def send() -> MeasuredPlatform:
        async with MeasuredPlatform(lenient=True, forgets=forgets) as platform, AppApi(platform.job, LIMITS) as api:
            await post_all(api, answer(results, card), lambda share: None)
            return platform

    platform = asyncio.run(send())
    kinds = by_kind(platform.posted)
    assert set(kinds) == {"classes", "objects", "pixelmap", "primitives"}
    assert sum(calls for calls, _ in kinds.values()) == len(platform.log)
    assert sum(size for _, size in kinds.values()) == platform.received
    assert len(of_nuclei(platform.posted)) == 6
    assert sum(map(len, platform.items.values())) == (0 if forgets else 3 * 300 + 2 + 2)
    assert requests_for(300, platform.posted, 300, items=LIMITS.items, body=LIMITS.body) == 6


def test_requests_grow_with_bytes_and_with_number() -> None:
    """Objects of 2,000 bytes each do not fit where small ones do."""
    names = ("nuclei_objects", "nuclei_classes", "nuclei_confidences", "tissue")
    large = [Post(name, "", size) for name, size in zip(names, (20_000, 1000, 1000, 9**9), strict=True)]
    small = [Post(name, "", 1000) for name in names]
    assert requests_for(5000, small, 10, items=5000, body=4_000_000) == 6
    assert requests_for(5000, large, 10, items=5000, body=4_000_000) == 8
    assert requests_for(5001, small, 10, items=5000, body=4_000_000) == 9


# ------------------------------------------------------------------------------------------------ parity


def test_parity_needs_every_object_on_both_sides() -> None:
    """As often as the other has it; what lies near is called so."""
    assert parity([SQUARE, shifted(50)], [shifted(50), SQUARE]).holds
    assert not parity([SQUARE, shifted(50)], [shifted(50), SQUARE]).in_order
    assert not parity([SQUARE, SQUARE], [SQUARE, shifted(50)]).holds
    assert not parity([SQUARE], [SQUARE, SQUARE]).holds
    found = parity([SQUARE, shifted(50), shifted(99)], [SQUARE, shifted(51), shifted(200)])
    assert (found.alike, found.moved, found.holds) == (1, 1, False)
    assert parity([], []).holds
