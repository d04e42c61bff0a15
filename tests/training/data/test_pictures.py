"""Folders of patches, COCO files and slices of volumes: what is read is what was written, and faults have names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_mmm.errors import InputError
from wsi_mmm.tasks.targets import Boxes
from wsi_mmm.training.data import images, volumes
from wsi_mmm.training.data.coco import coco
from wsi_mmm.training.data.folders import class_folders, image_class_masks, image_instances, image_masks
from wsi_mmm.training.data.images import Origin, read_image, read_labels, resample_target, resampled

RNG = np.random.default_rng(3)


def picture(path: Path, height: int = 12, width: int = 16) -> np.ndarray:
    """A random picture in a file."""
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def label_image(path: Path, values: np.ndarray) -> None:
    """A grey picture of these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_class_folders_give_pictures_classes_and_patients(tmp_path: Path) -> None:
    """Every picture with the class of its folder, renamed or left out as said, grouped by what the pattern finds."""
    pixels = picture(tmp_path / "TUM" / "p1-a.png")
    picture(tmp_path / "TUM" / "deep" / "p2-a.png")
    picture(tmp_path / "normal" / "p1-b.png")
    picture(tmp_path / "odd" / "p3-b.png")
    source = class_folders(
        Origin("crc", r"(p\d)-"),
        str(tmp_path), task="tissue", classes=["tumour", "normal"], folders={"TUM": "tumour", "odd": ""},
    )  # fmt: skip
    assert source.index.keys == ["TUM/deep/p2-a.png", "TUM/p1-a.png", "normal/p1-b.png"]
    assert source.index.groups == ["p2", "p1", "p1"] and source.index.labels.tolist() == [0, 0, 1]
    sample = source.read([1], 8)[0]
    assert np.array_equal(sample.pixels, pixels) and sample.targets == {"tissue": 0}
    with pytest.raises(InputError, match=r"odd/p3-b\.png lies in no folder of a class"):
        class_folders(Origin("crc"), str(tmp_path), task="tissue", classes=["TUM", "normal"])
    picture(tmp_path / "divided" / "train" / "normal" / "p4-b.png")
    picture(tmp_path / "divided" / "val" / "TUM" / "p5-b.png")
    below = class_folders(Origin("crc"), str(tmp_path / "divided"), task="t", classes=["TUM", "normal"])
    assert below.index.keys == ["train/normal/p4-b.png", "val/TUM/p5-b.png"] and below.index.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match="group pattern does not fit"):
        class_folders(Origin("crc", r"(p2)"), str(tmp_path), task="t", classes=["normal", "TUM", "odd"])
    with pytest.raises(InputError, match="no pattern with one group"):
        class_folders(Origin("crc", "p"), str(tmp_path), task="t", classes=["normal", "TUM", "odd"])


def test_a_picture_that_cannot_be_read_is_a_failed_sample(tmp_path: Path) -> None:
    """It says why, and the others are read."""
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"no picture")
    good, bad = class_folders(Origin("d"), str(tmp_path), task="t", classes=["a"]).read([0, 1], 8)
    assert good.failed == "" and "no readable picture" in bad.failed and bad.pixels is None


