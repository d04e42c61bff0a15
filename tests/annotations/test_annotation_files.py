"""Annotation files become polygons, or one clear line that says why not."""

from __future__ import annotations

import gc
import gzip
import io
import json
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from conftest import RealData
from wsi_mmm.annotations import MAX_AREA_BYTES, clip_to_slide, parse_shapes, rasterise, read_annotation_file, shape_at
from wsi_mmm.errors import AnnotationError, NotFound

SQUARE = [[[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]]
BOW_TIE = [[[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]]


def feature(coordinates: Any, kind: str = "Polygon", properties: Any = None) -> dict[str, Any]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties or {}}


def collection(*features: Any) -> bytes:
    return json.dumps({"type": "FeatureCollection", "features": list(features)}).encode()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_dot_", "."), data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        collection(feature(SQUARE)),
        json.dumps([feature(SQUARE)]).encode(),
        json.dumps(feature(SQUARE)).encode(),
        json.dumps({"type": "Polygon", "coordinates": SQUARE}).encode(),
        json.dumps({"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": SQUARE}]}).encode(),
        b"\xef\xbb\xbf \n" + collection(feature(SQUARE)),
        gzip.compress(collection(feature(SQUARE))),
        zipped(a_dot_geojson=collection(feature(SQUARE))),
        collection(feature(SQUARE)).decode().encode("utf-16"),
        collection(json.loads(collection(feature(SQUARE)))),
        json.dumps([[json.loads(collection(feature(SQUARE)))]]).encode(),
        collection(
            {
                "type": "Feature",
                "geometry": {
                    "type": "GeometryCollection",
                    "geometries": [
                        {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": SQUARE}]}
                    ],
                },
            }
        ),
    ],
)
def test_every_form_of_geojson_is_read(data: bytes) -> None:
    (item,) = parse_shapes(data, "x")
    assert item.geometry.area == 10_000


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ({"classification": {"name": "Tumor", "color": [1, 2, 3]}}, "Tumor"),
        ({"classification": {"names": ["Tumor", "Positive"]}}, "Tumor: Positive"),
        ({"classification": "Tumor"}, "Tumor"),
        ({"classification": None}, None),
        ({}, None),
    ],
)
def test_the_class_is_the_name_of_the_classification(properties: Any, name: str | None) -> None:
    (item,) = parse_shapes(collection(feature(SQUARE, properties=properties)), "x")
    assert item.class_name == name


def test_what_has_no_area_is_skipped_and_counted() -> None:
    """Points, lines, clicks, empty and null geometries do not stop the polygons."""
    data = collection(
        feature([1, 2], "Point"),
        feature([[0, 0], [1, 1]], "LineString"),
        feature([[[5, 5], [5, 5]]]),
        feature([]),
        feature([[[0, 0], [5, 5], [9, 9], [0, 0]]]),
        {"type": "Feature", "geometry": None, "properties": None},
        feature(SQUARE),
    )
    shapes = parse_shapes(data, "x")
    assert (len(shapes), shapes.skipped, shapes.repaired) == (1, 6, 0)


def test_a_geometry_collection_is_one_object_with_all_its_polygons() -> None:
    """Beside other features, with its class; parts that overlap become one, lines are counted, points kept."""
    parts = [
        {"type": "Polygon", "coordinates": SQUARE},
        {"type": "MultiPolygon", "coordinates": [[[[50, 0], [150, 0], [150, 100], [50, 100], [50, 0]]]]},
        {"type": "LineString", "coordinates": [[0, 0], [1, 1]]},
        {"type": "Point", "coordinates": [3, 4]},
    ]
    mixed = {
        "type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": parts},
        "properties": {"classification": {"name": "Tumor"}},
    }  # fmt: skip
    lines = {"type": "GeometryCollection", "geometries": parts[2:]}
    found = parse_shapes(collection(feature(SQUARE), mixed, lines, feature(SQUARE)), "x")
    assert [item.geometry.area for item in found] == [10_000, 15_000, 10_000]
    assert [item.class_name for item in found] == [None, "Tumor", None]
    assert (found.skipped, [(dot.x, dot.class_name) for dot in found.dots]) == (3, [(3, "Tumor"), (3, None)])


