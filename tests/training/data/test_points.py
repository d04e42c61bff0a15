"""Points with classes beside pictures: what is read, what each kind of task learns of them, and what is wrong."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_mmm.annotations import Dot, Shape, Shapes
from wsi_mmm.errors import ConfigError, InputError, ManifestError
from wsi_mmm.tasks.targets import Boxes
from wsi_mmm.training.config import parse
from wsi_mmm.training.data.annotation_targets import SlideAnnotations, classed_object_maps
from wsi_mmm.training.data.base import DataSource
from wsi_mmm.training.data.buckets import USE, Buckets, Rule
from wsi_mmm.training.data.points import Points, mark_points
from wsi_mmm.training.data.raster import encode, index_shapes
from wsi_mmm.training.job import data_context

CLASSES = {"instances": ["lymphocyte", "stroma"], "segment": ["rest", "lymphocyte", "stroma"], "detect": ["lymphocyte"]}
VALUES = 'values = { 1 = "lymphocyte", 2 = "stroma", 9 = "" }\n'


def write(folder: Path, rows: str, name: str = "a.csv", size: tuple[int, int] = (40, 60)) -> None:
    """A picture of ``size`` (height, width) and its points."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.full((*size, 3), 200, np.uint8)).save(folder / f"{name.split('.')[0]}.png")
    (folder / name).write_text(rows)


def opened(folder: Path, more: str = VALUES, kind: str = "instances", classes: list[str] | None = None) -> DataSource:
    """The source of a data set of the pictures in ``folder``, of a model of 0.5 um/px."""
    task = f'[[task]]\nname = "cells"\nkind = "{kind}"\nclasses = {json.dumps(classes or CLASSES[kind])}\n'
    entry = f'[[data]]\nname = "d"\nkind = "image-points"\ntask = "cells"\nimages = "{folder}"\n{more}'
    config = parse(tomllib.loads(f"[model]\nmpp = 0.5\ntile_size = 64\n{task}{entry}"))
    return config.data[0].open(data_context(config))


def target(source: DataSource) -> Any:
    """Of the first picture."""
    sample = source.read([0], 64)[0]
    assert not sample.failed, sample.failed
    return sample.targets["cells"]


def test_a_class_is_known_round_its_point_and_no_outline_is(tmp_path: Path) -> None:
    """Within 4 um the class, within 10 um no outline, beyond nothing is there; the nearer point decides."""
    write(tmp_path, "x,y,class\n12.5,10.5,1\n40.5,20.5,2\n46.5,20.5,9\n")
    labels, classes = target(opened(tmp_path))
    y, x = np.mgrid[:40, :60]
    away = np.stack([np.hypot(x - px, y - py) for px, py in ((12, 10), (40, 20), (46, 20))])
    nearest = away.argmin(axis=0)
    clear = np.abs(np.sort(away, axis=0)[0] - np.sort(away, axis=0)[1]) > 1e-9  # not on the line between two
    wanted = np.where(away.min(axis=0) <= 20, -2 - nearest, 0)
    assert (labels == wanted)[clear].all() and set(np.unique(labels)) == {-4, -3, -2, 0}
    known = np.where(away.min(axis=0) <= 8, np.array([0, 1, -1])[nearest], -1)
    assert (classes == known)[clear].all()
    assert opened(tmp_path).index.labels.tolist() == [0]


@pytest.mark.parametrize("mpp", [0.25, 1.0])
def test_files_of_another_resolution_are_scaled(tmp_path: Path, mpp: float) -> None:
    """Coordinates are px of the file; micrometres stay what they are."""
    factor = mpp / 0.5
    write(tmp_path, f"x,y,class\n{24 / factor},{20 / factor},2\n", size=(round(40 / factor), round(60 / factor)))
    labels, classes = target(opened(tmp_path, f"{VALUES}mpp = {mpp}\ndot_um = 3\noutline_um = 6\n"))
    assert labels.shape == (40, 60)
    assert (labels < 0).sum() == pytest.approx(np.pi * 12**2, rel=0.1)
    assert (classes == 1).sum() == pytest.approx(np.pi * 6**2, rel=0.15)
    row, column = np.argwhere(classes == 1).mean(axis=0)
    assert (row + 0.5, column + 0.5) == pytest.approx((20, 24), abs=1.0)


def test_annotation_files_are_read_too(tmp_path: Path) -> None:
    """A multipoint of QuPath's points tool holds many cells of its class."""
    feature = {
        "type": "Feature", "geometry": {"type": "MultiPoint", "coordinates": [[5.5, 5.5], [50.5, 30.5]]},
        "properties": {"classification": {"name": "stroma"}},
    }  # fmt: skip
    write(tmp_path, json.dumps([feature]), "a.geojson")
    _, classes = target(opened(tmp_path, ""))
    assert classes[5, 5] == classes[30, 50] == 1 and not (classes == 0).any()


