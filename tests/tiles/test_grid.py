"""The target grid: arithmetic that must be exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_mmm.errors import MppUnknown, OptionError
from wsi_mmm.tiles.grid import blocks, make_grid, tile_boxes, tile_size_level0, tile_xy
from wsi_mmm.types import Grid, Level, SlideInfo


def info(width: int, height: int, mpp_x: float | None = 0.25, mpp_y: float | None = None) -> SlideInfo:
    level = Level(width, height, 1.0, 1.0, 256, 256)
    return SlideInfo("memory", width, height, mpp_x, mpp_y or mpp_x, (level,), "array", "array", "00")


@st.composite
def grids(draw: st.DrawFn) -> tuple[SlideInfo, Grid]:
    side, resolution = st.integers(1, 60_000), st.floats(0.1, 1.0)
    slide = info(draw(side), draw(side), draw(resolution), draw(resolution))
    tile = draw(st.integers(16, 1024))
    overlap = draw(st.integers(0, tile // 2))
    finest = max(slide.mpp_x or 0, slide.mpp_y or 0)
    return slide, make_grid(slide, finest * draw(st.floats(0.6, 40)), tile=tile, overlap=overlap)


def every_tile(grid: Grid) -> np.ndarray:
    return np.argwhere(np.ones((grid.rows, grid.columns), bool))


@given(grids())
def test_every_slide_pixel_lies_in_a_tile(made: tuple[SlideInfo, Grid]) -> None:
    slide, grid = made
    last = np.array([[grid.rows - 1, grid.columns - 1]])
    x1, y1 = tile_boxes(grid, last)[0, 2:]
    # Tiles leave no gap (the stride is at most the tile), so it is enough that the last reaches the far corner pixel.
    assert grid.stride <= grid.tile
    assert x1 > slide.width - 0.5
    assert y1 > slide.height - 0.5


@given(grids())
def test_no_tile_is_superfluous(made: tuple[SlideInfo, Grid]) -> None:
    slide, grid = made
    boxes = tile_boxes(grid, np.array([[grid.rows - 1, grid.columns - 1]]))
    assert boxes[0, 0] < slide.width
    assert boxes[0, 1] < slide.height
    assert grid.columns == 1 or (grid.columns - 2) * grid.stride + grid.tile < grid.width
    assert grid.rows == 1 or (grid.rows - 2) * grid.stride + grid.tile < grid.height


@given(grids())
def test_positions_rise_and_are_rounded_half_up(made: tuple[SlideInfo, Grid]) -> None:
    _, grid = made
    index = np.stack([np.arange(grid.rows).clip(max=grid.rows - 1), np.zeros(grid.rows, int)], axis=1)
    y = tile_xy(grid, index)[:, 1]
    assert y.dtype == np.int64
    assert (np.diff(y) >= 0).all()
    assert y.tolist() == [math.floor(k * grid.stride * grid.scale_y + 0.5) for k in range(grid.rows)]


def test_a_slide_smaller_than_a_tile_is_one_tile() -> None:
    """One padded tile covers a slide of 100 x 3 px."""
    grid = make_grid(info(100, 3), 0.25, tile=512)
    assert (grid.columns, grid.rows, grid.width, grid.height) == (1, 1, 100, 3)


def test_edge_tiles_are_kept() -> None:
    """1000 px in tiles of 256: the fourth tile reaches beyond the slide."""
    grid = make_grid(info(1000, 1024), 0.25, tile=256, overlap=0)
    assert (grid.columns, grid.rows) == (4, 4)
    assert make_grid(info(1025, 1), 0.25, tile=256, overlap=0).columns == 5


def test_a_scale_of_one_is_exact() -> None:
    """At the slide's own mpp target px are level-0 px, whatever the float."""
    grid = make_grid(info(4443, 3567, 0.2528), 0.2528, tile=256, overlap=32)
    assert (grid.width, grid.height, grid.scale_x) == (4443, 3567, 1.0)
    assert tile_xy(grid, np.array([[2, 3]])).tolist() == [[672, 448]]
    assert tile_size_level0(grid) == (256, 256)


def test_pixels_that_are_not_square_scale_each_axis_by_itself() -> None:
    """mpp 0.5 of a slide with 0.25 x 0.5 um pixels halves x only."""
    grid = make_grid(info(1000, 1000, 0.25, 0.5), 0.5, tile=100, overlap=0)
    assert (grid.width, grid.height) == (500, 1000)
    assert tile_xy(grid, np.array([[1, 1]])).tolist() == [[200, 100]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mpp": 0.0}, "mpp is 0"),
        ({"mpp": -1.0}, "mpp is -1"),
        ({"mpp": math.nan}, "mpp is nan"),
        ({"mpp": math.inf}, "mpp is inf"),
        ({"tile": 0}, "tile size is 0"),
        ({"tile": -5}, "tile size is -5"),
        ({"overlap": -1}, "overlap is -1"),
        ({"tile": 64, "overlap": 64}, "overlap is 64"),
        ({"mpp": 0.1}, "0.125 or more"),
        ({"mpp": 0.5, "tile": 1, "overlap": 0}, "too many"),
    ],
)
def test_nonsense_is_refused_in_one_line_that_names_it(options: dict[str, float], named: str) -> None:
    mpp = options.pop("mpp", 0.5)
    with pytest.raises(OptionError, match=named) as caught:
        make_grid(info(40_000, 30_000), mpp, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_slide_without_mpp_names_the_fix() -> None:
    """Resolution is never guessed."""
    with pytest.raises(MppUnknown, match=r"open_slide\(uri, mpp=0\.25\)"):
        make_grid(info(100, 100, None), 0.5)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_blocks_hold_each_selected_tile_once_in_order(rows: int, columns: int, size: int, random: object) -> None:
    grid = make_grid(info(columns * 10, rows * 10), 0.25, tile=10, overlap=0)
    index = every_tile(grid)
    chosen = index[np.random.default_rng(random.randrange(9999)).random(len(index)) < 0.5]  # type: ignore[attr-defined]
    shuffled = np.random.default_rng(1).permutation(chosen)
    made = blocks(grid, shuffled, size)
    assert [(b.row, b.col) for b in made] == sorted({(int(r) // size, int(c) // size) for r, c in chosen})
    for block in made:
        assert (block.index // size == [block.row, block.col]).all()
        assert block.index.tolist() == sorted(block.index.tolist())
    found = sorted(tile for block in made for tile in block.index.tolist())
    assert found == chosen.tolist()


def test_blocks_refuse_what_is_outside_the_grid() -> None:
    """A tile selected on another grid is no silent white tile."""
    grid = make_grid(info(100, 100), 0.25, tile=10, overlap=0)
    with pytest.raises(OptionError, match="outside"):
        blocks(grid, np.array([[0, 10]]), 4)
    with pytest.raises(OptionError, match="block_tiles"):
        blocks(grid, np.array([[0, 0]]), 0)
    assert blocks(grid, np.zeros((0, 2), np.int64), 4) == []
