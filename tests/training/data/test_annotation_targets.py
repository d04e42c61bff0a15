"""Shapes become targets: labels of tiles and px, boxes, instances; known where something is known and nowhere else."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Point, Polygon, box

from wsi_mmm.annotations import Shape, Shapes
from wsi_mmm.training.data.annotation_targets import (
    SlideAnnotations,
    class_maps,
    common_labels,
    common_objects,
    covering,
    drawn_places,
    grid_places,
    known_share,
    label_maps,
    middles,
    object_boxes,
    object_maps,
    tile_labels,
    tile_multilabels,
    tile_values,
)
from wsi_mmm.training.data.buckets import IGNORE, USE, Buckets, Rule
from wsi_mmm.training.data.raster import encode, index_shapes
from wsi_mmm.types import I64

LABELS = ("rest", "tumour", "stroma")
TABLE = Buckets(
    LABELS, (Rule(IGNORE, "fold"), Rule("tumour", "T"), Rule("stroma", "S"), Rule(USE, "ROI"), Rule("rest", "R"))
)


def annotated(
    *shapes: tuple[str | None, Polygon] | tuple[str | None, Polygon, float],
    scale: float = 1.0,
    side: int = 200,
    background: int = 0,
    complete: bool = False,
) -> SlideAnnotations:
    """A slide of ``side`` level-0 px."""
    items = tuple(Shape(one[1], one[0], tuple(one[2:]) or (math.nan,)) for one in shapes)
    index = index_shapes(Shapes(items), ("grade",))
    return SlideAnnotations(
        index, encode(index, TABLE), scale, scale, side / scale, side / scale, len(LABELS), background, complete
    )


def at(*xy: tuple[int, int]) -> I64:
    return np.array(xy, np.int64).reshape(-1, 2)


def the_map(page: SlideAnnotations, side: int = 200) -> np.ndarray:
    return class_maps(page, page.grids(at((0, 0)), side))[0]


def test_inside_use_regions_the_rest_is_background_and_outside_nothing_is_known() -> None:
    """Also of shapes that reach out of the use-region."""
    found = the_map(annotated(("ROI", box(50, 50, 100, 100)), ("T", box(90, 90, 150, 150))))
    assert found[60, 60] == 0
    assert found[95, 95] == 1
    assert found[120, 120] == -1
    assert (found >= 0).sum() == 2500


def test_without_use_regions_only_shapes_are_known_unless_the_slide_is_complete() -> None:
    """Beyond the slide nothing is, either way."""
    shapes = [("T", box(10, 10, 30, 30))]
    assert (the_map(annotated(*shapes)) >= 0).sum() == 400
    full = the_map(annotated(*shapes, complete=True), side=260)
    assert (full == 0).sum() == 200 * 200 - 400
    assert (full[200:] == -1).all()


def test_the_order_of_the_table_decides_overlaps_and_holes_are_kept() -> None:
    """Tumour before stroma, whatever the order in the file; folds above all; nested regions show through holes."""
    ring = box(0, 0, 100, 100) - box(40, 40, 60, 60)
    found = the_map(annotated(("T", ring), ("S", box(0, 0, 100, 100)), ("fold", box(0, 0, 10, 10))))
    assert found[20, 20] == 1
    assert found[50, 50] == 2
    assert found[5, 5] == -1


def test_unmatched_classes_are_unknown_over_background_but_hide_no_label() -> None:
    """Nobody said what they are."""
    found = the_map(annotated(("ROI", box(0, 0, 100, 100)), ("?", box(10, 10, 40, 40)), ("T", box(20, 20, 30, 30))))
    assert found[15, 15] == -1
    assert found[25, 25] == 1
    assert found[60, 60] == 0


def test_labels_of_several_kinds_lie_in_one_px() -> None:
    """Absent inside use-regions, unknown outside them and in ignore shapes."""
    page = annotated(("ROI", box(0, 0, 100, 100)), ("T", box(0, 0, 50, 50)), ("S", box(25, 25, 75, 75)),
                 ("fold", box(90, 90, 100, 100)))  # fmt: skip
    found = label_maps(page, page.grids(at((0, 0)), 120))[0]
    assert found.dtype == np.int8
    assert found[:, 30, 30].tolist() == [0, 1, 1]
    assert found[:, 80, 80].tolist() == [0, 0, 0]
    assert found[:, 95, 95].tolist() == [-1, -1, -1]
    assert found[:, 110, 110].tolist() == [-1, -1, -1]


def test_tiles_are_labelled_by_what_covers_enough_of_them() -> None:
    """75 % tumour, 50 % tumour, background, nothing known; shares are of the whole tile."""
    page = annotated(("ROI", box(0, 0, 120, 40)), ("T", box(0, 0, 60, 40)))
    tiles = at((0, 0), (50, 0), (40, 0), (80, 0), (150, 100))
    assert tile_labels(page, tiles, 40, 0.6).tolist() == [1, 0, -1, 0, -1]
    assert known_share(page, at((100, 0)), 40).tolist() == [0.5]


def test_a_tile_has_a_label_lacks_it_or_nobody_knows() -> None:
    """Multilabel: unknown px count for neither side."""
    page = annotated(("ROI", box(0, 0, 80, 40)), ("T", box(0, 0, 30, 40)))
    found = tile_multilabels(page, at((0, 0), (40, 0), (60, 0), (100, 100)), 40, 0.5)
    assert found[0].tolist() == [0, 1, 0]
    assert found[1].tolist() == [0, 0, 0]
    assert np.isnan(found[2:]).all()


def test_numbers_of_regions_are_averaged_over_the_tile() -> None:
    """By area; regions without the number do not count; too little cover is unknown."""
    page = annotated(("T", box(0, 0, 20, 40), 2.0), ("S", box(20, 0, 40, 40), 4.0), ("T", box(40, 0, 60, 40)))
    found = tile_values(page, at((0, 0), (20, 0), (40, 0)), 40, 0.5)[:, 0]
    assert found[0] == 3.0
    assert found[1] == 4.0
    assert np.isnan(found[2])


def test_a_grid_holds_the_tiles_that_are_touched() -> None:
    """Of use-regions when there are any, of labelled shapes otherwise, all of a complete slide."""
    shapes = [("T", box(100, 100, 110, 110))]
    assert grid_places(annotated(*shapes), 50, 40).tolist() == [[80, 80]]
    assert grid_places(annotated(*shapes, ("ROI", box(1, 1, 2, 2))), 50, 50).tolist() == [[0, 0]]
    assert len(grid_places(annotated(*shapes, complete=True), 50, 40)) == 25


def test_the_class_to_balance_by_is_the_commonest_that_is_no_background() -> None:
    """Background counts only where there is nothing else."""
    page = annotated(("ROI", box(0, 0, 200, 200)), ("S", box(0, 0, 10, 10)), ("T", box(20, 20, 40, 40)))
    assert common_labels(page, at((0, 0), (100, 100)), 50).tolist() == [1, 0]


@settings(max_examples=25)
@given(st.integers(0, 150), st.integers(0, 150), st.sampled_from([0.5, 1.0, 1.9011, 4.0]))
def test_level_0_px_and_tile_px_lead_back_to_each_other(x: int, y: int, scale: float) -> None:
    """The px that is labelled maps back to level-0 px inside the shape, wherever the tile lies."""
    page = annotated(("T", box(x, y, x + 3 * scale, y + 3 * scale)), scale=scale)
    corner = at((int(x / scale) - 3, int(y / scale) - 2))
    found = np.argwhere(class_maps(page, page.grids(corner, 9))[0] == 1)
    level0 = (found[:, ::-1] + 0.5 + corner[0]) * scale
    inside = (np.array([x, y]) - 1e-9 <= level0) & (level0 <= np.array([x, y]) + 3 * scale + 1e-9)
    slide = (np.array([x, y]) + 3 * scale < 200).all()
    assert inside.all()
    assert len(found) == 9 or not slide


def test_tiles_of_truth_stitched_are_the_truth_of_the_whole() -> None:
    """With use-regions, ignore shapes and the slide's edge."""
    page = annotated(
        ("ROI", Polygon([(3, 5), (190, 20), (230, 199), (10, 150)])),
        ("T", Polygon([(20, 20), (90, 35), (60, 99)])),
        ("S", Polygon([(50, 20), (150, 90), (60, 199)])),
        ("fold", box(55, 55, 70, 90)),
        scale=0.77,
    )
    side, count = 37, 8
    y, x = np.mgrid[:count, :count].reshape(2, -1) * side
    for maps in (class_maps, lambda page, grids: label_maps(page, grids)[:, 1]):
        tiles = maps(page, page.grids(np.stack([x, y], axis=1), side))
        stitched = tiles.reshape(count, count, side, side).swapaxes(1, 2).reshape(count * side, -1)
        assert (stitched == maps(page, page.grids(at((0, 0)), count * side))[0]).all()