def test_collections_in_collections_are_read_or_one_line() -> None:
    """A hundred deep, and without end."""
    head, tail = b'{"type": "GeometryCollection", "geometries": [', b"]}"
    square = json.dumps({"type": "Polygon", "coordinates": SQUARE}).encode()
    assert len(parse_shapes(b"[" + head * 100 + square + tail * 100 + b"]", "x")) == 1
    with pytest.raises(AnnotationError, match=r"^x: .*too deep"):
        parse_shapes(b"[" + head * 200_000 + tail * 200_000 + b"]", "x")


def test_invalid_polygons_are_repaired_and_counted() -> None:
    """A bow tie becomes its two triangles."""
    shapes = parse_shapes(collection(feature(BOW_TIE), feature([SQUARE, BOW_TIE], "MultiPolygon")), "x")
    assert shapes.repaired == 2
    assert all(item.geometry.is_valid for item in shapes)
    assert shapes.items[0].geometry.area == pytest.approx(5000)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "empty"),
        (b"not json", "neither GeoJSON nor XML"),
        (b'{"type": "FeatureCollection", "features": 3}', "no FeatureCollection"),
        (b'{"type": "Topology"}', "no FeatureCollection"),
        (b"3", "no FeatureCollection"),
        (b"\xff\xfe\x00", "neither GeoJSON"),
        (collection(3), "feature 0"),
        (collection(feature(SQUARE), feature("abc")), "feature 1"),
        (collection(feature([[[0, 0], [1, "x"], [2, 2]]])), "feature 0 .*'x' is not a JSON compliant number"),
        (collection(feature([[[0, 0], [1], [2, 2]]])), "feature 0"),
        (b'{"type":"Polygon","coordinates":[[[0,0],[NaN,1],[2,2]]]}', "not a finite"),
        (b'{"type":"Polygon","coordinates":[[[0,0],[1e999,1],[2,2]]]}', "not a finite"),
        (b"[" * 100_000, "neither GeoJSON"),
        (b"\x1f\x8b\x08broken", "damaged"),
        (gzip.compress(collection(feature(SQUARE)))[:-12], "damaged"),
        (b"PK\x03\x04broken", "damaged"),
        (zipped(a_dot_txt=b""), "0 .geojson"),
        (zipped(a_dot_json=b"", b_dot_json=b""), "2 .geojson"),
        (b"<broken", "cannot be parsed"),
        (b'<?xml version="1.0" encoding="foo"?><ASAP_Annotations/>', "cannot be parsed"),
        (b"<svg></svg>", "not of ASAP"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><ASAP_Annotations/>', "entity"),
        (b'<ASAP_Annotations><Annotation Type="Polygon"><Coordinate X="1"/></Annotation></ASAP_Annotations>', "Order"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_file(data: bytes, named: str) -> None:
    with pytest.raises(AnnotationError, match=named) as caught:
        parse_shapes(data, "case.json")
    assert str(caught.value).startswith("case.json")
    assert "\n" not in str(caught.value)


def test_asap_polygons_keep_their_group_and_the_order_of_points() -> None:
    """Coordinates are sorted by Order; dots are skipped."""
    points = [(0, 0, 0), (2, 10, 10), (1, 10, 0), (3, 0, 10)]
    nodes = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, x, y in points)
    xml = (
        '<?xml version="1.0"?><ASAP_Annotations><Annotations>'
        f'<Annotation Type="Spline" PartOfGroup="metastasis"><Coordinates>{nodes}</Coordinates></Annotation>'
        '<Annotation Type="Dot" PartOfGroup="None"><Coordinates/></Annotation></Annotations></ASAP_Annotations>'
    )
    shapes = parse_shapes(xml.encode(), "x")
    assert (shapes.items[0].class_name, shapes.items[0].geometry.area, shapes.skipped) == ("metastasis", 100, 1)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1.0, 2.0, 3.7]))
def test_a_rectangle_covers_its_pixels_and_at_most_their_rim(
    x: int, y: int, width: int, height: int, scale: float
) -> None:
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]
    shapes = parse_shapes(collection(feature([[[a * scale, b * scale] for a, b in ring]])), "x")
    mask = rasterise(shapes, (100, 100), scale_x=scale, scale_y=scale)
    assert mask[y : y + height, x : x + width].all()
    rim = np.zeros_like(mask)
    rim[max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1] = True
    assert not (mask & ~rim).any()


