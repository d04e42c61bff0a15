"""The GeoJSON writer: what QuPath accepts, the same bytes every time, whole files or none."""

from __future__ import annotations

import gzip
import json
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.qupath import check_qupath
from helpers.shapes import NUCLEI, ellipses, polygons, regions
from wsi_mmm.errors import OutputError
from wsi_mmm.outputs import sink
from wsi_mmm.outputs.geojson import MANY, GeoJSONWriter, coordinate_texts, object_type
from wsi_mmm.outputs.polygons import empty, part
from wsi_mmm.types import Objects, TaskInfo

TISSUE = TaskInfo("tissue", "segment", ("tumour", "stroma"), ((200, 0, 0), (0, 200, 0)))
TILES = TaskInfo("stain", "classify", ("H&E",), ((1, 2, 3),))


def write(path: Path, *batches: Objects, tasks: tuple[TaskInfo, ...] = (NUCLEI,), slide: str = "f00d") -> bytes:
    with GeoJSONWriter(path, slide, tasks, gzip=path.suffix == ".gz") as writer:
        for objects in batches:
            writer.write(objects)
    return path.read_bytes()


def features(data: bytes) -> list[dict[str, object]]:
    return list(json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)["features"])


@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_qupath_accepts_what_is_written(name: str, tmp_path: Path) -> None:
    """Every rule holds for many objects, holes, odd names, missing measurements, and repaired geometry."""
    some = ellipses(3000)
    some.measurements["area"][::7] = np.nan
    some.measurements["probability"][::14] = np.inf
    bow_tie = polygons([(0, 0), (4, 4), (4, 0), (0, 4)], [(0, 0), (1e-3, 0), (1e-3, 1e-3)])
    rings = replace(regions(np.pad(np.zeros((2, 2)), 3, constant_values=1)), task="tissue")
    write(tmp_path / name, some, bow_tie, rings, tasks=(NUCLEI, TISSUE))
    report = check_qupath(tmp_path / name, size=(10_000, 10_000))
    assert report.ok, report
    assert report.features == 3003
    assert report.object_types == {"detection": 3002, "annotation": 1}
    assert set(report.classes) == {*NUCLEI.classes, "tumour"}


def test_a_feature_says_what_the_object_is(tmp_path: Path) -> None:
    """Geometry, class, colour and measurements arrive as they were given; the id is the UUID v5 of them."""
    objects = polygons([(10, 10), (20.256, 10), (20, 20)], area=[50.5])
    [feature] = features(write(tmp_path / "a.geojson", objects))
    ring = [[10, 10], [20.26, 10], [20, 20], [10, 10]]
    assert feature["geometry"] == {"type": "Polygon", "coordinates": [ring]}
    classification = {"name": "nucleus", "color": [60, 120, 220]}
    measured = {"area": 50.5}
    assert feature["properties"] == {
        "objectType": "detection", "classification": classification, "measurements": measured,
    }  # fmt: skip
    assert uuid.UUID(str(feature["id"])).version == 5


def test_ids_are_of_slide_task_and_geometry(tmp_path: Path) -> None:
    """Another slide or another task gives other ids; measurements and classes do not change them."""
    objects = polygons([(10, 10), (20, 10), (20, 20)])
    same = replace(objects, measurements={"area": np.array([3.0])}, class_index=np.array([1], np.int32))
    task = replace(NUCLEI, name="other")
    ids = [
        features(write(tmp_path / "a.geojson", objects))[0]["id"],
        features(write(tmp_path / "a.geojson", same))[0]["id"],
        features(write(tmp_path / "a.geojson", objects, slide="beef"))[0]["id"],
        features(write(tmp_path / "a.geojson", replace(objects, task="other"), tasks=(task,)))[0]["id"],
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_batches_change_no_byte(name: str, tmp_path: Path) -> None:
    """The file is the same for one batch and for many, and for every repetition."""
    some = ellipses(12_000)
    whole = write(tmp_path / name, some)
    cut = [part(some, a, b) for a, b in ((0, 1), (1, 11_000), (11_000, 11_000), (11_000, 12_000))]
    assert write(tmp_path / f"b{name}", *cut) == whole


def test_no_objects_are_a_valid_file(tmp_path: Path) -> None:
    """A slide without findings gives an empty FeatureCollection that is accepted."""
    write(tmp_path / "a.geojson.gz", empty("nuclei"))
    report = check_qupath(tmp_path / "a.geojson.gz")
    assert report.ok
    assert report.features == 0


def test_kinds_become_object_types() -> None:
    """Instances are detections, tiles tiles, regions annotations until they are many."""
    assert object_type("instances", 10**6) == "detection"
    assert object_type("classify", 5) == "tile"
    assert [object_type("segment", n) for n in (0, MANY, MANY + 1)] == ["annotation", "annotation", "detection"]


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    """When writing stops by an error the old file stays and nothing lies about."""
    path = tmp_path / "a.geojson"
    path.write_text("old")
    with pytest.raises(KeyError):
        write(path, ellipses(10), replace(ellipses(10), task="unknown"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.geojson"]
    assert path.read_text() == "old"


def test_a_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the writing thread reaches the caller as OutputError, and the temporary file goes."""

    def full(self: sink.FileSink, data: bytes) -> None:
        self._error = OSError(28, "No space left on device")

    monkeypatch.setattr(sink.FileSink, "_write_data", full)
    with pytest.raises(OutputError, match="disk is full"):
        write(tmp_path / "a.geojson", ellipses(10))
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where a folder should be is an OutputError that says so."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        GeoJSONWriter(tmp_path / "file" / "a.geojson", "f", [NUCLEI])


numbers = st.one_of(st.integers(0, 999_999_999), st.integers(-(10**7), 10**12))


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=6))
def test_coordinates_as_text_are_the_coordinates(points: list[tuple[int, int]]) -> None:
    """Text parses back to the very numbers, for ordinary, negative and huge values; rings are closed."""
    objects = polygons(np.array(points) / 100, np.array(points)[::-1] / 100)
    for text, ring in zip(coordinate_texts(objects), (points, points[::-1]), strict=True):
        wanted = [[x / 100, y / 100] for x, y in [*ring, ring[0]]]
        assert json.loads(text) == [wanted]
        assert len(text) <= 4 + sum(len(f"{x / 100:.2f}{y / 100:.2f}") + 4 for x, y in [*ring, ring[0]])


def test_many_objects_need_no_memory(tmp_path: Path) -> None:
    """The writer holds a chunk, not the file: 60,000 objects in six batches raise the peak by less than 150 MB."""
    import resource

    batch = ellipses(10_000)
    with GeoJSONWriter(tmp_path / "a.geojson.gz", "f", [NUCLEI]) as writer:
        writer.write(batch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(5):
            writer.write(batch)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024
    assert writer.written == 60_000
