"""What a process keeps between works is bounded, however many slides it sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from wsi_mmm.engine.stages import context
from wsi_mmm.slides import open_slide
from wsi_mmm.tiles.grid import make_grid
from wsi_mmm.types import Grid


@pytest.fixture
def grid(tiny_slide: Path) -> Iterator[Grid]:
    """That of a small slide; nothing is kept before and after."""
    context.release()
    slide = open_slide(str(tiny_slide))
    yield make_grid(slide.info, 0.5, tile=256, overlap=0)
    slide.close()
    context.release()


def test_entries_of_slides_long_gone_are_let_go(grid: Grid, tmp_path: Path) -> None:
    """The latest ones stay, and one that is asked for again and again stays whatever comes between."""
    first = context.cache_entry(str(tmp_path / "first"), grid, 4)
    second = context.cache_entry(str(tmp_path / "second"), grid, 4)
    for number in range(2 * context.KEPT_ENTRIES):
        context.cache_entry(str(tmp_path / str(number)), grid, 4)
        assert context.cache_entry(str(tmp_path / "first"), grid, 4) is first
    assert len(context._entries) == context.KEPT_ENTRIES
    assert context.cache_entry(str(tmp_path / "second"), grid, 4) is not second


def test_what_is_forgotten_is_made_anew(grid: Grid, tmp_path: Path) -> None:
    """Entries below a folder that goes are not used again; those beside it are."""
    gone, kept = (context.cache_entry(str(tmp_path / name / "e"), grid, 4) for name in ("a", "b"))
    context.forget_entries(str(tmp_path / "a"))
    assert context.cache_entry(str(tmp_path / "a" / "e"), grid, 4) is not gone
    assert context.cache_entry(str(tmp_path / "b" / "e"), grid, 4) is kept
