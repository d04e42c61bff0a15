"""The app on a platform of ours: what it posts, how it ends, and that it ends."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

import wsi_mmm
from helpers.empaia_platform import FakePlatform, Fault
from wsi_mmm.config import empaia_job
from wsi_mmm.empaia.app import App, Ended, run_app
from wsi_mmm.empaia.asked import regions_geojson, regions_of, wsi_of
from wsi_mmm.empaia.bodies import Wsi
from wsi_mmm.empaia.geometry import polygons
from wsi_mmm.empaia.transport import Patience
from wsi_mmm.engine import patience

from .conftest import ROIS, WSI_ID, Start, platforms, rectangle, regions

QUICK = Patience(total=30.0, attempts=3, pause=0.01)
EAD = json.loads((Path(__file__).parents[2] / "deploy" / "empaia" / "ead.json").read_text())
POLYGON = {"type": "polygon", "coordinates": [[700, 300], [1000, 350], [900, 700], [650, 600]]}
CIRCLE = {"type": "circle", "center": [300, 300], "radius": 150}


def run(**told: Any) -> Ended:
    return run_app(empaia_job(), App(**told), patience=QUICK)


def posted(platform: FakePlatform, key: str) -> list[dict[str, Any]]:
    """The items of a collection that was posted as the output ``key``."""
    return platform.items[platform.outputs[key]["id"]]


def corners(platform: FakePlatform) -> list[list[list[int]]]:
    return [one["coordinates"] for one in posted(platform, "nuclei_objects")]


def objects_of_the_cli(slide: Path, output: Path, wsi: Wsi, regions_file: Path | None) -> list[list[list[int]]]:
    """What a run over the file finds, rounded as the platform wants it; in the file's order."""
    more = {} if regions_file is None else {"regions": regions_file}
    [row] = wsi_mmm.run(slide, output=output, **more).slides
    assert row.status == "done", row.error
    found = json.loads(gzip.decompress((output / row.id / "result.geojson.gz").read_bytes()))["features"]
    rings = [
        [np.array(ring[:-1]) for ring in one["geometry"]["coordinates"]]
        for one in found
        if one["properties"]["objectType"] == "detection"
    ]
    return [[list(c) for c in shape.corners] for one in rings for shape in polygons(one, wsi, keep_holes=False)]


# ------------------------------------------------------------------------------------------------ what is posted


def test_regions_of_every_shape(start: Start, tiny_slide: Path, tmp_path: Path) -> None:
    """Every output of the mode is posted, the objects are those of the CLI on the same regions, and each region has its
    count; the map has the same number of objects in it; progress rises; the job is finalized once."""
    given = regions(rectangle(500, 300, 300, 200), POLYGON, CIRCLE)
    platform = start(inputs={"regions": given})
    assert run(pause=0.0) == Ended("finalized")
    assert platform.state == "COMPLETED" and platform.log.count("PUT /finalize") == 1
    assert set(platform.outputs) == set(EAD["modes"]["standalone"]["outputs"])

    wsi = wsi_of(platform.inputs["slide"])
    asked = tuple(regions_of(given, wsi))
    (tmp_path / "regions.geojson").write_bytes(regions_geojson(asked))
    expected = objects_of_the_cli(tiny_slide, tmp_path / "cli", wsi, tmp_path / "regions.geojson")
    assert corners(platform) == expected and len(expected) > 20

    centres = shapely.get_coordinates(shapely.centroid([shapely.Polygon(one) for one in expected]))
    counts = posted(platform, "nuclei_counts")
    assert [one["reference_id"] for one in counts] == ROIS[:3]
    for region, count, density in zip(asked, counts, posted(platform, "nuclei_densities"), strict=True):
        assert abs(count["value"] - int(region.area.holds(centres).sum())) <= 1  # corners are rounded here
        assert density["value"] == pytest.approx(count["value"] / (region.area.size * 0.25e-6))
    assert 0 < platform.progress[0] <= platform.progress[-1] <= 1 == len(set(np.sign(np.diff(platform.progress))))

    [tile] = [np.frombuffer(data, "<f4") for data in platform.tiles.values()]
    [level] = platform.outputs["nuclei_map"]["levels"]
    down = platform.inputs["slide"]["levels"][level["slide_level"]]["downsample_factor"]
    assert tile.sum() * (0.5e-3 * down) ** 2 == pytest.approx(len(expected), rel=0.1)
    for tissue in posted(platform, "tissue"):
        shape = shapely.Polygon(tissue["coordinates"])
        assert shape.intersection(shapely.union_all([one.area.shape for one in asked])).area > 0.95 * shape.area
    assert not list(tmp_path.glob("wsi-mmm-empaia-*"))