def test_every_kind_learns_what_it_can(tmp_path: Path) -> None:
    """Discs of a class in `segment`, boxes in `detect`, discs as objects where there is one class."""
    write(tmp_path, "x,y,class\n10.5,10.5,1\n40.5,20.5,1\n")
    named = 'values = { 1 = "lymphocyte" }\n'
    found = target(opened(tmp_path, f'{named}background = "rest"\n', "segment"))
    assert found[10, 10] == found[20, 40] == 1 and found[35, 5] == 0
    assert target(opened(tmp_path, named, "segment"))[35, 5] == -1
    boxes = target(opened(tmp_path, named, "detect"))
    assert isinstance(boxes, Boxes)
    assert boxes.xyxy.tolist() == [[2.5, 2.5, 18.5, 18.5], [32.5, 12.5, 48.5, 28.5]] and boxes.labels.tolist() == [0, 0]
    part = target(opened(tmp_path, f"{named}complete = false\n", "detect"))
    assert part.xyxy[2].tolist() == [0, 0, 60, 40] and part.labels.tolist() == [0, 0, -1]
    one = target(opened(tmp_path, named, classes=["lymphocyte"]))
    assert one[10, 10] == 1 and one[20, 40] == 2 and one[35, 5] == 0
    labels, _ = target(opened(tmp_path, f"{VALUES}complete = false\n"))
    assert labels[39, 0] == -1


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ("x,y,class\n70,10,1\n", VALUES, r"a\.png: the point \(70, 10\) lies off the picture of 60 x 40 px"),
        ("x,y,class\n7,10,3\n", VALUES, "has the class '3', known are lymphocyte, stroma, 1, 2, 9: map it"),
        ("x,y,class\n7,ten,1\n", VALUES, "row 2: 'ten' is no coordinate: give px"),
        ("x,y,class\n7,nan,1\n", VALUES, "row 2: 'nan' is no coordinate: give px"),
        ("x,y,kind\n7,10,1\n", VALUES, "has no column 'class'; it has x, y, kind"),
        ("x,y,class\n7,10,1\n", 'values = { 1 = "tumour" }\n', "values name 'tumour'; classes are lymphocyte, stroma"),
        ("x,y,class\n7,10,1\n", f'{VALUES}background = "stroma"\n', "background is for tasks of kind segment"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, rows: str, more: str, says: str) -> None:
    """With the file and the fix."""
    write(tmp_path, rows)
    try:
        text = opened(tmp_path, more).read([0], 64)[0].failed
    except (InputError, ConfigError, ManifestError) as error:
        text = str(error)
    assert re.search(says, text) and "\n" not in text


def test_a_picture_without_points_is_named(tmp_path: Path) -> None:
    """A missing file is no picture without cells; an empty table is."""
    write(tmp_path, "x,y,class\n")
    labels, classes = target(opened(tmp_path))
    assert not labels.any() and (classes == -1).all()
    (tmp_path / "a.csv").unlink()
    with pytest.raises(InputError, match=r"data 'd': no points a\.csv \(or \.tsv, \.parquet, \.geojson\) below"):
        opened(tmp_path)


def test_a_point_in_an_outline_gives_the_object_its_class() -> None:
    """Its outline stays known; points beside it do not reach into it."""
    labels, classes = np.zeros((30, 30), np.int32), np.full((30, 30), -1, np.int32)
    labels[5:15, 5:15] = 7
    mark_points(labels, classes, Points(np.array([[10.5, 10.5], [20.5, 10.5]]), np.array([1, 0], np.int32)), 3, 8)
    assert (labels[5:15, 5:15] == 7).all() and (classes[5:15, 5:15] == 1).all()
    assert classes[10, 20] == 0 and labels[10, 20] == labels[10, 16] == -3 and classes[10, 16] == -1
    assert labels[29, 29] == 0


def test_slides_have_outlines_and_points_side_by_side() -> None:
    """In squares of any cut: outlined objects with their class, discs of points, nothing known outside use-regions."""
    from shapely.geometry import box

    dots = (Dot(60.5, 40.5, "a"), Dot(150.5, 150.5, "a"))
    shapes = Shapes((Shape(box(0, 0, 128, 128), "ROI"), Shape(box(10, 10, 30, 30), "b")), dots=dots)
    index = index_shapes(shapes, dot_radius=(6.0, 6.0))
    coding = encode(index, Buckets(("a", "b"), (Rule("a", "a"), Rule("b", "b"), Rule(USE, "ROI"))))
    annotated = SlideAnnotations(index, coding, 1.0, 1.0, 192, 192, 2)
    whole = classed_object_maps(annotated, annotated.grids(np.zeros((1, 2), np.int64), 192))[0]
    labels, classes = whole
    assert (classes[10:30, 10:30] == 1).all() and len(np.unique(labels[10:30, 10:30])) == 1
    assert classes[40, 60] == 0 and labels[40, 60] < -1 and labels[40, 72] == labels[40, 60] and classes[40, 72] == -1
    assert labels[100, 100] == 0 and (labels[130:] == -1).all() and (classes[130:] == -1).all()
    xy = np.array([[x, y] for y in (0, 64, 128) for x in (0, 64, 128)], np.int64)
    parts = classed_object_maps(annotated, annotated.grids(xy, 64))
    for (x, y), part in zip(xy.tolist(), parts, strict=True):
        cut = whole[:, y : y + 64, x : x + 64]
        assert np.array_equal(part[1], cut[1])
        assert np.array_equal(np.maximum(part[0], -2), np.maximum(cut[0], -2))  # points are numbered by square
