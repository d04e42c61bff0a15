"""Shapes become px: px centres decide, squares put side by side are the raster of the whole, nothing vanishes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, Polygon, box

from conftest import RealData
from wsi_mmm.annotations import Dot, Shape, Shapes, parse_shapes
from wsi_mmm.training.data import raster
from wsi_mmm.training.data.raster import PixelGrids, ShapeIndex, index_shapes, packed_index, paint, pairs_of
from wsi_mmm.types import I32


def indexed(*geometries: Polygon | MultiPolygon) -> ShapeIndex:
    return index_shapes(Shapes(tuple(Shape(one) for one in geometries)))


def drawn(index: ShapeIndex, grids: PixelGrids) -> I32:
    """Number of the shape on top + 1."""
    every = np.ones(len(index), bool)
    pairs = pairs_of(index, grids, every, np.arange(len(index)))
    canvas = np.zeros((len(grids.xy), grids.side, grids.side), np.int32)
    paint(canvas, index, grids, pairs, pairs.shape.astype(np.int32) + 1)
    return canvas


def one_square(index: ShapeIndex, side: int, scale: float = 1.0, at: tuple[int, int] = (0, 0)) -> I32:
    return drawn(index, PixelGrids(np.array([at], np.int64), side, scale, scale))[0]


def star(seed: int, corners: int, middle: tuple[float, float], radius: float) -> Polygon:
    """A polygon without crossings, round about ``middle``."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    far = rng.uniform(0.3, 1.0, corners) * radius
    xy = np.stack([middle[0] + far * np.cos(angles), middle[1] + far * np.sin(angles)], axis=1)
    return shapely.make_valid(Polygon(xy))


stars = st.builds(
    star,
    st.integers(0, 2**31),
    st.integers(4, 24),
    st.tuples(st.floats(-10, 130), st.floats(-10, 130)),
    st.floats(5.0, 60),
).filter(lambda shape: shape.geom_type == "Polygon" and shape.area > 8)


@settings(max_examples=25)
@given(st.lists(stars, min_size=1, max_size=5), st.sampled_from([0.5, 1.0, 1.9011, 2.37]))
def test_a_px_belongs_to_the_topmost_shape_that_holds_its_centre(shapes: list[Polygon], scale: float) -> None:
    """The same answer as asking shapely about every px centre, but for centres within a billionth of an outline."""
    index = indexed(*shapes)
    side = 64
    found = one_square(index, side, scale)
    y, x = (np.mgrid[:side, :side] + 0.5) * scale
    wanted = np.zeros((side, side), np.int32)
    near = np.zeros((side, side), bool)
    for number, shape in enumerate(shapes):
        wanted[shapely.contains_xy(shape, x, y)] = number + 1
        near |= shapely.distance(shape.boundary, shapely.points(x, y)) < 1e-9
    specks = [i for i, shape in enumerate(shapes) if not shapely.contains_xy(shape, x, y).any()]
    rest = ~near & ~np.isin(found, np.array(specks) + 1)
    assert (found == wanted)[rest].all()


@settings(max_examples=25)
@given(st.lists(stars, min_size=1, max_size=6), st.sampled_from([0.731, 1.0, 1.9011]), st.integers(7, 50))
def test_squares_side_by_side_are_the_raster_of_the_whole(shapes: list[Polygon], scale: float, side: int) -> None:
    """Bit for bit, whatever their size, also left of and above the slide's corner."""
    index = indexed(*shapes)
    count = -(-150 // side)
    y, x = np.mgrid[:count, :count].reshape(2, -1) * side - 20
    tiles = drawn(index, PixelGrids(np.stack([x, y], axis=1), side, scale, scale))
    stitched = tiles.reshape(count, count, side, side).swapaxes(1, 2).reshape(count * side, -1)
    assert (stitched == one_square(index, count * side, scale, (-20, -20))).all()


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.3, 3.0))
def test_neighbours_that_share_an_edge_leave_no_px_and_take_none_twice(seed: int, scale: float) -> None:
    """Triangles that divide a square: every px centre in the square is in exactly one of them."""
    rng = np.random.default_rng(seed)
    middle = rng.uniform(10, 40, 2)
    corners = np.array([(0, 0), (50, 0), (50, 50), (0, 50), (0, 0)], float)
    parts = [Polygon([a, b, middle]) for a, b in pairwise(corners)]
    side = int(50 / scale)
    counts = sum((one_square(indexed(part), side, scale) > 0).astype(int) for part in parts)
    assert (counts == 1).all()


def test_holes_and_parts_are_kept() -> None:
    """A ring with a hole and an island: px of the hole are free, those of the island are set."""
    whole = MultiPolygon([box(0, 0, 30, 30) - box(10, 10, 20, 20), box(13, 13, 17, 17)])
    found = one_square(indexed(whole), 40)
    assert found[5, 5] == 1
    assert found[11, 11] == 0
    assert found[15, 15] == 1
    assert (found > 0).sum() == whole.area