def test_preprocessing_is_the_whole_slide(start: Start, tiny_slide: Path, tmp_path: Path) -> None:
    """Without regions; each object has a class of the EAD and a confidence, in the objects' order."""
    platform = start(mode="PREPROCESSING")
    del platform.inputs["regions"]
    assert run() == Ended("finalized")
    assert set(platform.outputs) == set(EAD["modes"]["preprocessing"]["outputs"])
    wsi = wsi_of(platform.inputs["slide"])
    assert corners(platform) == objects_of_the_cli(tiny_slide, tmp_path / "cli", wsi, None)
    objects = posted(platform, "nuclei_objects")
    classes, confidences = posted(platform, "nuclei_classes"), posted(platform, "nuclei_confidences")
    ids = [one["id"] for one in objects]
    assert [one["reference_id"] for one in classes] == ids == [one["reference_id"] for one in confidences]
    assert {one["value"] for one in classes} == {f"{EAD['namespace']}.classes.nuclei.nucleus"}
    assert all(0 < one["value"] <= 1 for one in confidences)
    assert platform.outputs["nuclei_slide_count"]["value"] == len(ids) > 50
    area = sum(shapely.Polygon(one["coordinates"]).area for one in posted(platform, "tissue")) * 0.25e-6
    assert platform.outputs["nuclei_slide_density"]["value"] == pytest.approx(len(ids) / area)
    stains = posted(platform, "stain_classes")
    assert {one["reference_id"] for one in stains} == {one["id"] for one in posted(platform, "tissue")}
    assert platform.outputs["stain_slide_class"]["value"] in ("H&E", "IHC", "Giemsa", "other")


def test_a_region_without_tissue_has_no_objects(start: Start) -> None:
    """Empty collections, counts of 0, and the job is finalized."""
    platform = start(inputs={"regions": regions(rectangle(0, 0, 4, 4))})
    assert run() == Ended("finalized")
    assert corners(platform) == [] and [one["value"] for one in posted(platform, "nuclei_counts")] == [0]
    assert set(platform.outputs) == set(EAD["modes"]["standalone"]["outputs"])


# ------------------------------------------------------------------------------------------------ how it ends


@pytest.fixture(scope="module")
def published(tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a job that has done the slide."""
    work = tmp_path_factory.mktemp("published") / "work"
    with pytest.MonkeyPatch.context() as patch, platforms(tiny_slide, work.parent, patch) as begin:
        begin()
        assert run(work=str(work)) == Ended("finalized")
    (work / "posting.json").unlink()
    return work


@pytest.fixture
def half_done(published: Path, tmp_path: Path) -> str:
    """The same for one test: the job has died before it posted anything."""
    return str(shutil.copytree(published, tmp_path / "half-done"))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"mode": "POSTPROCESSING"}, "postprocessing mode"),
        ({"mode": "REPORT"}, "report mode"),
        ({"inputs": {"slide": None}}, "no slide"),
        ({"inputs": {"regions": None}}, "no regions of interest"),
        ({"inputs": {"regions": regions()}}, "No region"),
        ({"inputs": {"regions": regions(rectangle(0, 0, 9, 9), rectangle(9000, 9000, 10, 10))}}, "2 lies outside"),
        ({"inputs": {"regions": regions({"type": "line", "coordinates": [[0, 0], [1, 1]]})}}, "1 is no rectangle"),
        ({"inputs": {"slide": {"id": WSI_ID}}}, "description of the slide"),
    ],
)
def test_a_wrong_job_fails_with_words_for_a_pathologist(start: Start, told: dict[str, Any], words: str) -> None:
    """Wrong modes, missing inputs, regions outside of the slide: one failure that says so, nothing is posted."""
    platform = start(**told)
    ended = run()
    assert ended.how == "failed" and words in ended.message
    assert (platform.state, platform.message) == ("FAILED", ended.message)
    assert not platform.outputs and "PUT /finalize" not in platform.log


def test_a_slide_without_a_resolution(start: Start) -> None:
    """It fails, and says that it is the resolution."""
    platform = start()
    platform.inputs["slide"]["pixel_size_nm"] = None
    assert "resolution" in run().message and platform.state == "FAILED"


EARLY = ("/mode", "/inputs/slide")
LATE = ("/outputs/nuclei_objects", "/items")
FAULTS = [
    *(Fault(where, status, times=99) for where in EARLY for status in (0, 401, 404, 422, 429, 500, 503)),
    *(Fault("GET /regions", status, times=999) for status in (0, 401, 404, 422, 429, 500, 503)),
    *(Fault(where, status, times=99) for where in LATE for status in (0, 401, 404, 413, 422, 429, 500)),
    *(Fault("/data", status, times=99) for status in (0, 413, 423, 500)),
    Fault("/finalize", 500, times=99),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda one: f"{one.where.split('/')[-1]}-{one.status}")
def test_every_fault_ends_in_failure(
    start: Start, half_done: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """Whatever keeps failing: one failure with a short message that names no status, path or token."""
    monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "2")
    for name in ("PATIENCE", "UNPROVEN"):
        monkeypatch.setattr(patience, name, 0.5)
    platform = start(faults=[Fault(**vars(fault) | {"headers": {"Retry-After": "0"}})])
    more = {"work": half_done} if fault.where in (*LATE, "/data", "/finalize") else {}
    ended = run(**more)
    assert ended.how == "failed" and ended.told and ended.error
    assert platform.state == "FAILED" and platform.message == ended.message
    assert sum(line in ("PUT /finalize", "PUT /failure") for line in platform.log) <= 1 + 3 * (
        fault.where == "/finalize"
    )
    assert len(ended.message) <= 255 and not any(word in ended.message for word in ("http", "/", "Error", "token"))
    assert platform.job.token not in repr(ended)


PASSING = ("/mode", "/inputs", "GET /regions", "/items", "/data", "/progress", "/finalize")
SURVIVED = [
    *(Fault(where, 503, times=2) for where in PASSING),
    *(Fault(where, done=True) for where in ("/items", "/data", "/finalize")),
    Fault("GET /regions"),
    Fault("GET /regions", 429, times=2),
    *(Fault("/progress", status, times=99) for status in (404, 422)),
]


@pytest.mark.parametrize("fault", SURVIVED, ids=lambda one: f"{one.where.split('/')[-1]}-{one.status}-{one.done}")
def test_what_passes_is_survived(start: Start, half_done: str, fault: Fault) -> None:
    """Faults that pass, lost answers, and a platform that wants no progress: finalized, nothing posted twice."""
    platform = start(faults=[Fault(**vars(fault))])
    more = {} if fault.where == "GET /regions" else {"work": half_done}
    ended = run(pause=0.0, **more)
    assert ended == Ended("finalized"), repr(ended)
    whole = corners(platform)
    assert len(whole) == len({json.dumps(one) for one in whole}) == len(posted(platform, "nuclei_classes")) > 3


@pytest.mark.parametrize("where", ["GET /inputs", "GET /regions", "/items", "/finalize"])
def test_silence_ends_in_failure(start: Start, half_done: str, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A platform or a slide service that does not answer any more is given up after the time-out."""
    monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "1")
    for name in ("PATIENCE", "UNPROVEN"):
        monkeypatch.setattr(patience, name, 0.5)
    platform = start(faults=[Fault(where, 200, times=99, wait=60.0)])
    impatient = Patience(total=1.0, attempts=2, pause=0.01)
    work = half_done if where == "/items" else None
    ended = run_app(empaia_job(), App(work=work), patience=impatient)
    assert ended.how == "failed" and ended.told and platform.state == "FAILED"