# ---------------------------------------------------------------- objects


CELLS = Buckets(("cell", "mitosis"), (Rule("mitosis", "M"), Rule("cell", "C"), Rule(IGNORE, "blur"), Rule(USE, "ROI")))


def cells_on(
    *shapes: tuple[str, Polygon], scale: float = 1.0, complete: bool = True, side: int = 256
) -> SlideAnnotations:
    """A slide of ``side`` level-0 px."""
    index = index_shapes(Shapes(tuple(Shape(geometry, name) for name, geometry in shapes)))
    return SlideAnnotations(index, encode(index, CELLS), scale, scale, side / scale, side / scale, 2, -1, complete)


def cells(count: int, seed: int = 0, side: int = 256) -> list[tuple[str, Polygon]]:
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, side, (count, 2))
    return [("M" if i % 5 == 0 else "C", Point(*p).buffer(rng.uniform(2, 7))) for i, p in enumerate(xy)]


def test_instances_keep_their_numbers_across_tiles() -> None:
    """Tiles put side by side are the map of the whole: an object at the seam has one number on both sides."""
    page = cells_on(*cells(150))
    y, x = np.mgrid[:4, :4].reshape(2, -1) * 64
    tiles = object_maps(page, page.grids(np.stack([x, y], axis=1), 64))
    stitched = tiles.reshape(4, 4, 64, 64).swapaxes(1, 2).reshape(256, 256)
    whole = object_maps(page, page.grids(at((0, 0)), 256))[0]
    assert (stitched == whole).all()
    assert len(np.unique(whole)) > 120


