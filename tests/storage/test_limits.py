"""Files that claim or unpack to more than they may: each is refused in one line, before memory is taken for it."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from wsi_mmm.annotations import MAX_COORDINATE, parse_shapes, rasterise
from wsi_mmm.errors import AnnotationError, InputError, ManifestError, StorageError
from wsi_mmm.outputs.exports import read_features
from wsi_mmm.storage import limits
from wsi_mmm.training.data import tables, volumes
from wsi_mmm.training.data.bags import read_h5
from wsi_mmm.training.data.coco import coco, outlines
from wsi_mmm.training.data.images import Origin, read_labels

MB = 1 << 20


@contextmanager
def within(megabytes: float) -> Iterator[None]:
    """What is done takes no more memory at a time than this (as Python and numpy count it)."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * MB, f"{peak / MB:.0f} MB"


def zipped(data: bytes) -> bytes:
    """A zip with one GeoJSON."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.geojson", data)
    return file.getvalue()


@pytest.mark.parametrize("pack", [gzip.compress, zipped])
def test_a_compressed_file_that_unpacks_to_very_much_is_refused_on_the_way(pack: Any) -> None:
    """150 KB that stand for 150 MB: refused at 64 MB, and never held as a whole."""
    bomb = pack(b" " * (150 * MB))
    assert len(bomb) < MB
    with within(100), pytest.raises(AnnotationError, match=r"case.zip: unpacks to more than 100 times"):
        parse_shapes(bomb, "case.zip")


def test_a_compressed_file_of_a_usual_ratio_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times its size beyond what is free; below that any ratio."""
    square = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]}
    many = json.dumps([square] * 500).encode()
    assert len(many) > 50 * len(gzip.compress(many))
    assert len(parse_shapes(gzip.compress(many), "x")) == 500
    monkeypatch.setattr(limits, "FREE", len(many) - 1)
    monkeypatch.setattr(limits, "MAX_RATIO", 10)
    with pytest.raises(AnnotationError, match="10 times its size"):
        parse_shapes(gzip.compress(many), "x")


def test_a_file_is_bounded_unpacked_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest file, in bytes."""
    monkeypatch.setattr(limits, "MAX_BYTES", 10)
    for data in (b"[" + b" " * 20 + b"]", gzip.compress(b"[" + b" " * 20 + b"]")):
        with pytest.raises(AnnotationError, match="more than 0 GiB"):
            parse_shapes(data, "x")


def test_lists_and_objects_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list takes two bytes in a file and a hundred in memory."""
    monkeypatch.setattr(limits, "MAX_LISTS", 1000)
    with pytest.raises(AnnotationError, match="more than 1,000 lists"):
        parse_shapes(b"[" + b"[]," * 1000 + b"[]]", "x")
    monkeypatch.setattr("wsi_mmm.annotations.geojson_file.MAX_OBJECTS", 2)
    point = b'{"type": "Point", "coordinates": [1, 2]}'
    assert len(parse_shapes(b"[" + b",".join([point] * 2) + b"]", "x").dots) == 2
    with pytest.raises(AnnotationError, match="more than 2 objects"):
        parse_shapes(b"[" + b",".join([point] * 3) + b"]", "x")


@pytest.mark.parametrize("number", ["1e300", "-1e300", "3000000000", "9" * 400])
@pytest.mark.parametrize(
    "geometry",
    [
        '{"type": "Polygon", "coordinates": [[[0, 0], [5, 0], [5, 5], [NUMBER, 5], [0, 0]]]}',
        '{"type": "MultiPolygon", "coordinates": [[[[0, 0], [5, 0], [5, 5], [5, NUMBER], [0, 0]]]]}',
        '{"type": "MultiPoint", "coordinates": [[1, 2], [3, NUMBER]]}',
    ],
)
def test_objects_where_no_slide_is_are_refused_or_skipped(geometry: str, number: str) -> None:
    """Drawing an outline that leads to the end of the numbers would take memory for all the way."""
    data = geometry.replace("NUMBER", number).encode()
    if "Point" in geometry and len(number) > 100:
        assert parse_shapes(data, "x").dots[0].x == 1  # an infinite point is skipped, as any that is not finite
        return
    with pytest.raises(AnnotationError, match=r"^x: (object|feature) 0"):
        parse_shapes(data, "x")


def test_a_vast_outline_is_drawn_where_the_mask_is() -> None:
    """A polygon four thousand million px across: what lies outside of the mask takes neither memory nor time."""
    far = MAX_COORDINATE
    ring = [[-far, 5], [far, 5], [far, far], [-far, far], [-far, 5]]
    shapes = parse_shapes(json.dumps({"type": "Polygon", "coordinates": [ring]}).encode(), "x")
    with within(20):
        mask = rasterise(shapes, (20, 30), scale_x=1.0, scale_y=1.0)
    assert mask[5:].all() and not mask[:4].any()


def test_nesting_without_end_is_one_line() -> None:
    """JSON and XML a million deep."""
    deep = 1_000_000
    for data in (b"[" * deep + b"]" * deep, b'{"type":' * deep, b"<a>" * deep + b"</a>" * deep):
        with pytest.raises(AnnotationError, match=r"^x: "):
            parse_shapes(data, "x")


def test_coordinates_of_many_dimensions_are_no_polygon() -> None:
    """Deep lists that JSON can hold and an array cannot."""
    deep = b",".join([b"[" * 200 + b"1" + b"]" * 200] * 4)
    for kind, coordinates in ((b"Polygon", b"[[" + deep + b"]]"), (b"MultiPolygon", b"[[[" + deep + b"]]]")):
        with pytest.raises(AnnotationError, match="feature 0"):
            parse_shapes(b'{"type": "' + kind + b'", "coordinates": ' + coordinates + b"}", "x")