def test_a_job_that_died_while_posting_is_not_posted_again(start: Start, tmp_path: Path) -> None:
    """Started again in the same work folder, it fails with words that say what to do; no object is there twice."""
    work = str(tmp_path / "work")
    platform = start(faults=[Fault("/nuclei_confidences", times=99), Fault("/failure", times=99)])
    first = run(work=work)
    assert first.how == "failed" and not first.told
    before, platform.faults = len(platform.log), []
    again = run(work=work)
    assert again.how == "failed" and "interrupted" in again.message and platform.state == "FAILED"
    assert not any(line.startswith("POST") for line in platform.log[before:])


def test_a_job_that_died_before_posting_goes_on(start: Start, tmp_path: Path) -> None:
    """What the engine had published is not done again: no picture but those that tell of tissue is fetched twice."""
    work = str(tmp_path / "work")
    platform = start(faults=[Fault("/outputs/tissue", 500), Fault("/failure", times=99)])
    assert run(work=work).how == "failed"
    (tmp_path / "work" / "posting.json").unlink()  # it died just before
    platform.faults, before = [], len(platform.log)
    assert run(work=work) == Ended("finalized") and len(corners(platform)) > 3
    pictures = [line for line in platform.log[before:] if line.startswith(("GET /regions", "GET /tiles"))]
    assert len(pictures) <= 2


def test_a_job_started_again_elsewhere_meets_its_outputs(start: Start, tmp_path: Path) -> None:
    """Where the work folder is gone, a platform that has the output refuses it, and the job fails; nothing is added."""
    platform = start(faults=[Fault("/nuclei_confidences", times=99), Fault("/failure", times=99)])
    run(work=str(tmp_path / "one"))
    kept, platform.faults = {key: len(items) for key, items in platform.items.items()}, []
    assert run(work=str(tmp_path / "two")).how == "failed" and platform.state == "FAILED"
    assert {key: len(items) for key, items in platform.items.items()} == kept


def test_a_cluster_needs_a_shared_work_folder(start: Start) -> None:
    """A scheduler without one is refused before anything is begun."""
    platform = start()
    ended = run(scheduler="tcp://127.0.0.1:9")
    assert ended.how == "failed" and "--work" in ended.error and "--work" not in ended.message
    assert platform.state == "FAILED"