def test_where_nobody_looked_there_is_no_background() -> None:
    """Outside use-regions, in ignore shapes, beyond the slide: -1; objects outside use-regions are not known either."""
    page = cells_on(("ROI", box(0, 0, 100, 100)), ("C", box(10, 10, 20, 20)), ("C", box(150, 150, 160, 160)),
                 ("blur", box(50, 50, 60, 60)), complete=False)  # fmt: skip
    found = object_maps(page, page.grids(at((0, 0)), 300))[0]
    assert found[15, 15] == 2
    assert found[30, 30] == 0
    assert found[55, 55] == -1
    assert found[155, 155] == -1
    assert found[299, 299] == -1


def test_boxes_are_cut_at_the_rim_and_unknown_when_little_is_seen() -> None:
    """Half of an object is still one, a tenth of it is not learnt from; classes by the table."""
    page = cells_on(("C", box(10, 10, 30, 30)), ("M", box(54, 10, 74, 30)), ("C", box(62, 40, 82, 60)))
    (found,) = object_boxes(page, page.grids(at((0, 0)), 64), 0.3)
    assert found.xyxy.tolist() == [[10, 10, 30, 30], [62, 40, 64, 60], [54, 10, 64, 30]]
    assert found.labels.tolist() == [0, -1, 1]
    assert (found.height, found.width) == (64, 64)
    assert found.xyxy.dtype == np.float32 and found.labels.dtype == np.int32


def test_unknown_area_is_given_as_boxes_labelled_unknown() -> None:
    """They cover all unknown px, and no object inside the use-region is lost."""
    page = cells_on(("ROI", box(0, 0, 40, 64)), ("C", box(10, 10, 20, 20)), ("C", box(50, 10, 60, 20)), complete=False)
    (found,) = object_boxes(page, page.grids(at((0, 0)), 64), 0.3)
    known, unknown = found.xyxy[found.labels >= 0], found.xyxy[found.labels < 0]
    assert known.tolist() == [[10, 10, 20, 20]]
    assert [40, 0, 64, 64] in unknown.tolist()


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.3, 2.0]))
def test_every_object_is_in_a_tile(seed: int, scale: float) -> None:
    """Kept tiles of a grid hold the middle of every object, also where nobody declared the slide complete."""
    page = cells_on(*cells(40, seed), scale=scale, complete=False)
    xy = grid_places(page, 48, 40)
    xy = xy[covering(page, xy, 48, 0.9)]
    middle = middles(page)
    on_slide = (middle >= 0).all(axis=1) & (middle < 256 / scale).all(axis=1)
    inside = ((middle[:, None] >= xy) & (middle[:, None] < xy + 48)).all(axis=2).any(axis=1)
    assert inside[on_slide].all()


def test_drawn_tiles_hold_their_object_and_every_class_comes_alike() -> None:
    """One in five cells divides; as many tiles are drawn for these. The same seed draws the same."""
    page = cells_on(*cells(100), side=256)
    xy = drawn_places(page, 400, 64, seed=3)
    assert (xy == drawn_places(page, 400, 64, seed=3)).all()
    assert (xy != drawn_places(page, 400, 64, seed=4)).any()
    assert (xy >= 0).all() and (xy <= 192).all()
    middle = middles(page)
    holds = ((middle[:, None] >= xy) & (middle[:, None] < xy + 64)).all(axis=2)
    assert holds.any(axis=0).all()
    assert holds[page.coding.code == 1].any(axis=0).mean() > 0.6
    assert len(drawn_places(cells_on(), 10, 64, seed=0)) == 0


def test_the_class_of_a_tile_is_that_of_most_objects_in_it() -> None:
    """-1 where there is none."""
    page = cells_on(("C", box(0, 0, 4, 4)), ("M", box(10, 10, 14, 14)), ("M", box(20, 20, 24, 24)))
    assert common_objects(page, at((0, 0), (100, 100)), 50).tolist() == [1, -1]