def test_holes_stay_open_and_nothing_vanishes() -> None:
    """The middle of a ring is empty; a polygon far smaller than a pixel still sets one."""
    hole = [[30, 30], [30, 70], [70, 70], [70, 30], [30, 30]]
    mask = rasterise(parse_shapes(collection(feature([SQUARE[0], hole])), "x"), (10, 10), scale_x=10, scale_y=10)
    assert mask[1, 1]
    assert not mask[4:6, 4:6].any()
    speck = parse_shapes(collection(feature([[[51, 51], [52, 51], [52, 52]]])), "x")
    assert rasterise(speck, (10, 10), scale_x=10, scale_y=10).sum() == 1


def test_shapes_outside_the_picture_are_cut_off() -> None:
    """Polygons may reach beyond the slide, or lie beyond it."""
    wide = parse_shapes(collection(feature([[[-50, -50], [500, -50], [500, 500], [-50, 500]]])), "x")
    assert rasterise(wide, (10, 10), scale_x=10, scale_y=10).all()
    away = parse_shapes(collection(feature([[[900, 900], [950, 900], [950, 950]]])), "x")
    assert not rasterise(away, (10, 10), scale_x=10, scale_y=10).any()


def test_masks_of_shapes_that_overlap_and_have_holes_are_those_of_shapely() -> None:
    """Px centres in any of 60 random outlines, their holes left out; px on an outline are left aside."""
    rng = np.random.default_rng(3)
    rings = []
    for x, y, r in zip(*rng.uniform([[0], [0], [5]], [[200], [150], [60]], (3, 60)), strict=True):
        angle = np.sort(rng.random(9)) * 2 * np.pi
        edge = np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], axis=1)
        rings.append([edge.tolist(), ((edge - (x, y)) * 0.3 + (x, y))[:: rng.choice([1, -1])].tolist()])
    found = parse_shapes(collection(*map(feature, rings)), "x")
    mask = rasterise(found, (75, 100), scale_x=2.0, scale_y=2.0)
    whole = shapely.union_all([item.geometry for item in found])
    y, x = (np.mgrid[:75, :100] + 0.5) * 2
    true, rim = shapely.contains_xy(whole, x, y), shapely.dwithin(shapely.points(x, y), whole.boundary, 1.5)
    assert np.array_equal(mask[~rim], true[~rim]) and mask[true].all() and true[~rim].any()


def test_the_area_on_the_slide_and_what_lies_off_it() -> None:
    """Wholly on, partly, touching its edge, off; points too."""
    squares = [feature([[[x, 0], [x + 10, 0], [x + 10, 10], [x, 10]]]) for x in (0, 95, 100, 300)]
    data = collection(*squares, feature([[5, 5], [-5, 5]], "MultiPoint"))
    there = clip_to_slide(parse_shapes(data, "x"), 100, 50)
    assert (there.areas.tolist(), there.off, there.partly) == ([100, 50], 3, 1)
    assert there.describe_off() == "3 objects in it lie off the slide, 1 reach beyond it"
    assert len(there.shapes) == 2 and len(there.shapes.dots) == 1


def test_the_first_shape_that_holds_a_point_however_many_corners_it_has() -> None:
    """As shapely says shape by shape; the edge belongs to it."""
    angle = np.linspace(0, 2 * np.pi, 500, endpoint=False)
    ring = np.stack([50 + 40 * np.cos(angle), 50 + 40 * np.sin(angle)], axis=1).tolist()
    found = parse_shapes(collection(feature([ring]), feature(SQUARE)), "x")
    points = np.array([[50.0, 50], [1, 1], [0, 50], [200, 0], [90, 50]])
    assert shape_at(found, points).tolist() == [0, 1, 1, -1, 0]


def test_real_exports_of_qupath_and_asap_are_read(real_data: RealData) -> None:
    """Every object of both files is a polygon."""
    qupath = parse_shapes(real_data.file("annotations/qupath05_example.geojson").read_bytes(), "real")
    asap = parse_shapes(real_data.file("annotations/camelyon16_tumor_009.xml").read_bytes(), "real")
    assert (len(qupath), qupath.skipped) == (3, 0)
    assert (len(asap), asap.skipped) == (6, 0)
    assert {item.class_name for item in asap} == {"metastasis"}


