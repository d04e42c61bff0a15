"""Data sets as a configuration lists them: each kind opens from TOML and gives what its files say."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shapely.geometry import Polygon, box

from helpers.annotation_targets import discs, geojson, patches, save
from wsi_mmm.errors import ConfigError, InputError
from wsi_mmm.outputs.exports import write_features
from wsi_mmm.slides.fake import SyntheticNuclei
from wsi_mmm.tasks.targets import Boxes, Survival
from wsi_mmm.training.config import TrainConfig, parse
from wsi_mmm.training.data.bags import TileBagSource
from wsi_mmm.training.data.base import DataSource, Sample
from wsi_mmm.training.data.coco import coco
from wsi_mmm.training.data.images import Origin
from wsi_mmm.training.data.slide_entries import SlideLabels, TileBags
from wsi_mmm.training.data.slides import SlideTiles
from wsi_mmm.training.job import data_context, read_annotations

TASKS = {
    "classify": 'classes = ["dark", "pale"]',
    "segment": 'classes = ["background", "disc"]',
    "instances": 'classes = ["nucleus"]',
    "detect": 'classes = ["nucleus"]',
    "multisegment": 'classes = ["left", "right"]',
    "multilabel": 'classes = ["left", "right"]',
    "reconstruct": 'classes = ["pixels"]',
    "regress": 'classes = ["age"]',
    "survive": 'classes = ["death"]',
}


def config(data: str, *kinds: str, scope: str = "tile", size: int = 128) -> TrainConfig:
    """The configuration with this ``[[data]]`` table and a task per kind, each called by its kind."""
    tasks = "".join(f'[[task]]\nname = "{k}"\nkind = "{k}"\nscope = "{scope}"\n{TASKS[k]}\n' for k in kinds)
    return parse(tomllib.loads(f"[model]\ntile_size = {size}\n{tasks}[[data]]\nname = 'd'\n{data}"))


def opened(data: str, *kinds: str, **more: Any) -> DataSource:
    """The source of the first data set."""
    found = config(data, *kinds, **more)
    return found.data[0].open(data_context(found))


def whole(source: DataSource, size: int = 128) -> list[Sample]:
    """Every sample, none of which failed."""
    samples = source.read(range(len(source.index)), size)
    assert samples and not [sample.failed for sample in samples if sample.failed]
    return samples


# ---------------------------------------------------------------- pictures


def test_class_folders(tmp_path: Path) -> None:
    """Folders are classes, mapped by a table; paths say the patient; the files' mpp scales them to the model's."""
    patches(tmp_path / "all")
    (tmp_path / "all" / "dark").rename(tmp_path / "all" / "Dark ones")
    save(tmp_path / "all" / "junk" / "p0-0.png", np.zeros((8, 8, 3)))
    text = f"""kind = "class-folders"
    task = "classify"
    path = "{tmp_path}/all"
    folders = {{ "Dark ones" = "dark", junk = "" }}
    group = "/(p[0-9]+)-"
    mpp = 0.25
    batch = 3
    weight = 2.0"""
    source = opened(text, "classify")
    assert source.index.labels.tolist() == [0] * 8 + [1] * 8 and set(source.index.groups) == {"p0", "p1", "p2", "p3"}
    samples = whole(source)
    assert samples[0].pixels is not None and samples[0].pixels.shape == (16, 16, 3)  # 0.25 -> 0.5 mpp
    assert [sample.targets["classify"] for sample in samples] == [0] * 8 + [1] * 8
    entry = config(text, "classify").data[0]
    assert (entry.batch, entry.weight, entry.tasks) == (3, 2.0, ("classify",))


def test_image_masks(tmp_path: Path) -> None:
    """Px values become classes by a table; the wrong class name and the wrong kind of task are named."""
    discs(tmp_path)
    text = f"""kind = "image-masks"
    task = "segment"
    images = "{tmp_path}/images"
    masks = "{tmp_path}/masks"
    values = {{ 0 = "background", 1 = "disc", 255 = "" }}"""
    for sample in whole(opened(text, "segment")):
        target = np.asarray(sample.targets["segment"])
        assert np.unique(target).tolist() == [-1, 0, 1] and (target[0] == -1).all()
    with pytest.raises(ConfigError, match="values name 'ring'; classes are background, disc"):
        opened(text.replace('"disc"', '"ring"'), "segment")
    with pytest.raises(ConfigError, match="is for tasks of kind segment or multisegment, not 'classify'"):
        opened(text.replace('task = "segment"', 'task = "classify"'), "classify")


def test_image_masks_of_classes_that_may_overlap(tmp_path: Path) -> None:
    """For `multisegment`: a folder of masks per class."""
    save(tmp_path / "images" / "a.png", np.full((16, 16, 3), 200))
    for name, columns in (("left", slice(0, 10)), ("right", slice(6, 16))):
        mask = np.zeros((16, 16))
        mask[:, columns] = 1
        save(tmp_path / "masks" / name / "a.png", mask)
    text = f'kind = "image-masks"\ntask = "multisegment"\nimages = "{tmp_path}/images"\nmasks = "{tmp_path}/masks"'
    target = np.asarray(whole(opened(text, "multisegment"))[0].targets["multisegment"])
    assert target.shape == (2, 16, 16) and target.sum() == 20 * 16 and (target.sum(axis=0) == 2).sum() == 4 * 16


def test_image_instances_and_coco(tmp_path: Path) -> None:
    """Numbers of objects from an instance image; the same object from a COCO file, as an outline and as a box."""
    labels = np.zeros((16, 20), np.uint8)
    labels[2:8, 4:12] = 1
    save(tmp_path / "images" / "a.png", np.full((16, 20, 3), 200))
    save(tmp_path / "labels" / "a.png", labels)
    text = f'kind = "image-instances"\ntask = "instances"\nimages = "{tmp_path}/images"\nlabels = "{tmp_path}/labels"'
    assert (np.asarray(whole(opened(text, "instances"))[0].targets["instances"]) == labels).all()
    outline = [4, 2, 12, 2, 12, 8, 4, 8]
    notes = {
        "images": [{"id": 1, "file_name": "a.png", "height": 16, "width": 20}],
        "categories": [{"id": 5, "name": "cell"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [4, 2, 8, 6], "area": 48, "iscrowd": 0,
                         "segmentation": [outline]}],
    }  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(notes))
    text = f"""kind = "coco"
    task = "detect"
    images = "{tmp_path}/images"
    annotations = "{tmp_path}/coco.json"
    categories = {{ cell = "nucleus" }}"""
    boxes = whole(opened(text, "detect"))[0].targets["detect"]
    assert isinstance(boxes, Boxes) and boxes.xyxy.tolist() == [[4, 2, 12, 8]]
    drawn = whole(opened(text.replace("detect", "instances"), "instances"))[0].targets["instances"]
    assert (np.asarray(drawn) > 0).sum() == 48
    several = coco(
        Origin("d"), str(tmp_path / "images"), str(tmp_path / "coco.json"),
        task="t", kind="instances", classes=["other", "nucleus"], categories={"cell": "nucleus"},
    )  # fmt: skip
    numbers, classes = np.asarray(several.read([0], 8)[0].targets["t"])
    assert np.array_equal(classes == 1, numbers == 1) and (numbers == 1).sum() == 48


def test_nifti(tmp_path: Path) -> None:
    """Slices along an axis with their labels, grey by a window."""
    nibabel = pytest.importorskip("nibabel")
    values = np.zeros((8, 9, 3), np.float32)
    labels = np.zeros((8, 9, 3), np.uint8)
    values[2:5, 3:6, 1], labels[2:5, 3:6, 1] = 100, 1
    for name, volume in (("images", values), ("labels", labels)):
        (tmp_path / name).mkdir()
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / name / "p1.nii.gz")
    text = f"""kind = "nifti"
    task = "segment"
    images = "{tmp_path}/images"
    labels = "{tmp_path}/labels"
    axis = 2
    values = {{ 0 = "background", 1 = "disc" }}
    window = [0.0, 100.0]"""
    samples = whole(opened(text, "segment"))
    assert len(samples) == 3
    assert [int((np.asarray(sample.targets["segment"]) == 1).sum()) for sample in samples] == [0, 9, 0]
    assert samples[1].pixels is not None and samples[1].pixels.max() == 255


def test_dicom(tmp_path: Path) -> None:
    """Slices with what a table says of their patient; a patient that it does not list is unknown."""
    pytest.importorskip("pydicom")
    for name in ("one", "two"):
        dicom(tmp_path / "ct" / f"{name}.dcm", name)
    (tmp_path / "patients.csv").write_text("patient,grade\none,bad\n")
    text = f"""kind = "dicom"
    task = "classify"
    images = "{tmp_path}/ct"
    window = [0.0, 100.0]
    [data.patients]
    table = "{tmp_path}/patients.csv"
    columns = ["grade"]
    values = {{ bad = "dark", good = "pale" }}"""
    source = opened(text, "classify")
    assert [sample.targets["classify"] for sample in whole(source)] == [0, None]
    assert list(source.index.groups) == ["one", "two"]
    assert source.read([0], 8)[0].pixels[..., 0].tolist() == [[0, 128], [255, 255]]  # type: ignore[union-attr]


def dicom(path: Path, patient: str) -> None:
    """A CT slice of 2 x 2 px."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    data = FileDataset("s", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.PatientID = pydicom.uid.CTImageStorage, "1.2.3", patient
    data.Rows, data.Columns, data.SamplesPerPixel, data.BitsAllocated = 2, 2, 1, 16
    data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 15, 0
    data.PhotometricInterpretation = "MONOCHROME2"
    data.PixelData = np.array([[0, 50], [100, 900]], np.uint16).tobytes()
    path.parent.mkdir(exist_ok=True)
    data.save_as(path, enforce_file_format=True)


