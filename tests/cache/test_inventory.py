"""Looking at a cache, and making it smaller, from Python and from the command line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from wsi_mmm.cache import ArraySpec, CachedReader, CacheEntry
from wsi_mmm.cache.inventory import DAY, clean, inventory
from wsi_mmm.cli.main import app
from wsi_mmm.errors import InputError
from wsi_mmm.slides.fake import ArrayReader
from wsi_mmm.types import Block

OLD, NEW = "0" * 32, "f" * 32
VALUES = ArraySpec("features", (8,), "float32")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Tiles and features of two slides, one of them untouched for ten days, beside a folder that is no slide's."""
    slide = ArrayReader(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8))
    for name in (OLD, NEW):
        CachedReader(slide, str(tmp_path / name / "pixels/1-1"), 1.0, 1.0).read(Block(0, 0, 300, 300, 1.0, 1.0))
        CacheEntry(str(tmp_path / name / "abc"), 4, 4, 4).write_block(VALUES, np.array([[1, 1]]), np.ones((1, 8)))
    then = time.time() - 10 * DAY
    for path in (tmp_path / OLD).rglob("*"):
        os.utime(path, (then, then))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("x")
    return tmp_path


def test_what_a_cache_holds(cache: Path) -> None:
    """One row per slide: bytes of tiles and of values, and when it was last used."""
    rows = {row.slide: row for row in inventory(str(cache))}
    assert set(rows) == {OLD, NEW}
    assert all(row.tiles > 270_000 and 0 < row.values < 5000 for row in rows.values())
    assert rows[NEW].used - rows[OLD].used > 9 * DAY


def test_cleaning_takes_old_tiles_and_leaves_features(cache: Path) -> None:
    """Only tiles, only those that were not used for long; what is freed is what is gone."""
    before = {row.slide: row for row in inventory(str(cache))}
    freed = clean(str(cache), older_than=5)
    after = {row.slide: row for row in inventory(str(cache))}
    assert freed == before[OLD].tiles - after[OLD].tiles > 270_000
    assert after[NEW] == before[NEW]
    assert after[OLD].values == before[OLD].values


def test_cleaning_everything_leaves_what_is_not_the_caches(cache: Path) -> None:
    """Slides go as a whole; a folder that is no slide's stays."""
    assert clean(str(cache), older_than=5, values=True) > 0
    assert [row.slide for row in inventory(str(cache))] == [NEW]
    clean(str(cache), values=True)
    assert inventory(str(cache)) == []
    assert (cache / "notes/mine.txt").exists()


def test_a_cleaned_slide_is_read_again(cache: Path) -> None:
    """A reader that is open while its tiles are removed reads them from the slide."""
    slide = ArrayReader(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8))
    reader = CachedReader(slide, str(cache / NEW / "pixels/1-1"), 1.0, 1.0)
    block = Block(0, 0, 300, 300, 1.0, 1.0)
    want = reader.read(block).pixels
    clean(str(cache), values=True)
    assert np.array_equal(reader.read(block).pixels, want)
    assert np.array_equal(want, slide.read(block).pixels)


def test_the_commands(cache: Path) -> None:
    """`cache info` and `cache clean` say the same as Python, for people and as JSON."""
    invoke = CliRunner().invoke
    rows = [json.loads(line) for line in invoke(app, ["cache", "info", str(cache), "--json"]).stdout.splitlines()]
    assert {row["slide"] for row in rows} == {OLD, NEW}
    assert "2 slides, " in invoke(app, ["cache", "info", str(cache)]).stdout
    assert "KB in " in invoke(app, ["cache", "clean", str(cache), "--older-than", "5"]).stdout
    assert json.loads(invoke(app, ["cache", "clean", str(cache), "--json"]).stdout)["freed"] > 270_000


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    """A bucket and a missing folder are errors that name the way."""
    with pytest.raises(InputError, match="tools of the bucket"):
        inventory("s3://bucket/cache")
    with pytest.raises(InputError, match="--cache"):
        clean(str(tmp_path / "none"))
