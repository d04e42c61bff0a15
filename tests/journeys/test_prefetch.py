"""`run` over a slide far away: what is fetched ahead of its units, and that it changes nothing but the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import wsi_mmm
from helpers.faulty import Faulty
from wsi_mmm.errors import StorageError
from wsi_mmm.slides.base import Fetched
from wsi_mmm.slides.tiff.reader import TiffReader
from wsi_mmm.types import Tiles

OPTIONS: dict[str, Any] = {
    "tasks": ["stain"], "mpp": 1.0, "tile_size": 128, "overlap": 16, "block_tiles": 1, "min_tissue": 0.0
}  # fmt: skip
UNITS = 7 * 5


class Watched:
    """In place of TiffReader.fetch: counts the fetches of the prefetch, how many are under way, and tiles by place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.whole, self.fails, self.lock = TiffReader.fetch, fails, threading.Lock()
        self.now = self.most = self.fetches = 0
        self.blocks = 0
        monkeypatch.setattr("wsi_mmm.tiles.stream.FETCH_PIXELS", 8 * 4 * 128 * 128)
        monkeypatch.setattr(TiffReader, "fetch", lambda reader, tiles: self.fetch(reader, tiles))

    def fetch(self, reader: TiffReader, tiles: Sequence[Tiles]) -> Fetched:
        if not threading.current_thread().name.startswith("wsi-mmm-fetch"):
            return self.whole(reader, tiles)
        with self.lock:
            self.fetches, self.blocks, self.now = self.fetches + 1, self.blocks + len(tiles), self.now + 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        try:
            if self.fails:
                raise StorageError("the cable was pulled")
            return self.whole(reader, tiles)
        finally:
            with self.lock:
                self.now -= 1


def objects(folder: Path) -> bytes:
    return next(folder.rglob("result.geojson.gz")).read_bytes()


@pytest.fixture(scope="module")
def wanted(tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The objects of a run from disk, which fetches nothing ahead."""
    folder = tmp_path_factory.mktemp("near")
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(patch)
        wsi_mmm.run(tiny_slide, output=folder, **OPTIONS)
    assert watched.fetches == 0
    return objects(folder)


@pytest.mark.parametrize("fails", [False, True])
def test_a_far_slide_is_fetched_ahead_and_gives_the_same_objects(
    tiny_slide: Path, wanted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Several fetches are under way at once, each block is in one of them; when they fail, units read by themselves."""
    watched = Watched(monkeypatch, fails)
    with Faulty(files={"/tiny.tiff": tiny_slide}, delay=0.005) as web:
        [row] = wsi_mmm.run(f"{web.url}/tiny.tiff", output=tmp_path, **OPTIONS).slides
    assert row.status == "done", row.error
    assert objects(tmp_path) == wanted
    assert 1 < watched.most <= 3 and watched.fetches < watched.blocks == UNITS
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("wsi-mmm-fetch")]


def test_blocks_in_the_cache_are_not_fetched_ahead(
    tiny_slide: Path, wanted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run finds the values of all blocks: it fetches none of their tiles."""
    options = {**OPTIONS, "cache": tmp_path / "cache", "cache_tiles": "off"}
    watched = Watched(monkeypatch)
    with Faulty(files={"/tiny.tiff": tiny_slide}) as web:
        wsi_mmm.run(f"{web.url}/tiny.tiff", output=tmp_path / "one", **options)
        assert watched.blocks == UNITS
        [row] = wsi_mmm.run(f"{web.url}/tiny.tiff", output=tmp_path / "two", **options).slides
    assert row.cache_hits == row.tiles and watched.blocks == UNITS
    assert objects(tmp_path / "two") == wanted


def test_tiles_that_the_cache_keeps_are_fetched_once(
    tiny_slide: Path, wanted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --cache-tiles on, a run of another kind brings no tile of the slide again."""
    watched = Watched(monkeypatch)
    options = {**OPTIONS, "cache": tmp_path / "cache", "cache_tiles": "on"}
    with Faulty(files={"/tiny.tiff": tiny_slide}) as web:
        wsi_mmm.run(f"{web.url}/tiny.tiff", output=tmp_path / "one", **options)
        blocks = watched.blocks
        assert blocks and objects(tmp_path / "one") == wanted
        wsi_mmm.run(f"{web.url}/tiny.tiff", output=tmp_path / "two", **{**options, "force": True})
    assert watched.blocks == blocks and objects(tmp_path / "two") == wanted