# ---------------------------------------------------------------- slides


@pytest.fixture
def study(tiny_slide: Path, tiny_truth: SyntheticNuclei, tmp_path: Path) -> Path:
    """Two copies of the tiny slide, of two patients, with their nuclei and a region in QuPath's words."""
    for name in ("p1_a", "p2_a"):
        (tmp_path / f"{name}.tiff").symlink_to(tiny_slide)
        shapes: list[tuple[str, Any]] = [("Looked at", box(0, 0, 1024, 1152)), ("Left side", box(0, 0, 512, 1152))]
        shapes += [("Cell, tumour", Polygon(xy)) for xy in tiny_truth.polygons[:100]]
        geojson(tmp_path / f"{name}.geojson", shapes)
    return tmp_path


NUCLEI = """
[data.shapes.instances]
complete = false
buckets = [
  { label = "use", pattern = "Looked at" },
  { label = "drop", pattern = "Left side" },
  { label = "nucleus", pattern = "cell", how = "prefix", any_case = true },
]"""


def test_slides_with_annotations(study: Path) -> None:
    """QuPath's classes become labels by the bucket table, the first task chooses the tiles, ids give the patients."""
    text = f"""kind = "slides"
    task = ["instances", "detect"]
    slides = ["{study}/p1_a.tiff", "{study}/p2_a.tiff"]
    annotations = "{{folder}}/{{stem}}.geojson"
    group = "^(p[0-9])"
    per_slide = 4
    {NUCLEI}
    [data.shapes.detect]
    buckets = [{{ label = "nucleus", pattern = "Cell.*", how = "regex" }}]
    complete = true"""
    source = opened(text, "instances", "detect")
    assert set(source.index.groups) == {"p1", "p2"} and source.tasks == ("instances", "detect")
    samples = whole(source)
    assert len(samples) == 8
    assert any(np.asarray(sample.targets["instances"]).max() > 0 for sample in samples)
    assert all(isinstance(sample.targets["detect"], Boxes) for sample in samples)
    with pytest.raises(InputError, match="the group pattern finds no patient in 'p1_a'"):
        opened(text.replace("^(p[0-9])", "^(q[0-9])"), "instances", "detect")
    with pytest.raises(ConfigError, match="shapes name the task 'detect', which is not one of its tasks"):
        opened(text.replace('["instances", "detect"]', '["instances"]'), "instances")


