"""Objects become boxes and instances, whole or cut by the rim, and tiles that cover them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Point, Polygon, box

from wsi_mmm.annotations import Shape, Shapes
from wsi_mmm.training.data.buckets import IGNORE, USE, Buckets, Rule
from wsi_mmm.training.data.objects import (
    common_objects,
    covering,
    drawn_places,
    middles,
    object_boxes,
    object_maps,
    rectangles,
)
from wsi_mmm.training.data.regions import SlideAnnotations, grid_places
from wsi_mmm.training.data.shapes_index import encode, index_shapes
from wsi_mmm.types import I64

TABLE = Buckets(("cell", "mitosis"), (Rule("mitosis", "M"), Rule("cell", "C"), Rule(IGNORE, "blur"), Rule(USE, "ROI")))


def annotated(
    *shapes: tuple[str, Polygon], scale: float = 1.0, complete: bool = True, side: int = 256
) -> SlideAnnotations:
    """A slide of ``side`` level-0 px."""
    index = index_shapes(Shapes(tuple(Shape(geometry, name) for name, geometry in shapes)))
    return SlideAnnotations(index, encode(index, TABLE), scale, scale, side / scale, side / scale, 2, -1, complete)


def at(*xy: tuple[int, int]) -> I64:
    return np.array(xy, np.int64).reshape(-1, 2)


def cells(count: int, seed: int = 0, side: int = 256) -> list[tuple[str, Polygon]]:
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, side, (count, 2))
    return [("M" if i % 5 == 0 else "C", Point(*p).buffer(rng.uniform(2, 7))) for i, p in enumerate(xy)]


def test_instances_keep_their_numbers_across_tiles() -> None:
    """Tiles put side by side are the map of the whole: an object at the seam has one number on both sides."""
    page = annotated(*cells(150))
    y, x = np.mgrid[:4, :4].reshape(2, -1) * 64
    tiles = object_maps(page, page.grids(np.stack([x, y], axis=1), 64))
    stitched = tiles.reshape(4, 4, 64, 64).swapaxes(1, 2).reshape(256, 256)
    whole = object_maps(page, page.grids(at((0, 0)), 256))[0]
    assert (stitched == whole).all()
    assert len(np.unique(whole)) > 120


def test_where_nobody_looked_there_is_no_background() -> None:
    """Outside use-regions, in ignore shapes, beyond the slide: -1; objects outside use-regions are not known either."""
    page = annotated(("ROI", box(0, 0, 100, 100)), ("C", box(10, 10, 20, 20)), ("C", box(150, 150, 160, 160)),
                 ("blur", box(50, 50, 60, 60)), complete=False)  # fmt: skip
    found = object_maps(page, page.grids(at((0, 0)), 300))[0]
    assert found[15, 15] == 2
    assert found[30, 30] == 0
    assert found[55, 55] == -1
    assert found[155, 155] == -1
    assert found[299, 299] == -1


def test_boxes_are_cut_at_the_rim_and_unknown_when_little_is_seen() -> None:
    """Half of an object is still one, a tenth of it is not learnt from; classes by the table."""
    page = annotated(("C", box(10, 10, 30, 30)), ("M", box(54, 10, 74, 30)), ("C", box(62, 40, 82, 60)))
    (found,) = object_boxes(page, page.grids(at((0, 0)), 64), 0.3)
    assert found.xyxy.tolist() == [[10, 10, 30, 30], [62, 40, 64, 60], [54, 10, 64, 30]]
    assert found.labels.tolist() == [0, -1, 1]
    assert (found.height, found.width) == (64, 64)
    assert found.xyxy.dtype == np.float32 and found.labels.dtype == np.int32


def test_unknown_area_is_given_as_boxes_labelled_unknown() -> None:
    """They cover all unknown px, and no object inside the use-region is lost."""
    page = annotated(("ROI", box(0, 0, 40, 64)), ("C", box(10, 10, 20, 20)), ("C", box(50, 10, 60, 20)), complete=False)
    (found,) = object_boxes(page, page.grids(at((0, 0)), 64), 0.3)
    known, unknown = found.xyxy[found.labels >= 0], found.xyxy[found.labels < 0]
    assert known.tolist() == [[10, 10, 20, 20]]
    assert [40, 0, 64, 64] in unknown.tolist()


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_rectangles_cover_a_mask_once(seed: int, share: float) -> None:
    """Every True cell in exactly one rectangle, no False cell in any."""
    mask = np.random.default_rng(seed).random((13, 17)) < share
    count = np.zeros(mask.shape, int)
    for x0, y0, x1, y1 in rectangles(mask).astype(int):
        count[y0:y1, x0:x1] += 1
    assert (count == mask).all()


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.3, 2.0]))
def test_every_object_is_in_a_tile(seed: int, scale: float) -> None:
    """Kept tiles of a grid hold the middle of every object, also where nobody declared the slide complete."""
    page = annotated(*cells(40, seed), scale=scale, complete=False)
    xy = grid_places(page, 48, 40)
    xy = xy[covering(page, xy, 48, 0.9)]
    middle = middles(page)
    on_slide = (middle >= 0).all(axis=1) & (middle < 256 / scale).all(axis=1)
    inside = ((middle[:, None] >= xy) & (middle[:, None] < xy + 48)).all(axis=2).any(axis=1)
    assert inside[on_slide].all()


def test_drawn_tiles_hold_their_object_and_every_class_comes_alike() -> None:
    """One in five cells divides; as many tiles are drawn for these. The same seed draws the same."""
    page = annotated(*cells(100), side=256)
    xy = drawn_places(page, 400, 64, seed=3)
    assert (xy == drawn_places(page, 400, 64, seed=3)).all()
    assert (xy != drawn_places(page, 400, 64, seed=4)).any()
    assert (xy >= 0).all() and (xy <= 192).all()
    middle = middles(page)
    holds = ((middle[:, None] >= xy) & (middle[:, None] < xy + 64)).all(axis=2)
    assert holds.any(axis=0).all()
    assert holds[page.coding.code == 1].any(axis=0).mean() > 0.6
    assert len(drawn_places(annotated(), 10, 64, seed=0)) == 0


def test_the_class_of_a_tile_is_that_of_most_objects_in_it() -> None:
    """-1 where there is none."""
    page = annotated(("C", box(0, 0, 4, 4)), ("M", box(10, 10, 14, 14)), ("M", box(20, 20, 24, 24)))
    assert common_objects(page, at((0, 0), (100, 100)), 50).tolist() == [1, -1]
