"""Tiles that training reads: those of a run, through the same cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from wsi_mmm.slides import Slide
from wsi_mmm.slides.base import Fetched
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.training import sources
from wsi_mmm.training.sources import SlideSource, load_tiles
from wsi_mmm.types import I64, U8, Block, Tiles


class Costly(ArrayReader):
    """A reader that takes 10 ms a tile, as JPEG 2000 does, and counts what it decodes."""

    remote = False
    decoded = 0

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        return Fetched(0, {})

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        for (x, y), target in zip(tiles.xy.tolist(), out, strict=True):
            until = time.thread_time() + 0.01 * (tiles.size / 256) ** 2
            while time.thread_time() < until:
                pass
            Costly.decoded += 1
            target[...] = self.read(Block(x, y, tiles.size, tiles.size, 1.0, 1.0)).pixels
        return np.zeros((0, 4), np.int64)


def test_training_shares_the_tile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A costly slide read again decodes nothing; tiles are the same bytes with and without a cache."""
    picture = np.random.default_rng(0).integers(60, 200, (1500, 1100, 3), dtype=np.uint8)
    monkeypatch.setattr(sources, "open_slide", lambda path, mpp: Slide(Costly(picture), mpp))
    wanted = [SlideSource("a", "HE", 12, 0.5)]

    def load(cache: str | None) -> list[U8]:
        return [t.pixels for t in load_tiles(wanted, ["HE"], mpp=0.5, size=256, seed=1, cache=cache)]

    plain, first = load(None), load(str(tmp_path))
    Costly.decoded = 0
    second = load(str(tmp_path))
    assert Costly.decoded == 0
    assert len(plain) == 12
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(plain, first, second, strict=True))
    places = {picture[y : y + 256, x : x + 256].tobytes() for y in range(0, 1024, 256) for x in range(0, 1024, 256)}
    assert len({one.tobytes() for one in plain} & places) > 0
