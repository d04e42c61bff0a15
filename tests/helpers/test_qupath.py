"""The checker itself: it accepts what QuPath exports and rejects a violation of every rule."""

from __future__ import annotations

import copy
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.qupath import check_qupath

RING = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[2, 2], [2, 4], [4, 4], [4, 2], [2, 2]]
GOOD: dict[str, Any] = {
    "type": "Feature",
    "id": "6423a977-ffff-48db-affc-cd11632010f0",
    "geometry": {"type": "Polygon", "coordinates": [RING, HOLE]},
    "properties": {
        "objectType": "detection",
        "name": "one",
        "isLocked": False,
        "classification": {"name": "Tumour", "color": [200, 0, 0]},
        "measurements": {"area": 96.5},
        "metadata": {"task": "nuclei"},
    },
}


def store(path: Path, *features: object) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def put(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(feature: dict[str, Any]) -> None:
        inner = feature
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(feature: dict[str, Any]) -> None:
        inner = feature
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return change


def ring(*points: list[float]) -> Callable[[dict[str, Any]], None]:
    return put("geometry", "coordinates", value=[list(points)])


P = "properties"
VIOLATIONS = [
    ("feature", put("type", value="feature")),
    ("id", drop("id")),
    ("id", put("id", value="nucleus-1")),
    ("geometry", put("geometry", value=None)),
    ("geometry", put("geometry", "type", value="Circle")),
    ("geometry", put("geometry", "coordinates", value=[])),
    ("ring", ring([0, 0], [1, 1], [0, 0])),
    ("ring", ring([0, 0], [1, 1], [1, "0"], [0, 0])),  # type: ignore[list-item]
    ("ring", ring([0, 0, 0], [10, 0, 0], [10, 10, 0], [0, 0, 0])),
    ("closed", ring([0, 0], [10, 0], [10, 10], [0, 10])),
    ("orientation", ring(*RING[::-1])),
    ("orientation", put("geometry", "coordinates", value=[RING, HOLE[::-1]])),
    ("decimals", ring([0, 0], [10.123, 0], [10, 10], [0, 10], [0, 0])),
    ("outside", ring([0, 0], [101, 0], [10, 10], [0, 10], [0, 0])),
    ("valid", ring([0, 0], [10, 0], [0, 11], [10, 10], [0, 0])),
    ("valid", ring([0, 0], [10, 0], [10, 0.004], [0, 0.003], [0, 0])),
    ("sliver", ring([0, 0], [0.1, 0], [0.1, 0.1], [0, 0])),
    ("top-level", put("objectType", value="detection")),
    ("properties", put(P, value=None)),
    ("properties", drop(P)),
    ("object-type", put(P, "objectType", value="nucleus")),
    ("properties-type", put(P, "type", value="x")),
    ("name", put(P, "name", value=None)),
    ("locked", put(P, "isLocked", value="no")),
    ("classification", put(P, "classification", "name", value="")),
    ("classification", put(P, "classification", value=None)),
    ("color", drop(P, "classification", "color")),
    ("color", put(P, "classification", "color", value=[1, 2])),
    ("color", put(P, "classification", "color", value=[1, 2, 256])),
    ("color", put(P, "classification", "color", value=-65536)),
    ("color", put(P, "color", value="red")),
    ("measurements", put(P, "measurements", value=[1])),
    ("measurements", put(P, "measurements", "area", value=None)),
    ("measurements", put(P, "measurements", "area", value="1")),
    ("measurements", put(P, "measurements", "area", value=float("nan"))),
    ("number", put(P, "measurements", "area", value=float("inf"))),
    ("metadata", put(P, "metadata", "task", value=1)),
    ("nucleus", put(P, "nucleusGeometry", value={})),
    ("nucleus", put("nucleusGeometry", value=GOOD["geometry"])),
]


@pytest.mark.parametrize(("rule", "change"), VIOLATIONS)
def test_each_violation_is_found(rule: str, change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    """A file with one violation is rejected for that rule."""
    feature = copy.deepcopy(GOOD)
    change(feature)
    report = check_qupath(store(tmp_path / "a.geojson", feature), size=(100, 100))
    assert rule in report.counts, report


def test_a_good_file_in_every_packing(tmp_path: Path) -> None:
    """A collection, an array, one feature; plain, gz and zip: all accepted."""
    plain = store(tmp_path / "a.geojson", GOOD)
    (tmp_path / "b.json").write_text(json.dumps([GOOD]))
    (tmp_path / "c.json").write_text(json.dumps(GOOD))
    (tmp_path / "d.geojson.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.write(plain, "a.geojson")
    for path in sorted(tmp_path.iterdir()):
        report = check_qupath(path, size=(100, 100))
        assert report.ok, (path, report)
        assert report.features == 1


def test_equal_ids_are_found(tmp_path: Path) -> None:
    """Two features with one id are a violation."""
    assert check_qupath(store(tmp_path / "a.geojson", GOOD, GOOD)).counts == {"id-unique": 1}


def test_too_many_annotations_are_found(tmp_path: Path) -> None:
    """QuPath is unusable with masses of annotations; a missing objectType is an annotation."""
    features = []
    for number in range(3):
        feature = copy.deepcopy(GOOD)
        feature["id"] = f"{number:08d}{GOOD['id'][8:]}"
        del feature[P]["objectType"]
        features.append(feature)
    path = store(tmp_path / "a.geojson", *features)
    assert check_qupath(path).ok
    assert check_qupath(path, max_annotations=2).counts == {"many-annotations": 1}


@pytest.mark.parametrize(("shift", "ok"), [(5, False), (0, False), (10, True), (20, True)])
def test_parts_of_a_multipolygon_must_not_overlap(shift: int, ok: bool, tmp_path: Path) -> None:
    """Each part may be valid alone and the whole not; parts may touch in a point."""
    feature = copy.deepcopy(GOOD)
    moved = [[x + shift, y + shift] for x, y in RING]
    feature["geometry"] = {"type": "MultiPolygon", "coordinates": [[RING], [moved]]}
    report = check_qupath(store(tmp_path / "a.geojson", feature))
    assert dict(report.counts) == ({} if ok else {"valid": 1})


def test_a_key_given_twice_is_found(tmp_path: Path) -> None:
    """JSON libraries differ in which one they believe, and some refuse."""
    path = store(tmp_path / "a.geojson", GOOD)
    path.write_text(path.read_text().replace('"area": 96.5', '"area": 96.5, "area": 1'))
    assert "duplicate-key" in check_qupath(path).counts


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b'{"type":"FeatureCollection","features":[{} {}]}', "json"),
        (b'{"type":"FeatureCollection" "features":[]}', "json"),
        (b'{"type":"FeatureCollection","features":[],}', "json"),
        (b'{"type":"FeatureCollection","features":[', "json"),
        (b'{"type":"FeatureCollection","features":[{}, ]}', "json"),
        (b'{"type":"FeatureCollection","features":[]} x', "json"),
        (b'{"type":"FeatureCollection"}', "root"),
        (b'{"type":"Collection","features":[]}', "root"),
        (b'"text"', "json"),
        (b'{"type":"FeatureCollection","features":[{"type":"\xff"}]}', "utf-8"),
    ],
)
def test_broken_files_are_found(text: bytes, rule: str, tmp_path: Path) -> None:
    """Truncated, malformed or wrongly encoded files are rejected."""
    (tmp_path / "a.geojson").write_bytes(text)
    assert rule in check_qupath(tmp_path / "a.geojson").counts


