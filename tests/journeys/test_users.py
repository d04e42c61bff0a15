"""Twelve jobs of a researcher, each as it is typed: from slides to files for other tools, and back into models."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from shapely import STRtree
from shapely.geometry import Point, box, shape

import wsi_mmm.cli.run
from helpers.annotation_targets import MODEL, geojson
from helpers.commands import invoke, json_lines
from helpers.faulty import Faulty
from helpers.moto import moto_bucket
from helpers.qupath import check_qupath
from wsi_mmm.engine.events import Event
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.checkpoint import build_model, save_model
from wsi_mmm.slides.fake import SyntheticNuclei, pyramid, synthetic_slide
from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff
from wsi_mmm.types import U8

TILE = 64
DARK, PALE = (90, 60, 140), (225, 185, 205)
SIDE = 192  # px of the slides of two colours

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # botocore's own


# ---------------------------------------------------------------- slides and models to work with


def _two_colours(share: float, seed: int) -> U8:
    """Noise whose left ``share`` is dark."""
    rng = np.random.default_rng(seed)
    image = np.where((np.arange(SIDE) < share * SIDE)[None, :, None], DARK, PALE) + rng.integers(
        -12, 13, (SIDE, SIDE, 3)
    )
    return image.astype(np.uint8)


def _write_slide(path: Path, share: float = 0.5, seed: int = 0, mpp: float | None = 1.0) -> Path:
    write_tiff(path, list(pyramid(_two_colours(share, seed), 2)), TiffForm("deflate", mpp=mpp))
    return path


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SyntheticNuclei]:
    """A slide of stained nuclei, and where they are; do not write to it."""
    path = tmp_path_factory.mktemp("nuclei") / "patient 1.tiff"
    return path, synthetic_slide(path, seed=5, width=640, height=512, mpp=0.5, nuclei=30)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that cannot do anything yet, to embed with and to begin with."""
    task = {"name": "tone", "kind": "classify", "head": "vector", "outputs": 2, "classes": ["a", "b"],
            "colors": [[200, 0, 0], [0, 0, 200]]}  # fmt: skip
    card = {
        **MODEL,
        "name": "base",
        "mpp": 1.0,
        "tile_size": TILE,
        "mean": [0.6] * 3,
        "std": [0.25] * 3,
        "tasks": [task],
    }
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("base")
    save_model(build_model(ModelCard.model_validate(card)), folder)
    return folder


def _done(*arguments: str | Path) -> str:
    """Standard output of a command that must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def _features(folder: Path) -> list[dict[str, Any]]:
    """The objects of a slide's results."""
    found: list[dict[str, Any]] = json.loads(gzip.decompress((folder / "result.geojson.gz").read_bytes()))["features"]
    return found


def _report(output: Path) -> dict[str, dict[str, Any]]:
    """The rows of a run's report, by slide."""
    return {row["id"]: row for row in json.loads((output / "report.json").read_text())["slides"]}


def _geojson_of(places: list[tuple[str, Any]], path: Path) -> Path:
    geojson(path, places)
    return path


# ---------------------------------------------------------------- results of slides


def test_1_one_slide_becomes_objects_in_qupath(nuclei: tuple[Path, SyntheticNuclei], tmp_path: Path) -> None:
    """The default model on one slide: a file that QuPath imports, its nuclei where the nuclei are."""
    slide, truth = nuclei
    _done("run", slide, "-o", tmp_path / "out", "--task", "nuclei")
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    found = check_qupath(folder / "result.geojson.gz", size=(640, 512))
    assert found.ok, found
    assert set(found.object_types) == {"detection"}
    outlines = STRtree([shape(one["geometry"]) for one in _features(folder)])
    hit = sum(len(outlines.query(Point(xy), predicate="within")) > 0 for xy in truth.centers)
    assert hit > 0.8 * len(truth.centers) and found.features < 1.5 * len(truth.centers)
    assert {"slide.json", "tiles.parquet", "features.zarr", "overlay.png"} <= {path.name for path in folder.iterdir()}


