"""The choice whether tiles are kept: measured, said in words, and followed by a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import wsi_mmm
from wsi_mmm.cache import CachedReader
from wsi_mmm.cache.inventory import stored_shards
from wsi_mmm.cache.slide_pool import TileCacheChoice, choose, pays
from wsi_mmm.errors import OptionError
from wsi_mmm.slides.base import Fetched
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.types import I64, U8, Block, Tiles

TILES = Tiles(np.array([[x, y] for y in (0, 256, 1024) for x in (0, 256, 512, 768)]), 256, 1.0, 1.0)


class Costly(ArrayReader):
    """A reader that takes ``cost`` seconds a tile."""

    cost = 0.02
    remote = False

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        return Fetched(0, {})

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        for (x, y), target in zip(tiles.xy.tolist(), out, strict=True):
            until = time.thread_time() + self.cost
            while time.thread_time() < until:
                pass
            target[...] = self.read(Block(x, y, tiles.size, tiles.size, 1.0, 1.0)).pixels
        return np.zeros((0, 4), np.int64)


def cached(cost: float, root: Path) -> CachedReader:
    slide = Costly(np.random.default_rng(0).integers(0, 255, (1500, 1100, 3), dtype=np.uint8))
    slide.cost = cost
    return CachedReader(slide, str(root / "slide/pixels/1-1"), 1.0, 1.0)


def test_what_is_costly_to_read_is_kept(tmp_path: Path) -> None:
    """20 ms a tile against well below one; the shards that were filled for the measurement stay."""
    choice = choose(cached(0.02, tmp_path), TILES)
    assert choice.use
    assert choice.read_ms > 20 > 10 * choice.cached_ms
    assert len(list(stored_shards(tmp_path))) == 2


def test_what_is_cheap_to_read_is_not_kept_and_leaves_nothing(tmp_path: Path) -> None:
    """A reader as fast as the cache: what the measurement filled is removed, what was there before stays."""
    quick = cached(0.0, tmp_path)
    quick.read(Block(0, 0, 256, 256, 1.0, 1.0))
    assert not choose(quick, TILES).use
    assert len(list(stored_shards(tmp_path))) == 1


@pytest.mark.parametrize(
    ("read_ms", "cached_ms", "use"),
    [(4.5, 0.2, True), (0.25, 0.1, False), (1.5, 0.1, False), (4.5, 3.0, False), (3.2, 0.2, True), (2.9, 0.2, False)],
)
def test_the_rule(read_ms: float, cached_ms: float, use: bool) -> None:
    """Twice as fast, and 15 ms for each MB on the disk (2.95 ms for a tile of 256 px)."""
    assert pays(read_ms, cached_ms, np.zeros((256, 256, 3), np.uint8)) is use


def test_the_choice_in_words() -> None:
    """Both figures, in milliseconds a tile."""
    assert TileCacheChoice(True, 31.02, 1.21).words == "tiles cached: reading costs 31 ms a tile, the cache 1.2"
    assert TileCacheChoice(False, 0.3, 0.1).words == "tiles not cached: reading costs 0.3 ms a tile, the cache 0.1"


def test_a_run_says_what_it_chose(tiny_slide: Path, tmp_path: Path) -> None:
    """A JPEG slide on a disk is not worth it by itself; `on` keeps its tiles, `off` measures nothing."""
    said: list[str] = []

    def run(name: str, **options: object) -> dict[str, object]:
        report = wsi_mmm.run(
            tiny_slide, output=tmp_path / name, cache=tmp_path / "cache", force=True,
            progress=lambda event: said.append(event.message), **options,
        )  # fmt: skip
        assert report.exit_code == 0
        return report.slides[0].extra

    words = run("auto")["tile_cache"]
    assert str(words).startswith("tiles not cached: reading costs ")
    assert words in said
    assert "tile_cache" not in run("off", cache_tiles="off")
    assert not list(stored_shards(tmp_path / "cache"))
    run("on", cache_tiles="on", cache_quota="1GB")
    assert list(stored_shards(tmp_path / "cache"))


def test_wrong_options_are_said_before_a_run(tiny_slide: Path, tmp_path: Path) -> None:
    """Each error names what to write instead."""
    for options, words in (
        ({"cache_tiles": "maybe"}, "auto, on or off"),
        ({"cache_tiles": "on"}, "--cache"),
        ({"cache": str(tmp_path), "cache_quota": "much"}, "such as 50GB"),
        ({"cache": "s3://bucket/cache", "cache_quota": "5GB"}, "lifecycle"),
    ):
        with pytest.raises(OptionError, match=words):
            wsi_mmm.run(tiny_slide, output=tmp_path / "out", **options)