def test_slides_that_nobody_annotated_may_be_left_out(study: Path, tmp_path: Path) -> None:
    """By default they are an error that names the file; with ``needed = false`` the others are learnt from."""
    tmp_path = tmp_path / "some"
    tmp_path.mkdir()
    for name in ("p1_a.tiff", "p1_a.geojson", "p2_a.tiff"):
        (tmp_path / name).symlink_to(study / name)
    slides = [f"{tmp_path}/p1_a.tiff", f"{tmp_path}/p2_a.tiff"]
    text = f'kind = "slides"\ntask = "instances"\nslides = {slides}\nper_slide = 4\n'
    with pytest.raises(InputError, match=r"p2_a\.geojson"):
        opened(text + NUCLEI, "instances")
    source = opened(text + "needed = false\n" + NUCLEI, "instances")
    assert set(source.index.groups) == {"p1_a"} and len(source.index) == 4
    (tmp_path / "p1_a.geojson").unlink()
    with pytest.raises(InputError, match="none of its 2 slides has annotations at"):
        opened(text + "needed = false\n" + NUCLEI, "instances")


def test_the_dry_run_says_what_becomes_of_annotations(study: Path) -> None:
    """Per task a line per class with its label, rule and area, and what no rule fits."""
    text = f'kind = "slides"\ntask = "instances"\nslides = "{study}/p1_a.tiff"\n{NUCLEI}'
    found = read_annotations(config(text.replace('"Left side"', '"Right side"'), "instances"))
    one = found["d"]["instances"]
    by_class = {line.class_name: line for line in one.lines}
    assert (by_class["Cell, tumour"].label, by_class["Cell, tumour"].objects) == ("nucleus", 100)
    assert by_class["Looked at"].label == "use" and by_class["Looked at"].area_mm2 == pytest.approx(0.2949, abs=1e-3)
    assert one.unmatched == ("Left side",) and "no rule fits: Left side" in one.table()