def test_wrong_endings_and_torn_gzip_are_found(tmp_path: Path) -> None:
    """QuPath goes by the ending; a gz that ends early cannot be read."""
    (tmp_path / "a.txt").write_text("{}")
    assert "json" in check_qupath(tmp_path / "a.txt").counts
    packed = gzip.compress(store(tmp_path / "a.geojson", GOOD).read_bytes())
    (tmp_path / "b.geojson.gz").write_bytes(packed[: len(packed) // 2])
    assert "json" in check_qupath(tmp_path / "b.geojson.gz").counts


def test_the_pieces_in_which_a_file_is_read_do_not_matter(tmp_path: Path) -> None:
    """Features larger than a reading piece, and pieces that end anywhere, are understood."""
    feature = copy.deepcopy(GOOD)
    feature[P]["metadata"] = {"long": "x" * 700_000}
    other = {**copy.deepcopy(GOOD), "id": "7" + GOOD["id"][1:]}
    report = check_qupath(store(tmp_path / "a.geojson", feature, other))
    assert report.ok
    assert report.features == 2


def test_what_qupath_exports_is_accepted(real_data: Any) -> None:
    """QuPath's own export breaks no rule but the winding of RFC 7946, which QuPath does not mind."""
    report = check_qupath(real_data.file("annotations/qupath05_example.geojson"))
    assert set(report.counts) <= {"orientation"}
    assert report.features == 3