def test_shapes_smaller_than_a_px_get_one_px_in_one_square() -> None:
    """A speck between px centres is drawn where its middle is; one that holds a centre gets no other px."""
    index = indexed(box(10.6, 4.6, 10.9, 4.9), box(20.4, 4.4, 20.6, 4.6))
    found = one_square(index, 32)
    assert np.argwhere(found == 1).tolist() == [[4, 10]]
    assert np.argwhere(found == 2).tolist() == [[4, 20]]
    both = drawn(index, PixelGrids(np.array([[0, 0], [10, 0], [11, 0]]), 11, 1.0, 1.0))
    assert [(grid == 1).sum() for grid in both] == [1, 1, 0]


def test_chunks_do_not_change_the_raster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on top stays on top when shapes are looked at a few at a time."""
    index = indexed(*(star(n, 12, (20 + 5 * n, 30), 25) for n in range(6)))
    grids = PixelGrids(np.array([[0, 0], [32, 0], [16, 16]]), 48, 1.0, 1.0)
    whole = drawn(index, grids)
    monkeypatch.setattr(raster, "_EDGES", 14)
    assert (drawn(index, grids) == whole).all()


def test_long_outlines_are_drawn_from_the_runs_at_the_height_of_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same px as from all their edges, far fewer of which are looked at."""
    shapes = [star(n, 900, (60.0 + 9 * n, 70.0), 70.0) for n in range(3)] + [box(20, 20, 30, 90)]
    y, x = np.mgrid[:12, :12].reshape(2, -1) * 12 - 6
    grids = PixelGrids(np.stack([x, y], axis=1).astype(np.int64), 12, 1.3, 1.3)
    whole = drawn(indexed(*shapes), grids)
    monkeypatch.setattr(raster, "_RUN", 16)
    monkeypatch.setattr(raster, "_LONG", 64)
    index = indexed(*shapes)
    assert np.array_equal(drawn(index, grids), whole)
    pairs = pairs_of(index, grids, np.ones(len(index), bool), np.arange(len(index)))
    edges, _ = raster._edges_near(index, grids, pairs)
    assert len(edges) < 0.5 * (index.start[pairs.shape + 1] - index.start[pairs.shape]).sum()


def test_coarse_px_measure_shares() -> None:
    """At 32 points a side the share of a tile that a shape covers is right to 2 %."""
    shape = star(3, 9, (130, 130), 90)
    for corner in ((50, 50), (93, 71)):
        grids = PixelGrids(np.array([corner]), 32, 1.0, 1.0, step=100 / 32)
        share = (drawn(indexed(shape), grids) > 0).mean()
        tile = box(*corner, corner[0] + 100, corner[1] + 100)
        assert abs(share - (shape & tile).area / tile.area) < 0.02


def test_points_become_discs_where_a_radius_is_given() -> None:
    """Of the radius asked for; without one they are left out."""
    shapes = Shapes((Shape(box(0, 0, 4, 4)),), 1, 0, (Dot(30.0, 20.0, "mitosis"),))
    index = index_shapes(shapes, dot_radius=(6.0, 3.0))
    assert index.names == (None, "mitosis")
    assert np.allclose(index.boxes, [[0, 0, 4, 4], [24, 17, 36, 23]])
    found = one_square(index, 48) == 2
    assert abs(found.sum() - np.pi * 18) < 4
    assert abs(index.areas[1] - np.pi * 18) < 1
    assert len(index_shapes(shapes)) == 1


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 300))
def test_the_index_finds_what_touches_and_nothing_else(seed: int, count: int) -> None:
    """Boxes of very different size: the same pairs as comparing all with all, by asked one."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 1000, (count, 2))
    boxes = np.concatenate([low, low + 10 ** rng.uniform(-1, 3, (count, 2))], axis=1)
    low = rng.uniform(-100, 1000, (20, 2))
    asked = np.concatenate([low, low + rng.uniform(1, 200, (20, 2))], axis=1)
    number, found = packed_index(boxes)(asked)
    hit = (asked[:, None, :2] <= boxes[None, :, 2:]) & (asked[:, None, 2:] >= boxes[None, :, :2])
    assert sorted(zip(number.tolist(), found.tolist(), strict=True)) == [
        tuple(p) for p in np.argwhere(hit.all(2)).tolist()
    ]
    assert (np.diff(number) >= 0).all()


def test_nothing_is_indexed_of_an_empty_file() -> None:
    """No shapes: squares stay empty."""
    assert not one_square(indexed(), 8).any()


def test_camelyon_regions_have_their_area(real_data: RealData) -> None:
    """Every region of a real file, drawn at 16 level-0 px, covers its area to 2 % or 30 px."""
    shapes = parse_shapes(real_data.file("annotations/camelyon16_tumor_009.xml").read_bytes(), "real")
    index = index_shapes(shapes)
    assert np.allclose(index.areas, [item.geometry.area for item in shapes])
    big = np.argsort(index.areas)[-5:]
    for i in big.tolist():
        x0, y0, x1, y1 = index.boxes[i] / 16
        side = int(max(x1 - x0, y1 - y0)) + 2
        grids = PixelGrids(np.array([[int(x0), int(y0)]]), side, 16.0, 16.0)
        pairs = pairs_of(index, grids, np.arange(len(index)) == i, np.arange(len(index)))
        canvas = np.zeros((1, side, side), bool)
        paint(canvas, index, grids, pairs, np.ones(len(pairs.shape), bool))
        assert abs(canvas.sum() - index.areas[i] / 256) < max(30, 0.02 * index.areas[i] / 256)
