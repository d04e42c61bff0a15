"""From a slide to the files a person opens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import shapely

import wsi_mmm
from helpers.qupath import check_qupath
from wsi_mmm.api import RunReport
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff

FIELDS = {
    "id", "uri", "status", "error", "mpp_requested", "mpp_effective", "tiles", "failed_tiles", "objects", "seconds",
    "tiles_per_s", "busy_share", "bytes_read", "cache_hits", "peak_rss_mb",
}  # fmt: skip


def features(folder: Path) -> list[dict]:
    return json.loads(gzip.decompress((folder / "result.geojson.gz").read_bytes()))["features"]


def test_the_geojson_keeps_every_rule_of_qupath(quiet_run: tuple[Path, RunReport]) -> None:
    """QuPath would import the file: the checker finds nothing."""
    report = check_qupath(quiet_run[0] / "result.geojson.gz", size=(1536, 1152))
    assert not report.violations and report.features > 0


def test_nothing_reaches_beyond_the_slide(tiny_slide: Path, tmp_path: Path) -> None:
    """Map pixels at the far edges lie partly beyond a slide of odd size and mpp; objects there end at its edge."""
    with wsi_mmm.open_slide(tiny_slide) as whole:
        pixels = whole.read_region(0, 0, 701, 643)
    pixels[300:330, -25:] = pixels[-25:, 300:330] = (70, 40, 120)  # nuclei that the edges cut
    write_tiff(tmp_path / "odd.tiff", [pixels], TiffForm(mpp=0.4975))
    [row] = wsi_mmm.run(tmp_path / "odd.tiff", output=tmp_path / "out", tissue="none", gzip=False).slides
    assert row.extra["device"] in ("cpu", "cuda")
    report = check_qupath(tmp_path / "out" / "odd" / "result.geojson", size=(701, 643))
    assert not report.violations and report.features > 20


def test_the_layout_is_the_one_that_is_documented(quiet_run: tuple[Path, RunReport]) -> None:
    """Each slide has its folder, the run its report, and no scratch is left."""
    folder, _ = quiet_run
    names = {path.name for path in folder.iterdir()}
    assert {"result.geojson.gz", "slide.json", "tiles.parquet", "features.zarr", "overlay.png"} <= names
    assert not list((folder / ".work").rglob("*.npz"))
    assert (folder.parent / "report.html").read_text().startswith("<!")


def test_the_report_has_every_field(quiet_run: tuple[Path, RunReport]) -> None:
    """report.json gives, per slide, all the figures that are promised."""
    [row] = json.loads((quiet_run[0].parent / "report.json").read_text())["slides"]
    assert set(row) >= FIELDS
    assert row["status"] == "done" and row["error"] is None and row["tiles"] > 0 and row["objects"] > 0
    assert 0 < row["busy_share"] <= 1 and row["peak_rss_mb"] > 50 and row["bytes_read"] > 0


def test_most_known_nuclei_are_found_once(tiny_slide: Path, quiet_run: tuple[Path, RunReport], tiny_truth) -> None:
    """On the synthetic slide at least 70 % of the nuclei are hit, and hardly any is hit twice."""
    found = shapely.from_geojson(
        [json.dumps(f["geometry"]) for f in features(quiet_run[0]) if f["properties"]["objectType"] == "detection"]
    )
    tree = shapely.STRtree(found)
    hits = np.bincount(
        tree.query(shapely.points(tiny_truth.centers), predicate="within")[0], minlength=len(tiny_truth.centers)
    )
    assert (hits > 0).mean() > 0.7
    assert (hits > 1).mean() < 0.02


def test_no_object_is_doubled_at_a_seam(quiet_run: tuple[Path, RunReport]) -> None:
    """No two nuclei share more than half of the smaller one."""
    found = shapely.from_geojson(
        [json.dumps(f["geometry"]) for f in features(quiet_run[0]) if f["properties"]["objectType"] == "detection"]
    )
    a, b = shapely.STRtree(found).query(found, predicate="intersects")
    a, b = a[a < b], b[a < b]
    smaller = np.minimum(shapely.area(found[a]), shapely.area(found[b]))
    assert not (shapely.area(shapely.intersection(found[a], found[b])) > 0.5 * smaller).any()


def test_features_match_the_tiles_table(quiet_run: tuple[Path, RunReport]) -> None:
    """One vector per tile, with the coordinates of the tiles table, and what TRIDENT and CLAM want to know."""
    zarr, parquet = pytest.importorskip("zarr"), pytest.importorskip("pyarrow.parquet")
    group = zarr.open_group(quiet_run[0] / "features.zarr", mode="r")
    table = parquet.read_table(quiet_run[0] / "tiles.parquet").to_pydict()
    coords = np.asarray(group["coords"])
    assert group["features"].shape[0] == len(coords) == len(table["x"]) == quiet_run[1].slides[0].tiles
    assert coords[:, 0].tolist() == table["x"] and coords[:, 1].tolist() == table["y"]
    assert {
        "patch_size",
        "patch_size_level0",
        "level0_magnification",
        "target_magnification",
        "overlap",
        "level0_width",
        "level0_height",
    } <= set(group["coords"].attrs)
    assert np.isfinite(np.asarray(group["features"])).all()


def test_embed_gives_one_vector_per_tile_and_exports(tiny_slide: Path, tmp_path: Path) -> None:
    """embed writes features only, and exports what CLAM and TRIDENT read."""
    h5py = pytest.importorskip("h5py")
    report = wsi_mmm.embed(tiny_slide, output=tmp_path, export=["h5", "pt"])
    [row] = report.slides
    assert row.status == "done" and row.objects == 0
    with h5py.File(tmp_path / row.id / "features.h5") as file:
        assert file["features"].shape[0] == file["coords"].shape[0] == row.tiles
        assert file["coords"].attrs["patch_size"] == 256
    torch = pytest.importorskip("torch")
    assert torch.load(tmp_path / row.id / "features.pt", weights_only=True).shape[0] == row.tiles


def test_two_slides_of_one_name_keep_two_folders(tiny_slide: Path, tmp_path: Path) -> None:
    """Slides that share a file name in different folders do not overwrite each other."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "case.tiff").symlink_to(tiny_slide)
    report = wsi_mmm.run([tmp_path / "a", tmp_path / "b"], output=tmp_path / "out", tissue="none", tasks=["stain"])
    assert len({row.id for row in report.slides}) == 2 and report.exit_code == 0