def test_points_are_kept_beside_the_polygons() -> None:
    """Point and MultiPoint of GeoJSON, dots of ASAP: with their class; they still count as no polygon."""
    data = collection(
        feature([5, 6.5], "Point", {"classification": {"name": "mitosis"}}),
        feature([[1, 2], [3, 4], ["x", 1], [1]], "MultiPoint"),
        feature(SQUARE),
    )
    found = parse_shapes(data, "x")
    assert [(dot.x, dot.y, dot.class_name) for dot in found.dots] == [(5, 6.5, "mitosis"), (1, 2, None), (3, 4, None)]
    assert (len(found), found.skipped) == (1, 2)
    xml = (
        b'<ASAP_Annotations><Annotations><Annotation Type="Dot" PartOfGroup="a"><Coordinates>'
        b'<Coordinate Order="0" X="7" Y="8" /></Coordinates></Annotation></Annotations></ASAP_Annotations>'
    )
    (dot,) = parse_shapes(xml, "x").dots
    assert (dot.x, dot.y, dot.class_name) == (7, 8, "a")


def test_numbers_of_objects_are_kept_when_asked_for() -> None:
    """Properties, measurements as an object or as QuPath's older list; NaN where an object has none."""
    data = collection(
        feature(SQUARE, properties={"grade": 3, "measurements": {"tils": 0.25}}),
        feature(SQUARE, properties={"measurements": [{"name": "tils", "value": 0.5}]}),
        feature(SQUARE, properties={"grade": "high", "measurements": None}),
        feature(SQUARE, properties={"grade": True}),
    )
    values = [item.values for item in parse_shapes(data, "x", ("grade", "tils"))]
    expected = [(3, 0.25), (np.nan, 0.5), (np.nan, np.nan), (np.nan, np.nan)]
    assert np.array_equal(np.array(values), np.array(expected), equal_nan=True)
    assert all(item.values == () for item in parse_shapes(data, "x"))


def test_one_odd_polygon_among_many_is_named_and_changes_no_other() -> None:
    """Polygons made together are those that are made one by one."""
    plain = [feature([[[i, 0], [i + 9, 0], [i + 9, 9], [i, 9]]]) for i in range(20)]
    odd = feature([[[0, 0, 1], [5, 0, 1], [5, 5, 1], [0, 0, 1]]])  # with a height: looked at by itself
    alone = [item.geometry for item in parse_shapes(collection(*plain), "x")]
    among = [item.geometry for item in parse_shapes(collection(*plain, odd), "x")]
    assert all(a.equals(b) for a, b in zip(alone, among[:20], strict=True))
    with pytest.raises(AnnotationError, match="feature 20"):
        parse_shapes(collection(*plain, feature([[[0, 0], [5, 0], ["a", 5], [0, 0]]])), "x")


def test_the_size_of_a_file_is_asked_before_it_is_read(tmp_path: Path) -> None:
    """A file of holes, two gibibytes long, takes no memory; a pipe or folder is none."""
    with (tmp_path / "large.geojson").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(AnnotationError, match=r"large\.geojson: 2,048 MiB, more than 512 MiB"):
        read_annotation_file(str(tmp_path / "large.geojson"), MAX_AREA_BYTES)
    with pytest.raises(NotFound):
        read_annotation_file(str(tmp_path))
    (tmp_path / "small.geojson").write_bytes(b"[]")
    assert read_annotation_file(str(tmp_path / "small.geojson")) == b"[]"


def test_parsing_leaves_garbage_collection_as_it_was() -> None:
    """On stays on, off stays off, also after an error."""
    for switch in (gc.disable, gc.enable):
        switch()
        before = gc.isenabled()
        parse_shapes(collection(feature(SQUARE)), "x")
        with pytest.raises(AnnotationError):
            parse_shapes(b"{", "x")
        assert gc.isenabled() == before


def test_a_web_server_without_ranges_serves_annotations(tmp_path: Path) -> None:
    """Only slides need ranges: a file that is read whole may come from any server, within the same bounds."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "a.geojson").write_bytes(b"[]")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert read_annotation_file(f"{address}/a.geojson") == b"[]"
        with pytest.raises(AnnotationError, match="more than 0 MiB"):
            read_annotation_file(f"{address}/a.geojson", 1)
        with pytest.raises(NotFound):
            read_annotation_file(f"{address}/b.geojson")
        server.shutdown()