def test_masks_are_classes_by_a_table(tmp_path: Path) -> None:
    """Values become classes, 255 is unknown by default, a value without meaning fails its picture by name."""
    picture(tmp_path / "images" / "1.png", 2, 3)
    picture(tmp_path / "images" / "2.png", 2, 3)
    label_image(tmp_path / "masks" / "1.png", np.array([[0, 1, 255], [1, 0, 0]], np.uint8))
    label_image(tmp_path / "masks" / "2.png", np.array([[0, 9, 0], [1, 0, 0]], np.uint8))
    where = str(tmp_path / "images"), str(tmp_path / "masks")
    one, two = image_masks(Origin("d"), *where, task="t", classes=2).read([0, 1], 8)
    assert np.array_equal(one.targets["t"], [[0, 1, -1], [1, 0, 0]])  # type: ignore[arg-type]
    assert "holds the value 9" in two.failed
    table = {0: 1, 9: 0, 1: -1}
    two = image_masks(Origin("d"), *where, task="t", classes=2, values=table).read([1], 8)[0]
    assert np.array_equal(two.targets["t"], [[1, 0, 1], [-1, 1, 1]])  # type: ignore[arg-type]
    label_image(tmp_path / "masks" / "1.png", np.zeros((3, 3), np.uint8))
    assert (
        "is 3 x 3 px, its picture 2 x 3" in image_masks(Origin("d"), *where, task="t", classes=2).read([0], 8)[0].failed
    )
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(InputError, match=r"no label image 1\.png"):
        image_masks(Origin("d"), *where, task="t", classes=2)


def test_masks_per_class_know_nothing_of_classes_without_one(tmp_path: Path) -> None:
    """A missing mask is unknown, not absent."""
    picture(tmp_path / "images" / "1.png", 2, 2)
    label_image(tmp_path / "masks" / "gland" / "1.png", np.array([[0, 255], [0, 255]], np.uint8))
    label_image(tmp_path / "masks" / "vessel" / "1.png", np.array([[1, 255], [0, 0]], np.uint8))
    source = image_class_masks(
        Origin("d"), str(tmp_path / "images"), str(tmp_path / "masks"), task="t", classes=["gland", "nerve", "vessel"]
    )
    target = source.read([0], 8)[0].targets["t"]
    assert np.array_equal(target, [[[0, 1], [0, 1]], [[-1, -1], [-1, -1]], [[1, -1], [0, 0]]])  # type: ignore[arg-type]