def test_slides_without_truth_and_kinds_that_do_not_fit(study: Path) -> None:
    """`reconstruct` learns from tissue alone; a kind that learns nothing from annotations says what to give."""
    text = f'kind = "slides"\ntask = "reconstruct"\nslides = "{study}/p1_a.tiff"\nper_slide = 2\n'
    with pytest.raises(ConfigError, match="task 'reconstruct' of kind 'reconstruct': set annotations = \"none\""):
        opened(text, "reconstruct")
    bare = text + 'annotations = "none"\n'
    assert len(whole(opened(bare, "reconstruct"))) == 2
    assert read_annotations(config(bare, "reconstruct")) == {}
    survival = f'kind = "slides"\ntask = "survive"\nslides = "{study}/p1_a.tiff"'
    with pytest.raises(ConfigError, match=r"task 'survive' of kind 'survive': .*take it from a slide-table"):
        opened(survival, "survive")


def table(folder: Path, **more: list[str]) -> Path:
    """A row per slide of the study."""
    columns = {
        "slide": ["p1_a", "p2_a"], "file": ["p1_a.tiff", "p2_a.tiff"], "patient": ["p1", "p2"],
        "stain": ["HE", "IHC"], "age": ["61", "NA"], "months": ["10", "30"], "died": ["1", "0"], **more,
    }  # fmt: skip
    path = folder / "slides.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