def test_a_namesake_does_not_overwrite_what_is_there(tiny_slide: Path, tmp_path: Path) -> None:
    """Another slide of the same name, run later into the same output, fails and says so; --force replaces."""

    other = tmp_path / tiny_slide.name
    synthetic_slide(other, seed=5, width=600, height=600, nuclei=10)
    assert wsi_mmm.run(tiny_slide, output=tmp_path / "out", tasks=["stain"]).exit_code == 0
    [row] = wsi_mmm.run(other, output=tmp_path / "out", tasks=["stain"]).slides
    assert row.status == "failed"
    assert "another slide" in (row.error or "")
    assert wsi_mmm.run(other, output=tmp_path / "out", tasks=["stain"], force=True).exit_code == 0


def test_stream_tiles_gives_the_pixels_of_the_slide(tiny_slide: Path) -> None:
    """A streamed tile is the region of the slide at its coordinates."""
    with wsi_mmm.open_slide(tiny_slide) as slide:
        batch = next(iter(wsi_mmm.stream_tiles(slide, mpp=1.0, size=128, batch_size=3)))
        assert batch.pixels.shape == (3, 128, 128, 3) and batch.xy.dtype == np.int64
        x, y = batch.xy[1]
        assert (slide.read_region(int(x), int(y), 128, 128, mpp=1.0) == batch.pixels[1]).all()