def test_an_order_without_end_is_refused() -> None:
    """ASAP's Order may be any number; infinity is none."""
    point = b'<Annotation Type="Polygon"><Coordinate X="1" Y="1" Order="1e999"/></Annotation>'
    with pytest.raises(AnnotationError, match="annotation 0"):
        parse_shapes(b"<ASAP_Annotations>" + point + b"</ASAP_Annotations>", "x")


# ---------------------------------------------------------------- training data


def test_an_array_file_that_claims_terabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    """Its shape is looked at before memory is taken; an archive of arrays is none."""
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i4", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
        )
    with within(20), pytest.raises(InputError, match="not integers"):
        read_labels(str(path))
    np.savez(tmp_path / "b.npz", a=np.zeros((2, 2), np.int32))
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(InputError, match="no array file"):
        read_labels(str(tmp_path / "b.npy"))
    np.save(tmp_path / "c.npy", np.array([[1, 2], [3, 4]], np.int64))
    assert read_labels(str(tmp_path / "c.npy")).tolist() == [[1, 2], [3, 4]]


def test_a_store_of_features_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    """HDF5 and Zarr leave out what is all fill value: a kilobyte claims terabytes."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (1 << 24, 1 << 20), "f4", chunks=(16, 16))
        file.create_dataset("coords", (1 << 24, 2), "i8", chunks=(16, 2))
    with within(20), pytest.raises(StorageError, match="claims float32"):
        read_h5(str(tmp_path / "a.h5"))
    group = zarr.create_group(tmp_path / "b.zarr")
    for name in ("features", "coords"):
        group.create_array(name, shape=(1 << 24, 1 << 20), chunks=(16, 16), dtype="f4")
    with within(20), pytest.raises(StorageError, match=r"no features\.zarr"):
        read_features(str(tmp_path / "b.zarr"))


def test_features_that_lie_in_other_files_are_refused(tmp_path: Path) -> None:
    """A file of HDF5 can name any other on the machine; its bytes would become features."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    for name in ("external", "link", "virtual"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("coords", data=np.zeros((4, 2), np.int64))
            if name == "external":
                file.create_dataset("features", (4, 4), "f4", external=[(str(secret), 0, 64)])
            elif name == "link":
                file["features"] = h5py.ExternalLink(str(tmp_path / "external.h5"), "features")
            else:
                layout = h5py.VirtualLayout((4, 2), "i8")
                layout[:] = h5py.VirtualSource(str(tmp_path / "external.h5"), "coords", (4, 2))
                file.create_virtual_dataset("features", layout)
        with pytest.raises(StorageError, match=r"features (lies in other files|is no data set of this file)"):
            read_h5(str(tmp_path / f"{name}.h5"))


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        ({"size": [100_000, 100_000], "counts": "abc"}, "a mask of"),
        ({"size": [1 << 40, 1], "counts": [1 << 40]}, "a mask of"),
        ({"counts": "abc"}, "a mask of"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "a corner beyond"),
        ([[0, 0, float("nan"), 0, 5, 5]], "a corner beyond"),
        ([], "cannot be drawn"),
        (3, "cannot be drawn"),
    ],
)
def test_outlines_of_coco_are_looked_at_before_they_are_drawn(drawn: Any, words: str) -> None:
    """The library that draws them trusts sizes and coordinates."""
    pytest.importorskip("pycocotools")
    with within(20), pytest.raises(InputError, match=words):
        outlines([{"id": 1, "segmentation": drawn}], (8, 8))


@pytest.mark.parametrize(
    "pictures", [[3], [{"file_name": "a", "width": "x", "height": 1}], [{"width": 1e6, "height": 1e6}]]
)
def test_pictures_of_coco_have_sizes(tmp_path: Path, pictures: list[Any]) -> None:
    """What is no picture, or one too large, is refused."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": pictures, "annotations": [], "categories": []}))
    if pictures == [3]:
        assert coco(Origin("d"), str(tmp_path), str(file), task="t", kind="detect", classes=["a"]).index.keys == []
        return
    with pytest.raises(InputError, match="too large for a patch"):
        coco(Origin("d"), str(tmp_path), str(file), task="t", kind="detect", classes=["a"])


def test_a_table_that_repeats_itself_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet says a value once, however often it stands there: cells and bytes are counted."""
    path = tmp_path / "a.parquet"
    one = pa.array(["x" * 100_000])
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(40_000, np.int32)), one)
    pq.write_table(pa.table({"slide": many}), path)
    assert path.stat().st_size < MB
    with pytest.raises(ManifestError, match="holds more than 1024 MiB"):
        tables.read_table(str(path))
    monkeypatch.setattr(tables, "MAX_CELLS", 100)
    with pytest.raises(ManifestError, match=r"40,000 cells, more than 100"):
        tables.read_table(str(path))


def test_a_deflated_dicom_file_is_refused(tmp_path: Path) -> None:
    """It is unpacked as a whole by the library that reads it."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset

    data = pydicom.Dataset()
    data.PatientID, data.file_meta = "p", FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    pydicom.dcmwrite(tmp_path / "a.dcm", data, enforce_file_format=True)
    with pytest.raises(InputError, match="deflated"):
        volumes.dicom_slices("d", str(tmp_path), task="t")