def test_instances_keep_numbers_above_a_byte(tmp_path: Path) -> None:
    """16-bit pictures and arrays hold thousands of objects."""
    picture(tmp_path / "images" / "1.png", 2, 2)
    picture(tmp_path / "images" / "2.png", 2, 2)
    label_image(tmp_path / "labels" / "1.png", np.array([[0, 40000], [7, 0]], np.uint16))
    np.save(tmp_path / "labels" / "2.npy", np.array([[0, 70000], [7, 0]]))
    source = image_instances(Origin("d"), str(tmp_path / "images"), str(tmp_path / "labels"), task="t")
    found = [int(sample.targets["t"].max()) for sample in source.read([0, 1], 8)]  # type: ignore[union-attr]
    assert found == [40000, 70000]
    np.save(tmp_path / "labels" / "2.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(InputError, match="no array file"):
        read_labels(str(tmp_path / "labels" / "2.npy"))


def test_instances_of_several_classes(tmp_path: Path) -> None:
    """The class of each object's px from a second label image; unknown where there is none, or it says so."""
    picture(tmp_path / "images" / "1.png", 2, 3)
    label_image(tmp_path / "labels" / "1.png", np.array([[0, 5, 5], [7, 0, 9]], np.uint16))
    label_image(tmp_path / "classes" / "1.png", np.array([[1, 1, 1], [0, 0, 255]], np.uint8))
    places = str(tmp_path / "images"), str(tmp_path / "labels")
    source = image_instances(Origin("d"), *places, task="t", classes=str(tmp_path / "classes"), count=2)
    target = source.read([0], 8)[0].targets["t"]
    assert np.array_equal(target, [[[0, 5, 5], [7, 0, 9]], [[-1, 1, 1], [0, -1, -1]]])  # type: ignore[arg-type]
    plain = image_instances(Origin("d"), *places, task="t", count=2).read([0], 8)[0].targets["t"]
    assert np.array_equal(plain, [[[0, 5, 5], [7, 0, 9]], np.full((2, 3), -1)])  # type: ignore[arg-type]


def test_colour_masks_and_huge_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both say what to do instead."""
    picture(tmp_path / "1.png")
    with pytest.raises(InputError, match="save class numbers as grey or palette"):
        read_labels(str(tmp_path / "1.png"))
    monkeypatch.setattr(images, "MAX_PX", 100)
    with pytest.raises(InputError, match="list it as a slide"):
        read_image(str(tmp_path / "1.png"))


def test_transparent_and_grey_pictures_become_rgb(tmp_path: Path) -> None:
    """What is transparent is white; 16-bit grey keeps its range."""
    Image.fromarray(np.array([[[9, 9, 9, 0], [9, 8, 7, 255]]], np.uint8)).save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png")).tolist() == [[[255, 255, 255], [9, 8, 7]]]
    label_image(tmp_path / "b.png", np.array([[0, 65535]], np.uint16))
    assert read_image(str(tmp_path / "b.png")).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_resampling_moves_pixels_and_truth_alike() -> None:
    """Halved, an image of blocks and its labels and boxes still agree."""
    labels = np.kron(np.arange(6).reshape(2, 3), np.ones((4, 4), int)).astype(np.int32)
    pixels = np.repeat((labels * 40)[..., None], 3, axis=2).astype(np.uint8)
    small, target = resampled(pixels, 0.5), resample_target(labels, 0.5)
    assert np.array_equal(small[..., 0], target * 40)  # type: ignore[operator]
    moved = resample_target(Boxes(np.array([[4, 0, 8, 4]], np.float32), np.array([1], np.int32), 8, 12), 0.5)
    assert isinstance(moved, Boxes) and moved.xyxy.tolist() == [[2, 0, 4, 2]] and (moved.height, moved.width) == (4, 6)
    assert resample_target(3, 0.5) == 3


def _coco(folder: Path, **changes: object) -> Path:
    picture(folder / "a.png", 10, 10)
    square = [1, 1, 5, 1, 5, 5, 1, 5]
    root = {
        "images": [{"id": 1, "file_name": "a.png", "width": 10, "height": 10}],
        "categories": [{"id": 7, "name": "cell"}, {"id": 9, "name": "dust"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4], "segmentation": [square]},
            {"id": 2, "image_id": 1, "category_id": 9, "bbox": [6, 6, 2, 2], "segmentation": [[6, 6, 8, 6, 8, 8]]},
            {"id": 3, "image_id": 1, "category_id": 7, "bbox": [0, 8, 3, 2], "iscrowd": 1,
             "segmentation": {"size": [10, 10], "counts": [8, 2, 8, 2, 80]}},
        ],
    }  # fmt: skip
    path = folder / "coco.json"
    path.write_text(json.dumps({**root, **changes}))
    return path


def test_coco_gives_boxes_and_outlines(tmp_path: Path) -> None:
    """Boxes with their class, crowds as unknown areas, outlines where they were drawn, categories left out as said."""
    path = str(_coco(tmp_path))
    common = {"task": "t", "classes": ["cell"], "categories": {"dust": ""}}
    found = coco(Origin("d"), str(tmp_path), path, kind="detect", **common).read([0], 8)[0].targets["t"]  # type: ignore[arg-type]
    assert isinstance(found, Boxes)
    assert found.xyxy.tolist() == [[1, 1, 5, 5], [0, 8, 3, 10]] and found.labels.tolist() == [0, -1]
    drawn = coco(Origin("d"), str(tmp_path), path, kind="instances", **common).read([0], 8)[0].targets["t"]  # type: ignore[arg-type]
    assert isinstance(drawn, np.ndarray)
    assert (drawn[1:5, 1:5] == 1).all() and (drawn == 1).sum() == 16
    assert (drawn == -1).sum() == 4 and (drawn[8:, :2] == -1).all()
    with pytest.raises(InputError, match="category 'dust' is no class"):
        coco(Origin("d"), str(tmp_path), path, task="t", kind="detect", classes=["cell"])


def test_coco_files_cannot_lead_elsewhere(tmp_path: Path) -> None:
    """A file name that leaves the folder, no COCO at all, a giant picture: refused by name."""
    common = {"task": "t", "kind": "detect", "classes": ["cell", "dust"]}
    for name in ("../a.png", "/etc/passwd", "s3://b/a.png"):
        path = _coco(tmp_path, images=[{"id": 1, "file_name": name}])
        with pytest.raises(InputError, match="outside the folder"):
            coco(Origin("d"), str(tmp_path), str(path), **common)  # type: ignore[arg-type]
    path = _coco(tmp_path, images=[{"id": 1, "file_name": "a.png", "width": 10**6, "height": 10**6}])
    with pytest.raises(InputError, match="too large"):
        coco(Origin("d"), str(tmp_path), str(path), **common)  # type: ignore[arg-type]
    path.write_text("[]")
    with pytest.raises(InputError, match="no COCO file"):
        coco(Origin("d"), str(tmp_path), str(path), **common)  # type: ignore[arg-type]


def test_slices_of_a_nifti_volume(tmp_path: Path) -> None:
    """Each slice in grey between the window's values, with its label slice, grouped by volume."""
    nibabel = pytest.importorskip("nibabel")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    values = np.zeros((4, 5, 3), np.float32)
    values[..., 1], values[..., 2] = 50, 100
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "images" / "v1.nii.gz")
    nibabel.save(nibabel.Nifti1Image((values == 100).astype(np.uint8), np.eye(4)), tmp_path / "labels" / "v1.nii.gz")
    source = volumes.nifti_slices(
        "ct", str(tmp_path / "images"), str(tmp_path / "labels"), task="organ", window=(0, 100)
    )
    assert source.index.keys == ["v1.nii.gz#0", "v1.nii.gz#1", "v1.nii.gz#2"] and set(source.index.groups) == {
        "v1.nii.gz"
    }
    low, middle, high = source.read([0, 1, 2], 8)
    assert low.pixels is not None and middle.pixels is not None and high.pixels is not None
    assert low.pixels.max() == 0 and set(middle.pixels.ravel()) == {128} and high.pixels.min() == 255
    assert low.targets["organ"].max() == 0 and high.targets["organ"].min() == 1  # type: ignore[union-attr]
    (tmp_path / "images" / "v1.nii.gz").write_bytes(b"no volume")
    with pytest.raises(InputError, match="no readable NIfTI"):
        volumes.nifti_slices("ct", str(tmp_path / "images"), task="organ")


