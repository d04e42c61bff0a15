"""Slides as a Source: truth lies where the pixels are, failures are named, slides are shared and few stay open."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from shapely.geometry import MultiPoint, Point, Polygon, box, mapping
from skimage import measure

from conftest import RealData
from helpers.faulty import Faulty
from helpers.moto import moto_server
from wsi_mmm.cache.slide_pool import SlideKey, SlidePool, TileCaching
from wsi_mmm.errors import (
    AnnotationError,
    ConfigError,
    InputError,
    ManifestError,
    MppUnknown,
    OptionError,
    SlideNotFound,
)
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.fake import SyntheticNuclei, synthetic_slide
from wsi_mmm.storage import store
from wsi_mmm.tasks.targets import Boxes
from wsi_mmm.training.data.annotation_targets import AnnotationTarget
from wsi_mmm.training.data.bags import Draws, tile_bags
from wsi_mmm.training.data.base import DataSource
from wsi_mmm.training.data.buckets import USE, Buckets, Rule, same_names
from wsi_mmm.training.data.slides import (
    SlideItem,
    SlideTiles,
    TileSampling,
    beside,
    dry_run_slides,
    slide_tiles,
    slides_of_table,
)
from wsi_mmm.training.data.tables import TableTask, read_table, slide_table
from wsi_mmm.types import Tiles

NUCLEI = same_names(["nucleus"])
REGIONS = Buckets(("rest", "left", "right"), (Rule("left", "L"), Rule("right", "R"), Rule(USE, "ROI")))


def geojson(path: Path, shapes: Sequence[tuple[str, Any]]) -> str:
    features = [
        {"type": "Feature", "geometry": mapping(shape), "properties": {"classification": {"name": name}, "score": n}}
        for n, (name, shape) in enumerate(shapes)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)


@pytest.fixture
def nuclei(tiny_truth: SyntheticNuclei, tmp_path: Path) -> str:
    return geojson(tmp_path / "nuclei.geojson", [("nucleus", Polygon(xy)) for xy in tiny_truth.polygons])


def the_tiles(
    slide: Path, notes: str | None, places: TileSampling, *specs: AnnotationTarget, **more: Any
) -> SlideTiles:
    return slide_tiles("d", [SlideItem("s", str(slide), annotations=notes, **more)], places, specs)


@pytest.mark.parametrize("mpp", [0.5, 0.8])
@pytest.mark.parametrize("size", [96, 160])
def test_truth_lies_where_the_pixels_are(tiny_slide: Path, nuclei: str, mpp: float, size: int) -> None:
    """Nuclei are darker in red than what is round them, at the slide's scale and at another, whatever is asked for."""
    specs = [
        AnnotationTarget(kind, kind, NUCLEI, complete=True, min_share=0.1)
        for kind in ("instances", "segment", "detect")
    ]
    source: DataSource = the_tiles(tiny_slide, nuclei, TileSampling(mpp, tile=96), *specs)
    samples = source.read(range(len(source.index)), size)
    inside, outside = [], []
    for sample in samples:
        assert sample.pixels is not None and sample.pixels.shape == (size, size, 3)
        labels, classes, boxes = (sample.targets[name] for name in ("instances", "segment", "detect"))
        assert isinstance(labels, np.ndarray) and isinstance(classes, np.ndarray) and isinstance(boxes, Boxes)
        assert labels.shape == classes.shape == (size, size)
        assert ((labels > 0) == (classes == 0)).all()
        red = sample.pixels[..., 0].astype(float)
        inside.append(red[labels > 0])
        outside.append(red[labels == 0])
        for (x0, y0, x1, y1), label in zip(boxes.xyxy, boxes.labels, strict=True):
            mine = labels[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
            assert label == -1 or (mine > 0).any()
    assert np.concatenate(inside).mean() < np.concatenate(outside).mean() - 40
    assert set(source.index.labels.tolist()) == {-1, 0}
    assert len(set(source.index.keys)) == len(source.index)


def test_pixels_are_those_of_the_slide_in_the_order_asked_for(tiny_slide: Path, nuclei: str) -> None:
    """Several slides, numbers in any order and twice, tiles larger than the item and beyond the edge."""
    items = [SlideItem(name, str(tiny_slide), annotations=nuclei) for name in "ab"]
    source = slide_tiles(
        "d", items, TileSampling(0.5, tile=128), [AnnotationTarget("n", "instances", NUCLEI, complete=True)]
    )
    numbers = [len(source.index) - 1, 0, 5, 0]
    samples = source.read(numbers, 200)
    assert [sample.key for sample in samples] == [source.index.keys[n] for n in numbers]
    with open_slide(str(tiny_slide)) as slide:
        for sample in samples:
            x, y = (int(v) for v in sample.key.partition("@")[2].split(","))
            assert sample.pixels is not None
            assert (sample.pixels == slide.read_region(x - 36, y - 36, 200, 200)).all()
    assert list(source.index.groups[:1]) == ["a"] and list(source.index.groups).count("a") * 2 == len(source.index)
    labels = source.read([0], 4000)[0].targets["n"]
    assert isinstance(labels, np.ndarray) and labels[0, 0] == -1  # beyond the slide


def test_regions_give_labels_of_tiles_and_px(tiny_slide: Path, tmp_path: Path) -> None:
    """Only tiles of the use-region, its rest is background; numbers of regions; balanced by the first task."""
    notes = geojson(
        tmp_path / "r.geojson",
        [("ROI", box(0, 0, 1024, 512)), ("L", box(0, 0, 256, 512)), ("R", box(512, 0, 1400, 512))],
    )
    source = the_tiles(
        tiny_slide,
        notes,
        TileSampling(0.5, tile=256),
        AnnotationTarget("side", "classify", REGIONS, background="rest"),
        AnnotationTarget("area", "segment", REGIONS, background="rest"),
        AnnotationTarget("both", "multilabel", REGIONS),
        AnnotationTarget("score", "regress", REGIONS, values=("score",)),
        AnnotationTarget("layers", "multisegment", REGIONS),
    )
    assert source.tasks == ("side", "area", "both", "score", "layers")
    assert source.index.labels.tolist() == [1, 0, 2, 2] * 2
    samples = source.read(range(8), 256)
    assert [sample.targets["side"] for sample in samples[:4]] == [1, 0, 2, 2]
    assert [np.unique(sample.targets["area"]).tolist() for sample in samples[:4]] == [[1], [0], [2], [2]]  # type: ignore[arg-type]
    assert [np.asarray(sample.targets["both"]).tolist() for sample in samples[:3]] == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    scores = np.array([sample.targets["score"] for sample in samples[:4]])[:, 0]
    assert np.array_equal(scores, [1, np.nan, 2, 2], equal_nan=True)
    layers = samples[0].targets["layers"]
    assert isinstance(layers, np.ndarray) and layers.shape == (3, 256, 256) and (layers[1] == 1).all()


def test_places_round_objects_are_drawn_by_their_seed(tiny_slide: Path, nuclei: str) -> None:
    """The same seed gives the same items; points count as discs where a radius is given."""
    spec = AnnotationTarget("n", "detect", NUCLEI, complete=True)
    one, two, other = (
        the_tiles(tiny_slide, nuclei, TileSampling(0.5, tile=64, by="objects", per_slide=30, seed=seed), spec)
        for seed in (1, 1, 2)
    )
    assert list(one.index.keys) == list(two.index.keys) != list(other.index.keys)
    assert (one.index.labels == 0).all() and 20 < len(one.index) <= 30
    dots = Path(nuclei).with_name("dots.geojson")
    notes = geojson(dots, [("nucleus", Point(400, 300)), ("nucleus", Point(900, 700))])
    found = the_tiles(tiny_slide, notes, TileSampling(0.5, tile=64, dot_um=4.0, by="objects", per_slide=9), spec)
    boxes = found.read([0], 64)[0].targets["n"]
    assert isinstance(boxes, Boxes)
    assert np.allclose(boxes.xyxy[0, 2:] - boxes.xyxy[0, :2], 16)


def test_objects_off_the_slide_are_no_targets(
    tiny_slide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tiles round them would be moved to the slide's edge; they are not counted, and a line says so."""
    shapes = [("nucleus", box(300, 300, 320, 320)), ("nucleus", box(-900, 50, -880, 70)), ("nucleus", Point(1e6, 9))]
    notes = geojson(tmp_path / "off.geojson", shapes)
    places = TileSampling(0.5, tile=64, by="objects", per_slide=20)
    found = the_tiles(tiny_slide, notes, places, AnnotationTarget("n", "detect", NUCLEI, complete=True))
    corners = np.array([key.split("@")[1].split(",") for key in found.index.keys], float)
    assert len(corners) and (corners > 100).all() and (corners < 400).all()
    assert "off.geojson lie off the slide" in caplog.text
    run = dry_run_slides([SlideItem("s", str(tiny_slide), annotations=notes)], NUCLEI, SlidePool())
    assert (sum(line.objects for line in run.lines), run.off_slide) == (1, {"s": 2})


def test_without_annotations_tiles_of_tissue_carry_what_the_table_says(tiny_slide: Path, tmp_path: Path) -> None:
    """One class per slide, patients as groups, relative places, at most so many tiles."""
    shutil.copy(tiny_slide, tmp_path / "x.tiff")
    (tmp_path / "t.csv").write_text(f"slide,file,p,stain,mpp\na,x.tiff,P1,HE,0.5\nb,{tiny_slide},P1,IHC,\n")
    rows = slide_table(
        read_table(str(tmp_path / "t.csv")), [TableTask("stain", "classify", ("stain",), ("HE", "IHC"))], group="p"
    )
    labels = np.array(rows.targets["stain"], np.int32)
    items = slides_of_table(rows, uri="file", mpp="mpp", root=str(tmp_path), labels=labels)
    source = slide_tiles("d", items, TileSampling(0.5, tile=128, per_slide=10))
    assert Counter(key.partition("@")[0] for key in source.index.keys) == {"a": 10, "b": 10}
    assert source.index.labels.tolist() == [0] * 10 + [1] * 10
    assert set(source.index.groups) == {"P1"}
    assert [sample.targets for sample in source.read([0, 19], 64)] == [{"stain": 0}, {"stain": 1}]
    assert all(sample.pixels.min() < 200 for sample in source.read([0, 19], 64) if sample.pixels is not None)
    (tmp_path / "t.csv").write_text("slide,mpp\na,fine\n")
    with pytest.raises(ManifestError, match="row 2: mpp is 'fine'"):
        slides_of_table(slide_table(read_table(str(tmp_path / "t.csv")), []), mpp="mpp")


def test_a_damaged_tile_fails_with_its_place_and_its_neighbours_do_not(tiny_slide: Path, tmp_path: Path) -> None:
    """Also when the file is gone: a sample that says why, never a white one."""
    path = tmp_path / "damaged.tiff"
    data = bytearray(tiny_slide.read_bytes())
    with open_slide(str(tiny_slide)) as slide:
        whole = slide.read_region(0, 0, 1536, 1152)
    with tifffile.TiffFile(tiny_slide) as file:
        offset, length = file.pages[0].dataoffsets[7], file.pages[0].databytecounts[7]  # type: ignore[union-attr]
    data[offset : offset + length] = bytes(length)
    path.write_bytes(data)
    source = slide_tiles("d", [SlideItem("s", str(path))], TileSampling(0.5, tile=128, min_tissue=0.0))
    samples = source.read(range(len(source.index)), 128)
    failed = [sample for sample in samples if sample.failed]
    assert len(failed) == 4
    assert all(sample.pixels is None and "s: px of the tile at level-0" in sample.failed for sample in failed)
    for sample in samples:
        if not sample.failed:
            x, y = (int(v) for v in sample.key.partition("@")[2].split(","))
            assert sample.pixels is not None
            assert (sample.pixels == np.pad(whole, ((0, 128), (0, 128), (0, 0)))[y : y + 128, x : x + 128]).all()
    source.pool.close()
    path.unlink()
    assert "damaged.tiff" in source.read([0], 128)[0].failed


def test_what_cannot_be_used_is_named(tiny_slide: Path, nuclei: str, tmp_path: Path) -> None:
    """Missing slides and annotations, tasks twice, ids twice, an empty annotation; or going on without the broken."""
    spec = AnnotationTarget("n", "instances", NUCLEI)
    places = TileSampling(0.5, tile=128)
    with pytest.raises(SlideNotFound):
        slide_tiles("d", [SlideItem("s", str(tmp_path / "none.svs"))], places)
    with pytest.raises(InputError, match="two slides are called 's'"):
        slide_tiles("d", [SlideItem("s", "a"), SlideItem("s", "b")], places)
    with pytest.raises(InputError, match="a task is listed twice"):
        the_tiles(tiny_slide, nuclei, places, spec, spec)
    with pytest.raises(OptionError, match="twice as fine"):
        the_tiles(tiny_slide, nuclei, TileSampling(0.1), spec)
    empty = geojson(tmp_path / "e.geojson", [])
    with pytest.raises(InputError, match=r"no tile tells anything of 'n'.*dry run"):
        the_tiles(tiny_slide, empty, places, spec)
    (tmp_path / "x.geojson").write_text("{")
    with pytest.raises(AnnotationError, match=r"x\.geojson"):
        the_tiles(tiny_slide, str(tmp_path / "x.geojson"), places, spec)
    items = [SlideItem("s", str(tiny_slide), annotations=nuclei), SlideItem("gone", str(tmp_path / "none.svs"))]
    with pytest.raises(SlideNotFound, match=r"none\.svs"):
        slide_tiles("d", items, places, [spec])
    for wrong in ({"kind": "survive"}, {"background": "x"}, {"values": ("a",)}, {"min_share": 0.0}):
        with pytest.raises(ConfigError, match="task 'n'"):
            AnnotationTarget(**({"task": "n", "kind": "segment", "buckets": NUCLEI} | wrong))  # type: ignore[arg-type]
    for places_wrong in ({"stride": 300}, {"tile": 0}, {"by": "objects"}):
        with pytest.raises(ConfigError):
            TileSampling(0.5, **places_wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", ["classify", "multilabel", "regress", "segment", "multisegment", "instances", "detect"]
)
def test_a_slide_without_a_tile_to_learn_from_gives_none(
    tiny_slide: Path, nuclei: str, tmp_path: Path, kind: str
) -> None:
    """Its annotations are of other classes; the tiles of the other slide are there."""
    other = geojson(tmp_path / "other.geojson", [("vessel", box(0, 0, 90, 90))])
    spec = AnnotationTarget("n", kind, NUCLEI, min_share=0.01, values=("score",) if kind == "regress" else ())
    items = [SlideItem("a", str(tiny_slide), annotations=nuclei), SlideItem("b", str(tiny_slide), annotations=other)]
    assert set(slide_tiles("d", items, TileSampling(0.5, tile=128), [spec]).index.groups) == {"a"}


def test_annotations_are_found_beside_slides(tiny_slide: Path, nuclei: str) -> None:
    """By a pattern; a missing file is an error unless it may be missing."""
    folder = Path(nuclei).parent
    shutil.copy(nuclei, folder / "tiny.geojson")
    uri = f"{folder}/tiny.tiff"
    assert beside(uri, "{folder}/{stem}.geojson") == f"{folder}/tiny.geojson"
    assert beside(uri, "{folder}/{name}.geojson", needed=False) is None
    with pytest.raises(InputError, match="correct the pattern"):
        beside(uri, "{folder}/{name}.geojson")
    with pytest.raises(ConfigError, match="stem"):
        beside(uri, "{dir}/{stem}.geojson")
    run = dry_run_slides([SlideItem("s", str(tiny_slide), annotations=nuclei)], NUCLEI, SlidePool())
    (line,) = run.lines
    assert line.label == "nucleus" and line.objects > 100 and line.area_mm2 is not None


def test_few_slides_stay_open_however_many_threads_read(tiny_slide: Path, tmp_path: Path) -> None:
    """Never more idle ones than allowed; every thread gets the pixels that one thread gets."""
    items = []
    for n in range(5):
        shutil.copy(tiny_slide, tmp_path / f"{n}.tiff")
        items.append(SlideItem(str(n), str(tmp_path / f"{n}.tiff")))
    pool = SlidePool(limit=2)
    source = slide_tiles("d", items, TileSampling(0.5, tile=128, per_slide=4), pool=pool)
    wanted = source.read(range(20), 128)
    assert pool.open_count() <= 2
    wrong: list[int] = []

    def read(seed: int) -> None:
        numbers = np.random.default_rng(seed).permutation(20)
        for number, sample in zip(numbers.tolist(), source.read(numbers, 128), strict=True):
            if not np.array_equal(sample.pixels, wanted[number].pixels):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.open_count() <= 2
    pool.close()
    assert pool.open_count() == 0
    assert np.array_equal(source.read([3], 128)[0].pixels, wanted[3].pixels)


def test_the_tile_cache_changes_no_pixel(tiny_slide: Path, nuclei: str, tmp_path: Path) -> None:
    """On, off and measured give the same samples; what was chosen is said."""
    spec = AnnotationTarget("n", "instances", NUCLEI, complete=True)
    read = {}
    for tiles in ("off", "on", "auto"):
        pool = SlidePool()
        caching = None if tiles == "off" else TileCaching(str(tmp_path / tiles), tiles)  # type: ignore[arg-type]
        items = [SlideItem("s", str(tiny_slide), annotations=nuclei)]
        source = slide_tiles("d", items, TileSampling(0.8, tile=100), [spec], pool=pool, caching=caching)
        read[tiles] = [sample.pixels for sample in source.read([1, 4, 2], 120)]
        assert (len(pool.choice_texts()) == 1) == (tiles == "auto")
        assert any((tmp_path / tiles).rglob("c/*")) == (tiles == "on") or tiles == "auto"
    for tiles in ("on", "auto"):
        assert all(np.array_equal(a, b) for a, b in zip(read["off"], read[tiles], strict=True))


def test_a_forked_process_opens_its_own_slides(tiny_slide: Path) -> None:
    """It begins with none open and reads the same pixels."""
    pool = SlidePool()
    tiles = Tiles(np.zeros((1, 2), np.int64), 8, 1.0, 1.0)
    with pool.reader(SlideKey(str(tiny_slide)), tiles, None):
        assert pool.open_count() == 1
    pool._process = -1  # as a child finds it
    with pool.slide(SlideKey(str(tiny_slide))) as slide:
        assert slide.read_region(0, 0, 8, 8).shape == (8, 8, 3)
    assert pool.open_count() == 1


def test_nuclei_that_a_run_wrote_are_learnt_from(real_data: RealData, tmp_path: Path) -> None:
    """Detections of a real slide, made up on a grid, come back as instances with their pixels."""
    path = real_data.slide("metaplasia_HE.svs")
    rng = np.random.default_rng(0)
    shapes = [("nucleus", Point(*xy).buffer(12)) for xy in rng.uniform(4000, 8000, (400, 2))]
    notes = geojson(tmp_path / "m.geojson", shapes)
    source = the_tiles(
        path,
        notes,
        TileSampling(0.5, tile=256, by="objects", per_slide=12),
        AnnotationTarget("n", "instances", NUCLEI, complete=True),
    )
    samples = source.read(range(len(source.index)), 256)
    assert all(not sample.failed and np.asarray(sample.targets["n"]).max() > 0 for sample in samples)


def test_slides_and_annotations_far_away_give_the_same_samples(
    tiny_slide: Path, nuclei: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP: the pixels and truth of the local files; when the server breaks off, samples that say so, no crash."""
    monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "2")
    spec = AnnotationTarget("n", "instances", NUCLEI, complete=True)
    places = TileSampling(0.5, tile=128)
    near = the_tiles(tiny_slide, nuclei, places, spec)
    with Faulty(files={"/s.tiff": tiny_slide, "/s.geojson": Path(nuclei)}) as web:
        note = f"{web.url}/s.geojson"
        assert beside(f"{web.url}/s.tiff", "{folder}/{stem}.geojson") == note
        far = slide_tiles("d", [SlideItem("s", f"{web.url}/s.tiff", annotations=note)], places, [spec])
        assert list(far.index.keys) == list(near.index.keys)
        for one, other in zip(far.read([3, 9, 1], 128), near.read([3, 9, 1], 128), strict=True):
            assert np.array_equal(one.pixels, other.pixels)  # type: ignore[arg-type]
            assert np.array_equal(one.targets["n"], other.targets["n"])  # type: ignore[arg-type]
    far.pool.close()
    assert far.read([3], 128)[0].failed


def test_slides_in_a_bucket_give_the_same_samples(
    tiny_slide: Path, nuclei: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Slide, annotations, table and tile cache on S3."""
    import boto3

    with moto_server() as endpoint:
        for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="train")
        store.write_bytes("s3://train/s.tiff", tiny_slide.read_bytes())
        store.write_bytes("s3://train/s.geojson", Path(nuclei).read_bytes())
        store.write_bytes("s3://train/t.csv", b"slide,file\ns,s.tiff\n")
        table = slide_table(read_table("s3://train/t.csv"), [])
        (item,) = slides_of_table(table, uri="file", root="s3://train")
        items = [replace(item, annotations="s3://train/s.geojson")]
        spec = AnnotationTarget("n", "instances", NUCLEI, complete=True)
        pool, caching = SlidePool(), TileCaching("s3://train/cache", "on")
        far = slide_tiles("d", items, TileSampling(0.5, tile=128), [spec], pool=pool, caching=caching)
        near = the_tiles(tiny_slide, nuclei, TileSampling(0.5, tile=128), spec)
        for one, other in zip(far.read([3, 9, 1], 128), near.read([3, 9, 1], 128), strict=True):
            assert not one.failed and one.key == other.key
            assert np.array_equal(one.pixels, other.pixels)  # type: ignore[arg-type]
        assert store.list_uris("s3://train/cache")
        pool.close()


def dots(path: Path, name: str = "nucleus") -> str:
    """Five points of one class, three of them one object, and a point that would be a use-region."""
    three = MultiPoint([(700, 300), (760, 340), (90, 1000)])
    return geojson(path, [(name, Point(400, 300)), (name, three), (name, Point(900, 700)), ("ROI", Point(500, 500))])


@pytest.mark.parametrize("mpp", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["segment", "multisegment", "instances", "detect"])
def test_every_point_that_the_dry_run_counts_is_learnt(tiny_slide: Path, tmp_path: Path, kind: str, mpp: float) -> None:
    """By default points are discs of a cell's size, whatever kind of map is learnt and at whatever scale: as many
    objects are in the targets as the dry run says. A point is no use-region."""
    table = Buckets(("nucleus", "rest"), (Rule("nucleus", "nucleus"), Rule(USE, "ROI")))
    notes = dots(tmp_path / "dots.geojson")
    background = "rest" if kind == "segment" else None
    spec = AnnotationTarget("n", kind, table, background=background, complete=True)
    places = TileSampling(mpp, tile=256)
    source = the_tiles(tiny_slide, notes, places, spec)
    run = dry_run_slides([SlideItem("s", str(tiny_slide), annotations=notes)], table, SlidePool(), places.dot_radius)
    said = {(line.label, line.objects, line.points) for line in run.lines}
    assert said == {("nucleus", 5, 5), ("drop", 1, 1)} and "6, learnt as discs of" in run.table()
    targets = [sample.targets["n"] for sample in source.read(range(len(source.index)), 256)]
    if kind == "detect":
        assert sum(int((one.labels == 0).sum()) for one in targets if isinstance(one, Boxes)) == 5
    else:
        plane = 1 if kind == "instances" else 0  # of several classes: of points the class is known, not the outline
        maps = np.stack([np.asarray(target).reshape(-1, 256, 256)[plane] for target in targets])
        seen = maps[:, 1::2, 1::2]  # what the maps of a model show
        drawn = seen > 0 if kind == "multisegment" else seen == 0
        assert sum(int(measure.label(one).max()) for one in drawn) == 5
        assert drawn.sum() >= 5 * 10


@pytest.mark.parametrize("kind", ["classify", "multilabel"])
def test_points_are_refused_where_they_could_teach_nothing(tiny_slide: Path, tmp_path: Path, kind: str) -> None:
    """A point covers no tile: an error that says what to do, unless the radius of its disc is given."""
    notes = dots(tmp_path / "dots.geojson")
    spec = AnnotationTarget("n", kind, NUCLEI, min_share=0.2, complete=True)
    with pytest.raises(InputError, match="s: 5 points have a class of 'n', and a point covers no tile: draw regions"):
        the_tiles(tiny_slide, notes, TileSampling(0.5, tile=64), spec)
    wide = the_tiles(tiny_slide, notes, TileSampling(0.5, tile=64, dot_um=40.0), spec)
    assert any(np.any(sample.targets["n"]) == (kind != "classify") for sample in wide.read(range(len(wide.index)), 64))
    assert wide.unlearnt == ()


def test_points_left_out_are_said_to_be(tiny_slide: Path, tmp_path: Path) -> None:
    """``dot_um = 0`` is a wish: the dry run says that they are dropped. A radius that maps cannot show is an error."""
    notes = dots(tmp_path / "dots.geojson")
    items = [SlideItem("s", str(tiny_slide), annotations=notes)]
    run = dry_run_slides(items, NUCLEI, SlidePool(), 0.0)
    assert {line.label for line in run.lines} == {"drop"} and "points among them: 6, left out" in run.table()
    with pytest.raises(ConfigError, match=r"dot_um is 0\.5: discs so small are lost at 0\.5 mpp: give 1 or more"):
        TileSampling(0.5, dot_um=0.5)


def test_classes_whose_objects_are_the_target_of_no_tile_are_named(tiny_slide: Path, nuclei: str) -> None:
    """Outlines of nuclei cover no half of a tile: the dry run counts 120 objects, a line says that none is learnt."""
    spec = AnnotationTarget(
        "n", "classify", replace(NUCLEI, labels=("nucleus", "rest")), background="rest", complete=True
    )
    found = the_tiles(tiny_slide, nuclei, TileSampling(0.5, tile=128), spec)
    (line,) = found.unlearnt
    assert "120 objects of 'nucleus' are the target of no tile of 'n'" in line and "min_share is 0.5" in line


def test_a_slide_without_resolution_names_the_key_of_the_configuration(tmp_path: Path) -> None:
    """Not an option of another command."""
    synthetic_slide(tmp_path / "s.tiff", 1, width=256, height=256, mpp=0.5, nuclei=2, variant="no-mpp")
    item = SlideItem("s", str(tmp_path / "s.tiff"))
    for make in (lambda: slide_tiles("d", [item], TileSampling(0.5, tile=64)),
                 lambda: tile_bags("d", [item], TileSampling(0.5, tile=64), Draws(most=2))):  # fmt: skip
        with pytest.raises(MppUnknown, match=r"set mpp_override = 0\.25 in its \[\[data\]\]"):
            make()