def of_table(study: Path, kind: str, more: str = "") -> str:
    return f"""kind = "{kind}"
    {more}
    [data.slides]
    table = "{table(study)}"
    uri = "file"
    root = "{study}/"
    patient = "patient"
    [data.slides.truth.classify]
    columns = ["stain"]
    values = {{ HE = "dark", IHC = "pale" }}
    [data.slides.truth.regress]
    columns = ["age"]
    [data.slides.truth.survive]
    columns = ["months", "died"]"""


KINDS = ("classify", "regress", "survive")


def test_slide_table(study: Path) -> None:
    """Tissue tiles with what a table says of their slide; empty cells are unknown."""
    source = opened(of_table(study, "slide-table", "per_slide = 2"), *KINDS)
    samples = whole(source)
    assert [sample.targets["classify"] for sample in samples] == [0, 0, 1, 1]
    assert source.index.labels.tolist() == [0, 0, 1, 1] and list(source.index.groups) == ["p1", "p1", "p2", "p2"]
    assert np.asarray(samples[0].targets["regress"]).tolist() == [61.0]
    assert samples[2].targets.get("regress") is None or np.isnan(np.asarray(samples[2].targets["regress"])).all()
    assert samples[0].targets["survive"] == Survival(10.0, True)


@pytest.mark.parametrize("kind", ["slide-table", "tile-bags"])
def test_the_mpp_of_the_entry_holds_for_tables_too(study: Path, kind: str) -> None:
    """``mpp_override`` says what px measure where the row does not: at 1.0 mpp a slide has four times the tiles."""
    scope = "bag" if kind == "tile-bags" else "tile"
    entry = config(of_table(study, kind, "mpp_override = 1.0"), *KINDS, scope=scope).data[0]
    assert isinstance(entry, SlideLabels | TileBags)
    found = entry.slides.items(data_context(config(of_table(study, kind), *KINDS, scope=scope)), entry.mpp_override)
    assert [item.mpp for item in found] == [1.0, 1.0]
    source = entry.open(data_context(config(of_table(study, kind), *KINDS, scope=scope)))
    assert isinstance(source, SlideTiles | TileBagSource)
    scales = [one.scale for one in source.slides] if isinstance(source, SlideTiles) else source.scales
    assert list(scales) == [(0.5, 0.5)] * 2


def test_tile_bags(study: Path) -> None:
    """Bags of tiles, drawn several times of each slide."""
    source = opened(of_table(study, "tile-bags", "most = 3\ntimes = 2"), *KINDS, scope="bag")
    samples = whole(source)
    assert len(samples) == 4 and all(s.pixels is not None and s.pixels.shape == (3, 128, 128, 3) for s in samples)
    assert [sample.targets["classify"] for sample in samples] == [0, 0, 1, 1]


def test_feature_bags(study: Path) -> None:
    """Bags of the vectors that embed wrote; a slide without them is an error, or is left out."""
    facts = {"encoder": "e", "model_hash": "h", "mpp": 0.5, "patch_size": 64, "patch_size_level0": 64}
    vectors = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    coords = np.stack([np.arange(5) * 64, np.zeros(5, int)], axis=1)
    write_features(str(study / "p1_a" / "features.zarr"), vectors, coords, facts)
    more = f'features = "{study}/{{slide}}/features.zarr"\nmost = 4'
    with pytest.raises(InputError, match=r"slide 'p2_a' has no features at .*run wsi-mmm embed"):
        opened(of_table(study, "bags", more), *KINDS, scope="bag")
    samples = whole(opened(of_table(study, "bags", more + "\nneeded = false"), *KINDS, scope="bag"))
    assert len(samples) == 1 and samples[0].vectors is not None and samples[0].vectors.shape == (4, 16)
    assert samples[0].targets["classify"] == 0


def test_the_picture_helper_keeps_bytes(tmp_path: Path) -> None:
    """Label images are written as they are."""
    save(tmp_path / "a.png", np.array([[0, 255], [7, 1]]))
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 255], [7, 1]]