def test_slices_of_dicom_files(tmp_path: Path) -> None:
    """Values rescaled and windowed as the file says, grouped by patient; a damaged file fails by name."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    data = FileDataset("s", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.PatientID = pydicom.uid.CTImageStorage, "1.2.3", "patient 1"
    data.Rows, data.Columns, data.SamplesPerPixel, data.BitsAllocated = 2, 2, 1, 16
    data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 15, 0
    data.PhotometricInterpretation = "MONOCHROME2"
    data.RescaleSlope, data.RescaleIntercept, data.WindowCenter, data.WindowWidth = "1", "-1000", "0", "200"
    data.PixelData = np.array([[900, 1000], [1100, 2000]], np.uint16).tobytes()
    data.save_as(tmp_path / "slice.dcm", enforce_file_format=True)
    source = volumes.dicom_slices("ct", str(tmp_path), task="organ", label=lambda patient: len(patient))
    sample = source.read([0], 8)[0]
    assert source.index.groups == ["patient 1"] and sample.targets == {"organ": 9}
    assert sample.pixels is not None and sample.pixels[..., 0].tolist() == [[0, 128], [255, 255]]
    (tmp_path / "slice.dcm").write_bytes(b"no file")
    with pytest.raises(InputError, match="no readable DICOM"):
        volumes.dicom_slices("ct", str(tmp_path), task="organ")