def test_2_a_broken_slide_stops_no_other(base: Path, tmp_path: Path) -> None:
    """A folder with a file that was copied by half: the others are done, the report and the exit code say so."""
    (tmp_path / "slides").mkdir()
    for n, name in enumerate(("a", "c")):
        _write_slide(tmp_path / f"slides/{name}.tiff", 0.5, n)
    whole = (tmp_path / "slides/a.tiff").read_bytes()
    (tmp_path / "slides/b.tiff").write_bytes(whole[: len(whole) // 3])
    ended = invoke("run", tmp_path / "slides", "-m", base, "-o", tmp_path / "out", "--tissue", "none")
    assert ended.exit_code == 3
    rows = _report(tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == {"a": "done", "b": "failed", "c": "done"}
    assert "b.tiff" in rows["b"]["error"] and "b.tiff" in ended.stderr and "Traceback" not in ended.stderr
    assert all((tmp_path / "out" / name / "result.geojson.gz").exists() for name in "ac")
    only = invoke("run", tmp_path / "slides/b.tiff", "-m", base, "-o", tmp_path / "alone")
    assert only.exit_code == 4


def test_3_a_spreadsheet_says_the_resolution(base: Path, tmp_path: Path) -> None:
    """Slides without one are refused with the option that helps; a manifest from a spreadsheet gives each its own."""
    for name in ("one", "zwei ü"):
        _write_slide(tmp_path / f"{name}.tiff", mpp=None)
    ended = invoke("run", tmp_path / "one.tiff", "-m", base, "-o", tmp_path / "no")
    assert ended.exit_code == 4 and "--mpp-override" in ended.stderr
    sheet = "sample_id;path;mpp;Kommentar\r\nP1;one.tiff;1,0;gut\r\nP2;zwei ü.tiff;2,0;\r\n"
    (tmp_path / "slides.csv").write_bytes(sheet.encode("cp1252"))
    _done("run", tmp_path / "slides.csv", "-m", base, "-o", tmp_path / "out", "--tissue", "none", "--mpp", "2")
    rows = _report(tmp_path / "out")
    assert {name: (row["status"], row["tiles"]) for name, row in rows.items()} == {
        "P1": ("done", 4),
        "P2": ("done", 9),
    }


def test_4_masks_and_regions_say_where_to_work(base: Path, tmp_path: Path) -> None:
    """Tiles and objects lie in the outline and the mask that were given; ones that are off the slide are refused."""
    slide = _write_slide(tmp_path / "s.tiff")
    mask = np.zeros((48, 48), np.uint8)
    mask[:, :24] = 255  # the left half
    Image.fromarray(mask).save(tmp_path / "mask.png")
    corner = _geojson_of([("ROI", box(0, 0, 60, 60))], tmp_path / "corner.geojson")
    run = ("run", slide, "-m", base)
    _done(*run, "-o", tmp_path / "mask", "--tissue", tmp_path / "mask.png")
    table = pq.read_table(tmp_path / "mask/s/tiles.parquet")
    assert len(table) >= 3 and set(table["x"].to_pylist()) <= {0, 64}
    _done(*run, "-o", tmp_path / "corner", "--tissue", "none", "--regions", corner)
    found = [shape(one["geometry"]).centroid for one in _features(tmp_path / "corner/s")]
    assert found and all(box(0, 0, 60, 60).contains(place) for place in found)
    away = _geojson_of([("ROI", box(5000, 5000, 6000, 6000))], tmp_path / "away.geojson")
    for option in ("--tissue", "--regions"):
        ended = invoke(*run, "-o", tmp_path / "away", option, away)
        assert ended.exit_code == 4 and "no pixel of the slide" in ended.stderr, ended.stderr
        assert not (tmp_path / "away/s/result.geojson.gz").exists()


def test_5_what_was_interrupted_ends_the_same(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the first tiles; the same command takes up the rest, and no file tells the difference."""
    names = ("a", "b")
    for n, name in enumerate(names):
        _write_slide(tmp_path / f"{name}.tiff", 0.3 + 0.2 * n, n)
    command = ("run", *(tmp_path / f"{name}.tiff" for name in names), "-m", base, "--tissue", "none", "-o")
    _done(*command, tmp_path / "quiet")

    @contextlib.contextmanager
    def interrupted(slides: int = 0) -> Iterator[Any]:
        def listen(event: Event) -> None:
            if event.kind == "tile":
                raise KeyboardInterrupt

        yield listen

    with monkeypatch.context() as patch:
        patch.setattr(wsi_mmm.cli.run, "progress", interrupted)
        ended = invoke(*command, tmp_path / "out")
    assert ended.exit_code == 130 and "same command" in ended.stderr
    assert len(list((tmp_path / "out").glob("*/slide.json"))) < 2
    _done(*command, tmp_path / "out")
    for name in names:
        for file in ("result.geojson.gz", "tiles.parquet"):
            assert (tmp_path / "out" / name / file).read_bytes() == (tmp_path / "quiet" / name / file).read_bytes()


def test_6_features_are_read_as_clam_reads_them(base: Path, tmp_path: Path) -> None:
    """Embedded, exported to HDF5, and opened by plain h5py: vectors beside the level-0 corners of their tiles."""
    slide = _write_slide(tmp_path / "s.tiff")
    sizes = ("--mpp", "1", "--tile-size", "64", "--overlap", "0")
    _done("embed", slide, "-m", base, "-o", tmp_path / "emb", "--tissue", "none", *sizes)
    _done("export", tmp_path / "emb", "--to", "h5", "-o", tmp_path / "h5")
    with h5py.File(tmp_path / "h5/s.h5") as file:
        vectors, coords = file["features"][:], file["coords"][:]
        said = dict(file["coords"].attrs)
    assert vectors.shape == (9, 16) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert coords.dtype == np.int64
    assert sorted(map(tuple, coords.tolist())) == [(x, y) for x in (0, 64, 128) for y in (0, 64, 128)]
    assert (said["patch_size"], said["patch_size_level0"], said["level0_width"], said["level0_height"]) == (
        64, 64, SIDE, SIDE)  # fmt: skip
    left, right = vectors[coords[:, 0] == 0].mean(0), vectors[coords[:, 0] == 128].mean(0)
    spread = vectors[coords[:, 0] == 0].std(0).mean()
    assert np.abs(left - right).mean() > 5 * spread  # dark tiles and pale ones


# ---------------------------------------------------------------- models of one's own


def test_7_a_few_labels_make_a_head_that_a_run_takes(base: Path, tmp_path: Path) -> None:
    """A table of slides and labels, or a few regions, make heads; a run of one's model says what it says of tiles."""
    names, rows = [f"s{n}" for n in range(6)], []
    (tmp_path / "ann").mkdir()
    for n, name in enumerate(names):
        _write_slide(tmp_path / f"{name}.tiff", 1 / 3, n) if n < 2 else _write_slide(
            tmp_path / f"{name}.tiff", n % 2, n
        )
        rows.append((name, ["pale", "dark"][n % 2], f"p{n}"))
    for name in names[:2]:
        geojson(tmp_path / f"ann/{name}.geojson", [("dark", box(0, 0, 64, SIDE)), ("pale", box(64, 0, SIDE, SIDE))])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide", "label", "patient"), *rows[2:]])
    slides = [tmp_path / f"{name}.tiff" for name in names]
    sizes = ("--mpp", "1", "--tile-size", str(TILE), "--overlap", "0")
    _done("embed", *slides, "-m", base, "-o", tmp_path / "emb", "--tissue", "none", *sizes)
    _done("fewshot", "fit", tmp_path / "emb", "--labels", tmp_path / "labels.csv", "-o", tmp_path / "slides")
    answers = json_lines(invoke("fewshot", "predict", tmp_path / "emb", "--head", tmp_path / "slides", "--json",
                                "-o", tmp_path / "answers"))  # fmt: skip
    assert [one["answer"] for one in answers][2:] == ["pale", "dark", "pale", "dark"]
    _done("fewshot", "fit", tmp_path / "emb", "--labels", tmp_path / "ann", "-o", tmp_path / "head")
    _done("fewshot", "predict", tmp_path / "emb", "--head", tmp_path / "head", "-o", tmp_path / "said")
    _done("run", *slides[:3], "-m", tmp_path / "head/model", "-o", tmp_path / "out", "--tissue", "none")
    for name, dark in zip(names[:3], (3, 3, 0), strict=True):
        said = pq.read_table(tmp_path / f"said/{name}.parquet")
        run = pq.read_table(tmp_path / f"out/{name}/tiles.parquet")
        for column in ("x", "y", "fewshot"):
            assert run[column].to_pylist() == said[column].to_pylist()
        assert run["fewshot"].to_pylist().count("dark") == dark and len(run) == 9


def test_8_annotations_of_qupath_train_a_model(tmp_path: Path) -> None:
    """A dry run says what becomes of every class; the trained model finds both, the first one, too."""
    for n in range(4):
        _write_slide(tmp_path / f"p{n}.tiff", 0.5, n)
        halves = [("Tumor", box(0, 0, SIDE / 2, SIDE)), ("Stroma", box(SIDE / 2, 0, SIDE, SIDE))]
        geojson(tmp_path / f"p{n}.geojson", [*halves, ("Ruler", box(10, 10, 20, 20))])
    (tmp_path / "train.toml").write_text(f"""
out = "{tmp_path}/run"
steps = 40
device = "cpu"
threads = 0
[model]
mpp = 1.0
tile_size = {TILE}
overlap = 0
encoder = {{ name = "resnet18d", args = {{ channels = [8, 8, 16, 16] }} }}
decoder = {{ bottleneck = 8, widths = [8, 8, 8, 8] }}
[[task]]
name = "areas"
kind = "segment"
classes = ["tumour", "stroma"]
[[data]]
name = "study"
kind = "slides"
task = "areas"
slides = "{tmp_path}/p*.tiff"
batch = 8
[data.shapes.areas]
complete = true
buckets = [
  {{ label = "tumour", pattern = "tum", how = "prefix", any_case = true }},
  {{ label = "stroma", pattern = "Stroma" }},
  {{ label = "drop", pattern = "Ruler" }},
]
[split]
val = 0.25
test = 0.0
[optim]
rate = 1e-2
[tracking]
tensorboard = false
""")
    dry = _done("train", tmp_path / "train.toml", "--dry-run")
    assert "Tumor" in dry and "Ruler" in dry and "drop" in dry and not (tmp_path / "run").exists()
    _done("train", tmp_path / "train.toml")
    new = _write_slide(tmp_path / "new.tiff", 0.5, 99)
    _done("run", new, "-m", tmp_path / "run/model", "-o", tmp_path / "out", "--tissue", "none")
    wanted = {"tumour": box(0, 0, SIDE / 2, SIDE), "stroma": box(SIDE / 2, 0, SIDE, SIDE)}
    found = {name: box(0, 0, 0, 0) for name in wanted}
    for one in _features(tmp_path / "out/new"):
        name = one["properties"]["classification"]["name"]
        found[name] = found[name].union(shape(one["geometry"]))
    for name, place in wanted.items():
        assert found[name].intersection(place).area > 0.8 * found[name].union(place).area, name


@pytest.fixture(scope="module")
def cohort(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides with labels, their features, and a model that learnt from both, in ``run/model``."""
    folder = tmp_path_factory.mktemp("cohort")
    rows = [(f"c{n}", ["low", "high"][n % 2]) for n in range(8)]
    for n, (name, _) in enumerate(rows):
        _write_slide(folder / f"{name}.tiff", n % 2 * 0.5, n)
    with (folder / "cohort.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide", "grade"), *rows])
    _done("embed", folder, "-m", base, "-o", folder / "emb", "--tissue", "none", "--tile-size", str(TILE),
          "--overlap", "0", "--mpp", "1")  # fmt: skip
    (folder / "bags.toml").write_text(f"""
out = "{folder}/run"
steps = 40
device = "cpu"
threads = 0
[model]
start = "{base}"
mpp = 1.0
tile_size = {TILE}
overlap = 0
mean = [0.6, 0.6, 0.6]
std = [0.25, 0.25, 0.25]
encoder = {{ name = "resnet18d", args = {{ channels = [8, 8, 16, 16] }} }}
decoder = {{ bottleneck = 8, widths = [8, 8, 8, 8] }}
[[task]]
name = "grade"
kind = "classify"
classes = ["low", "high"]
scope = "bag"
[[data]]
name = "bags"
kind = "bags"
features = "{folder}/emb/{{slide}}/features.zarr"
batch = 4
slides = {{ table = "{folder}/cohort.csv", truth = {{ grade = {{ columns = ["grade"] }} }} }}
[split]
val = 0.25
test = 0.0
[optim]
rate = 1e-2
[tracking]
tensorboard = false
""")
    _done("train", folder / "bags.toml")
    return folder


def test_9_labels_of_slides_train_a_model_of_slides(cohort: Path, tmp_path: Path) -> None:
    """Bags of features and a table of labels; slides that it has not seen get the right label, and their table."""
    for name, share in (("clear", 0.0), ("marked", 0.5)):
        _write_slide(tmp_path / f"{name}.tiff", share, 70)
    _done("run", tmp_path / "clear.tiff", tmp_path / "marked.tiff", "-m", cohort / "run/model", "-o", tmp_path / "out",
          "--tissue", "none")  # fmt: skip
    with (tmp_path / "out/slides.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert {name: row["grade"] for name, row in rows.items()} == {"clear": "low", "marked": "high"}
    attention = pq.read_table(tmp_path / "out/marked/tiles.parquet")["grade:attention"].to_numpy()
    assert np.isclose(attention.sum(), 1, atol=1e-3)


# ---------------------------------------------------------------- far slides, many jobs, odd files


def test_10_far_slides_give_what_near_ones_give(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a prefix on S3 (one name is odd) into a bucket, and over HTTP with a signature: the objects of the disk."""
    import boto3

    slide = _write_slide(tmp_path / "s.tiff")
    options = ("-m", base, "--tissue", "none", "-o")
    _done("run", slide, *options, tmp_path / "near")
    wanted = (tmp_path / "near/s/result.geojson.gz").read_bytes()
    with moto_bucket("study", monkeypatch):
        client = boto3.client("s3")
        for key in ("in/s.tiff", "in/[new]//s.tiff", "in/"):
            client.put_object(Bucket="study", Key=key, Body=slide.read_bytes() if key.endswith("tiff") else b"")
        _done("run", "s3://study/in/", *options, "s3://study/out")
        keys = [item["Key"] for item in client.list_objects_v2(Bucket="study", Prefix="out/")["Contents"]]
        results = [key for key in keys if key.endswith("result.geojson.gz")]
        assert len(results) == 2
        for key in results:
            found = json.loads(gzip.decompress(client.get_object(Bucket="study", Key=key)["Body"].read()))
            near = json.loads(gzip.decompress(wanted))
            assert [one["geometry"] for one in found["features"]] == [one["geometry"] for one in near["features"]]
    with Faulty(files={"/s.tiff": slide}) as web:
        _done("run", f"{web.url}/s.tiff?X-Signature=hidden", *options, tmp_path / "web")
    (folder,) = (path for path in (tmp_path / "web").iterdir() if path.is_dir())
    assert "hidden" not in (tmp_path / "web/report.json").read_text()
    assert [one["geometry"] for one in _features(folder)] == [
        one["geometry"] for one in json.loads(gzip.decompress(wanted))["features"]
    ]


def test_11_array_jobs_into_one_folder_make_one_table(cohort: Path, tmp_path: Path) -> None:
    """Each job runs its own slides; at the end the tables hold all of them."""
    for n, name in enumerate(("a", "b", "c")):
        _write_slide(tmp_path / f"{name}.tiff", n % 2 * 0.5, 80 + n)
    for job in (("a", "b"), ("c",)):
        slides = [tmp_path / f"{name}.tiff" for name in job]
        _done("run", *slides, "-m", cohort / "run/model", "-o", tmp_path / "out", "--tissue", "none")
    with (tmp_path / "out/slides.csv").open() as file:
        rows = {row["id"]: row["grade"] for row in csv.DictReader(file)}
    assert rows == {"a": "low", "b": "high", "c": "low"}
    assert sorted(pq.read_table(tmp_path / "out/slides.parquet")["id"].to_pylist()) == ["a", "b", "c"]


@pytest.fixture
def scanned(tmp_path: Path) -> Path:
    """An OME-TIFF of two scenes at 0.5 and 1 mpp, with the pictures of label and whole glass that scanners add."""
    images = [("tissue", _two_colours(0.5, 1), 1.0), ("control", _two_colours(0.25, 2)[:128, :160], 0.5),
              ("label image", _two_colours(0.1, 3)[:64, :96], None), ("macro image", _two_colours(0.2, 4)[:96, :192], None)]  # fmt: skip # noqa: E501
    text = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    for n, (name, pixels, mpp) in enumerate(images):
        scale = f'PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}" ' if mpp else ""
        text += (
            f'<Image ID="Image:{n}" Name="{name}"><Pixels ID="Pixels:{n}" DimensionOrder="XYCZT" Type="uint8" '
            f'SizeX="{pixels.shape[1]}" SizeY="{pixels.shape[0]}" SizeC="3" SizeZ="1" SizeT="1" {scale}>'
            f'<Channel ID="C:{n}" SamplesPerPixel="3"/><TiffData IFD="{n}" PlaneCount="1"/></Pixels></Image>'
        )
    with tifffile.TiffWriter(tmp_path / "scan.ome.tif") as tiff:
        for n, (_, pixels, _) in enumerate(images):
            described = {"description": f"{text}</OME>"} if n == 0 else {}
            tiff.write(pixels, photometric="rgb", tile=(64, 64), metadata=None, **described)
    return tmp_path / "scan.ome.tif"


def test_12_the_right_picture_of_an_odd_file_is_the_slide(scanned: Path, base: Path, tmp_path: Path) -> None:
    """`info` lists scenes, label and whole glass; the tissue is the slide unless another scene is chosen."""
    (said,) = json_lines(invoke("info", scanned, "--json"))
    assert (said["width"], said["height"]) == (SIDE, SIDE)
    shown = _done("info", scanned)
    assert all(name in shown for name in ("control", "label", "macro")), shown
    (other,) = json_lines(invoke("info", scanned, "--scene", "1", "--json"))
    assert (other["width"], other["height"]) == (160, 128)
    for scene, pixels in (((), _two_colours(0.5, 1)), (("--scene", "1"), _two_colours(0.25, 2)[:128, :160])):
        _done("thumbnail", scanned, "-o", tmp_path / "t.png", *scene)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "t.png").convert("RGB")), pixels)
    _done("run", scanned, "-m", base, "-o", tmp_path / "out", "--tissue", "none", "--scene", "1")
    assert len(pq.read_table(tmp_path / "out/scan-scene-1/tiles.parquet")) == 2  # 80 x 64 px at 1 mpp
    with Image.open(tmp_path / "out/scan-scene-1/overlay.png") as overlay:
        assert overlay.width > overlay.height
