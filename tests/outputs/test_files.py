"""Tables, maps, exports, the overlay and the report: what is in the files."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

from helpers.shapes import NUCLEI, centroids, ellipses, regions
from wsi_mmm.errors import OptionError, StorageError
from wsi_mmm.outputs import exports
from wsi_mmm.outputs.density import Density
from wsi_mmm.outputs.exports import write_map
from wsi_mmm.outputs.overlay import Field, Scene, legend_counts, overlay_png
from wsi_mmm.outputs.polygons import part
from wsi_mmm.outputs.report import FACTS, SlideRow, report_html, report_json
from wsi_mmm.outputs.tables import tiles_table
from wsi_mmm.types import Grid, TaskInfo

TISSUE = TaskInfo("tissue", "segment", ("tumour", "stroma"), ((200, 0, 0), (0, 160, 0)))


# ---------------------------------------------------------------- tables


def test_the_tiles_table_has_a_row_per_tile() -> None:
    """Positions, sizes, flags, and what tasks say: indices become names; null for no class and for NaN."""
    index = np.array([[0, 1], [2, 3]])
    data = tiles_table(
        index=index, xy=index[:, ::-1] * 448, size=(512, 511), failed=np.array([False, True]),
        tissue=np.array([0.5, 1], np.float32), classes={"stain": ("H&E", "IHC")},
        columns={"stain": np.array([1, -1], np.int32), "stain:IHC": np.array([0.8, np.nan], np.float32)},
    )  # fmt: skip
    table = pq.read_table(io.BytesIO(data)).to_pydict()
    assert (table["row"], table["column"]) == ([0, 2], [1, 3])
    assert (table["x"], table["y"], table["width0"], table["height0"]) == ([448, 1344], [0, 896], [512] * 2, [511] * 2)
    assert table["failed"] == [False, True]
    assert table["tissue"] == [0.5, 1.0]
    assert table["stain"] == ["IHC", None]
    assert table["stain:IHC"] == [pytest.approx(0.8), None]


def test_a_table_without_tiles_has_its_columns() -> None:
    """Empty glass gives an empty table of the same shape."""
    none = np.zeros((0, 2), np.int64)
    data = tiles_table(
        index=none, xy=none, size=(512, 512), failed=np.zeros(0, bool), tissue=np.zeros(0, np.float32),
        columns={"stain": np.zeros(0, np.int32), "age": np.zeros(0, np.float32)}, classes={"stain": ("0",)},
    )  # fmt: skip
    table = pq.read_table(io.BytesIO(data))
    assert table.num_rows == 0
    assert table.column_names[-2:] == ["stain", "age"]


# ---------------------------------------------------------------- maps


def test_maps_are_the_pieces_put_together(tmp_path: Path) -> None:
    """Pieces land at their corners, what lies beyond the slide is cut, attributes say scale and classes."""
    grid = Grid(tile=64, overlap=0, columns=2, rows=2, width=101, height=79, scale_x=2.0, scale_y=2.0, mpp=0.5)
    values = np.random.default_rng(0).integers(0, 256, (2, 64, 64), dtype=np.uint8)
    pieces = [((y, x), values[:, y : y + 32, x : x + 32]) for y in (0, 32) for x in (0, 32)]
    uri = str(tmp_path / "maps" / "tissue.zarr")
    for _ in range(2):  # a second run takes the place of the first
        write_map(uri, TISSUE, 2, 2, grid, pieces)
    array = zarr.open_array(uri, mode="r")
    assert array.shape == (2, 40, 51)
    np.testing.assert_array_equal(array[:], values[:, :40, :51])
    assert array.attrs["classes"] == ["tumour", "stroma"]
    assert array.attrs["scale_x"] == 4.0
    assert array.attrs["mpp"] == 1.0
    assert [p.name for p in (tmp_path / "maps").iterdir()] == ["tissue.zarr"]


def test_a_failed_map_leaves_the_old_one(tmp_path: Path) -> None:
    """An error half-way leaves what was there, and nothing else."""
    grid = Grid(tile=64, overlap=0, columns=1, rows=1, width=64, height=64, scale_x=1.0, scale_y=1.0, mpp=0.5)
    uri = str(tmp_path / "tissue.zarr")
    write_map(uri, TISSUE, 2, 2, grid, [((0, 0), np.full((2, 32, 32), 7, np.uint8))])

    def broken() -> object:
        yield (0, 0), np.ones((2, 32, 32), np.uint8)
        raise StorageError("gone")

    with pytest.raises(StorageError):
        write_map(uri, TISSUE, 2, 2, grid, broken())  # type: ignore[arg-type]
    assert (zarr.open_array(uri, mode="r")[:] == 7).all()
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- exports

ATTRIBUTES = {
    "patch_size": 512, "patch_size_level0": 1024, "level0_magnification": 40, "target_magnification": 20.0,
    "overlap": 0,
    "level0_width": 9000, "level0_height": 8000, "encoder": "default",
}  # fmt: skip


@pytest.fixture
def features(tmp_path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """A features.zarr with five vectors."""
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    coords = np.arange(10, dtype=np.int64).reshape(5, 2)
    uri = str(tmp_path / "features.zarr")
    exports.write_features(uri, vectors, coords, ATTRIBUTES)
    return uri, vectors, coords


def test_h5_is_what_trident_and_clam_read(features: tuple[str, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """coords int64 with the attributes of the field, features float32."""
    uri, vectors, coords = features
    exports.export(uri, str(tmp_path / "f.h5"))
    with h5py.File(tmp_path / "f.h5") as file:
        np.testing.assert_array_equal(file["features"][:], vectors)
        np.testing.assert_array_equal(file["coords"][:], coords)
        assert file["coords"].dtype == np.int64
        assert file["features"].dtype == np.float32
        assert {name: file["coords"].attrs[name] for name in ATTRIBUTES} == ATTRIBUTES


def test_pt_is_a_tensor(features: tuple[str, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """The file loads without pickled objects and is the (N, D) tensor."""
    torch = pytest.importorskip("torch")
    exports.export(features[0], str(tmp_path / "f.pt"))
    np.testing.assert_array_equal(torch.load(tmp_path / "f.pt", weights_only=True).numpy(), features[1])


def test_no_features_are_features_too(tmp_path: Path) -> None:
    """A slide without tissue has a features.zarr of no rows, which exports."""
    uri = str(tmp_path / "features.zarr")
    exports.write_features(uri, np.zeros((0, 4), np.float32), np.zeros((0, 2), np.int64), {})
    exports.export(uri, str(tmp_path / "f.h5"))
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features"].shape == (0, 4)


def test_exports_that_cannot_be(features: tuple[str, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """An unknown format and a source that is none are named."""
    with pytest.raises(OptionError, match="known: h5, pt"):
        exports.export(features[0], str(tmp_path / "f.csv"))
    with pytest.raises(StorageError, match=r"no features\.zarr"):
        exports.export(str(tmp_path / "nothing.zarr"), str(tmp_path / "f.h5"))


# ---------------------------------------------------------------- overlay


def test_density_counts_every_object_once() -> None:
    """Counts add up over pieces and classes; dense fields lie on the slide, where the objects are."""
    some = ellipses(500)
    density = Density(20_000, 10_000, classes=2)
    for piece in (part(some, 0, 200), part(some, 200, 500)):
        density.add(centroids(piece), piece.class_index)
    assert density.counts.sum(axis=(1, 2)).tolist() == np.bincount(some.class_index).tolist()
    fields = density.densest(900, 4)
    assert len(fields) == 4
    assert all(0 <= x <= 10_000 and 0 <= y <= 9_100 for x, y in fields)
    assert Density(100, 100).densest(10, 3) == []


def scene(width: int, height: int, fields: int) -> Scene:
    some = ellipses(300)
    density = Density(width, height)
    density.add(centroids(some))
    pixels = np.full((300, 300, 3), 230, np.uint8)
    areas = regions(np.ones((3, 3)))
    areas = replace(areas, coords=areas.coords * 900, task="tissue")
    return Scene(
        "slide <1> µm²", "a subtitle", np.full((100, 100 * width // height, 3), 240, np.uint8), width, height, 0.25,
        np.ones((20, 20), bool), density, [(TISSUE, areas)],
        [Field(pixels, 1000.0 * k, 500, 1.0, [(NUCLEI, some)]) for k in range(fields)],
        legend_counts([NUCLEI, TISSUE], {"nuclei": {"nucleus": 300}, "tissue": {"stroma": 1}}),
    )  # fmt: skip


@pytest.mark.parametrize(("width", "height", "fields"), [(10_000, 10_000, 4), (30_000, 4_000, 3), (4_000, 30_000, 0)])
def test_the_overlay_is_a_picture_of_any_slide(width: int, height: int, fields: int) -> None:
    """Square, wide and tall slides, with and without close-ups, give a PNG of reasonable size."""
    with Image.open(io.BytesIO(overlay_png(scene(width, height, fields)))) as image:
        assert image.format == "PNG"
        assert 800 < image.width < 2600
        assert 300 < image.height < 1400


def test_the_overlay_shows_its_parts() -> None:
    """Close-ups carry outlines in the class colour; without mpp, tissue and objects there is still a picture."""
    shown = scene(10_000, 10_000, 4)
    with Image.open(io.BytesIO(overlay_png(shown))) as image:
        colors = {color for _, color in image.getcolors(1 << 24)}  # type: ignore[misc]
    assert (60, 120, 220) in colors
    bare = Scene("empty", "", shown.thumbnail, 10_000, 10_000)
    assert overlay_png(bare) == overlay_png(bare)


def test_long_names_and_many_classes_stay_on_the_page() -> None:
    """A title too long for the page loses its middle, a legend too long for it its last lines."""
    shown = scene(10_000, 10_000, 1)
    counts = [(f"a class with a long name, number {n}", (n, 10, 200 - n), n) for n in range(1, 120)]
    crowded = replace(shown, title="a slide whose name goes on and on " * 12, counts=counts)
    with Image.open(io.BytesIO(overlay_png(crowded))) as image, Image.open(io.BytesIO(overlay_png(shown))) as plain:
        assert image.size == plain.size
        pixels = np.asarray(image.convert("RGB"))
    ground = pixels[2, 2]
    assert (pixels[:, -20:] == ground).all()
    assert (pixels[-2:] == ground).all()


@pytest.mark.parametrize("mpp", [0.1, 0.25, 1 / 3, 2.0, 28.97, 1000 / 99 / 7])
def test_scale_bars_are_round_at_any_resolution(mpp: float) -> None:
    """No slide size and resolution leaves the bar without a length, powers of ten included."""
    for width in (64, 1_000, 12_800, 64_000, 100_000):
        shown = Scene("t", "", np.full((50, 50, 3), 240, np.uint8), width, width, mpp)
        assert overlay_png(shown)


# ---------------------------------------------------------------- report

ROW = SlideRow("a", "/s/a.svs", "done", None, 0.5, 0.4999, 10, 0, 1234, 2.5, 4.0, 0.9, 10**7, 0, 800.0)
BAD = replace(
    ROW, id="b", uri="s3://x/<script>alert(1)</script>.svs", status="partial", failed_tiles=1, busy_share=float("nan"),
    error='"quoted" & <b>', extra={"failures": [[0, 256, 512, 768]] * 60, "stages": {"decode": 1.0, "forward": 3.0}},
)  # fmt: skip
RUN = {"wsi_mmm_version": "1.0", "seconds": 3.0, "argv": ["wsi-mmm", "run"], "device": "cpu", "started": "now"}


def test_report_json_has_every_figure() -> None:
    """The facts of the run and every field of every slide; what is no number in JSON is null."""
    found = json.loads(report_json(RUN, [ROW, BAD]))
    assert found["seconds"] == 3.0
    assert set(FACTS) <= set(found["slides"][0])
    assert found["slides"][0]["objects"] == 1234
    assert found["slides"][1]["busy_share"] is None
    assert len(found["slides"][1]["failures"]) == 60


def test_report_html_is_one_safe_page() -> None:
    """Everything is escaped, nothing is loaded from elsewhere, failures are listed with their coordinates."""
    page = report_html(RUN, [ROW, BAD], {"a": overlay_png(scene(10_000, 10_000, 1))}).decode()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&quot;quoted&quot; &amp; &lt;b&gt;" in page
    assert "x 0–512, y 256–768" in page
    assert "10 more in report.json" in page
    assert "data:image/jpeg;base64," in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert "@import" not in page
    assert "75.00" in page  # forward took three quarters of the time


def test_report_html_links_the_files_beside_it() -> None:
    """Files in a slide's folder are relative links, its picture leads to the large one; other addresses are text."""
    odd = replace(ROW, id='a "b" %20é', extra={"files": {
        "overlay": 's3://bucket/out/a "b" %20é/overlay.png', "tiles": "javascript:alert(1)",
    }})  # fmt: skip
    page = report_html(RUN, [ROW, odd], {odd.id: overlay_png(scene(10_000, 10_000, 1))}).decode()
    assert page.count('href="./a%20%22b%22%20%2520%C3%A9/overlay.png"') == 2
    assert 'href="javascript' not in page
    assert 'href="#slide-2"' in page
    assert 'id="slide-2"' in page


def test_report_html_shows_every_fact_of_every_slide() -> None:
    """What report.json says of a slide in figures can be read on the page as well."""
    row = replace(
        ROW, id="named", uri="/s/where.svs", status="failed", error="no luck", mpp_requested=0.5012,
        mpp_effective=0.4987, tiles=1111, failed_tiles=22, objects=333_333, seconds=44.4, tiles_per_s=55.5,
        busy_share=0.66, bytes_read=77_700, cache_hits=888, peak_rss_mb=999.0,
    )  # fmt: skip
    page = report_html(RUN, [row]).decode()
    for text in ("named", "/s/where.svs", "failed", "no luck", "0.5012", "0.4987", "1,111", "<em>22</em>", "333,333",
                 "44.4 s", "55.5", "66 %", "77.7 kB", "888", "999"):  # fmt: skip
        assert text in page, text


def test_a_report_of_nothing() -> None:
    """A run without slides has a page too."""
    assert b"wsi-mmm" in report_html(RUN, [])
    assert json.loads(report_json(RUN, []))["slides"] == []
