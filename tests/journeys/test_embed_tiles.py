"""``embed --tiles``: the tiles that TRIDENT, CLAM or an export of ours lists, row for row, on every executor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import wsi_mmm
from helpers.commands import invoke, json_lines
from helpers.tile_lists import clam_file, trident_file
from wsi_mmm import api
from wsi_mmm.engine.executors.dask import DaskExecutor
from wsi_mmm.engine.run import run_slides
from wsi_mmm.engine.stages import forward, prefetch
from wsi_mmm.errors import OptionError, StorageError
from wsi_mmm.outputs.exports import SlideFeatures, read_features
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.slides.tiff.reader import TiffReader

SIZE = 700, 600
CORNERS = np.array([[301, 77], [0, 0], [444, 333], [301, 77], [128, 0], [640, 580], [13, 401], [200, 200], [72, 72]])
MEAN, STD = (0.7, 0.6, 0.5), (0.2, 0.21, 0.22)
OPTIONS: dict[str, Any] = {"encoder": "test_resnet", "weights": "random", "device": "cpu", "block_tiles": 2}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "s.tiff"
    synthetic_slide(path, 1, width=SIZE[0], height=SIZE[1], mpp=0.25, nuclei=60)
    return path


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as TRIDENT writes it: tiles of 64 px at 20x, 128 px of level 0."""
    folder = tmp_path_factory.mktemp("trident")
    trident_file(folder / "patches" / "s_patches.h5", CORNERS, size=64, slide=SIZE, magnification=40, overlap=16)
    return folder


@pytest.fixture(scope="module")
def embedded(slide: Path, listed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedded in this process, with the export beside the features."""
    out = tmp_path_factory.mktemp("embedded")
    report = api.embed(slide, output=out, tiles=listed, export="h5", **OPTIONS)
    assert report.exit_code == 0, report.slides
    return out


def features(out: Path, name: str = "s") -> SlideFeatures:
    return read_features(str(out / name / "features.zarr"))


def same(one: SlideFeatures, other: SlideFeatures) -> bool:
    return np.array_equal(one.coords, other.coords) and np.array_equal(one.vectors, other.vectors)


def test_coordinates_and_attributes_are_those_of_the_file(embedded: Path) -> None:
    """Row for row, a tile that is listed twice as well; a reader of TRIDENT finds the ratio of sizes."""
    found = features(embedded)
    assert np.array_equal(found.coords, CORNERS) and np.array_equal(found.vectors[0], found.vectors[3])
    assert len(np.unique(found.vectors, axis=0)) == len(CORNERS) - 1
    said = found.attributes
    assert (said["patch_size"], said["patch_size_level0"], said["mpp"], said["overlap"]) == (64, 128, 0.5, 16)
    assert said["level0_magnification"] / said["target_magnification"] == 2
    table = pq.read_table(embedded / "s" / "tiles.parquet").to_pydict()
    assert (table["row"], table["x"], table["y"]) == ([*range(9)], CORNERS[:, 0].tolist(), CORNERS[:, 1].tolist())
    facts = json.loads((embedded / "s" / "slide.json").read_text())
    assert (facts["tiles"], facts["mpp_requested"], facts["status"]) == (9, 0.5, "done")


@torch.inference_mode()
def test_vectors_are_those_of_a_plain_script(slide: Path, listed: Path, tmp_path: Path) -> None:
    """OpenSlide, PIL's antialiased resize, timm: cosine of at least 0.999 at 0.5 mpp, 0.99999 at level 0."""
    torch.manual_seed(0)
    network: Any = timm.create_model("test_resnet", num_classes=0).eval()
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "w.safetensors")
    clam_file(tmp_path / "s.h5", CORNERS, size=96, level=0, downsample=1.0, level_size=SIZE)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for where, wide, side, least in ((listed, 128, 64, 0.999), (tmp_path / "s.h5", 96, 96, 0.99999)):
        out = tmp_path / str(wide)
        options = {**OPTIONS, "weights": str(tmp_path / "w.safetensors"), "mean": MEAN, "std": STD}
        assert api.embed(slide, output=out, tiles=where, **options).exit_code == 0
        with openslide.OpenSlide(str(slide)) as opened:
            for vector, (x, y) in zip(features(out).vectors, CORNERS.tolist(), strict=True):
                tile = opened.read_region((x, y), 0, (wide, wide))
                white = Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile).convert("RGB")
                pixels = np.array(white.resize((side, side), Image.Resampling.BOX))
                wanted = network((torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - mean) / std)[0]
                assert float(torch.cosine_similarity(torch.from_numpy(vector), wanted, 0)) >= least


def test_an_export_embedded_again_gives_the_same_vectors(slide: Path, embedded: Path, tmp_path: Path) -> None:
    """Of a list, and of a grid whose corners are rounded; again and again; sizes and resolution are the file's."""
    assert api.embed(slide, output=tmp_path / "a", tiles=embedded, **OPTIONS).exit_code == 0
    assert same(features(tmp_path / "a"), features(embedded))
    grid = {"mpp": 0.37, "tile_size": 64, "overlap": 24, "tissue": "none"}
    assert api.embed(slide, output=tmp_path / "b0", export="h5", **OPTIONS, **grid).exit_code == 0
    for turn in (0, 1):
        tiles = tmp_path / f"b{turn}" / "s" / "features.h5"
        assert api.embed(slide, output=tmp_path / f"b{turn + 1}", tiles=tiles, export="h5", **OPTIONS).exit_code == 0
        assert same(features(tmp_path / f"b{turn + 1}"), features(tmp_path / "b0"))
        said, wanted = (features(tmp_path / name).attributes for name in (f"b{turn + 1}", "b0"))
        assert said == wanted


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles each block had that was read."""
    counts: list[int] = []
    inner = forward.read_listed

    def count(reader: Any, grid: Any, places: Any, index: Any, fetched: Any = None) -> Any:
        counts.append(len(index))
        return inner(reader, grid, places, index, fetched)

    monkeypatch.setattr(forward, "read_listed", count)
    return counts


def test_it_resumes_and_knows_lists_by_their_content(
    slide: Path, listed: Path, embedded: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were done are not read again; the same list elsewhere is the same; another one is computed anew."""
    tiles = tmp_path / "s.h5"
    shutil.copy(listed / "patches" / "s_patches.h5", tiles)
    write = forward._write_values

    def fail_one(ctx: Any, *given: Any) -> None:
        if ctx.unit.block == (1, 0):
            raise StorageError("the disk is full")
        write(ctx, *given)

    out, cache = tmp_path / "out", tmp_path / "cache"
    monkeypatch.setattr(forward, "_write_values", fail_one)
    assert api.embed(slide, output=out, tiles=tiles, cache=cache, **OPTIONS).exit_code != 0
    monkeypatch.setattr(forward, "_write_values", write)
    read.clear()
    assert api.embed(slide, output=out, tiles=tiles, cache=cache, **OPTIONS).exit_code == 0
    assert 0 < sum(read) < len(CORNERS) and same(features(out), features(embedded))
    read.clear()
    shutil.move(tiles, tmp_path / "moved.h5")
    [row] = api.embed(slide, output=out, tiles=tmp_path / "moved.h5", cache=cache, **OPTIONS).slides
    assert (row.status, read) == ("done", [])
    trident_file(tiles, CORNERS[::-1], size=64, slide=SIZE, magnification=40, overlap=16)
    assert api.embed(slide, output=out, tiles=tiles, cache=cache, **OPTIONS).exit_code == 0
    assert sum(read) == len(CORNERS) and np.array_equal(features(out).vectors[::-1], features(embedded).vectors)


@pytest.fixture(scope="module")
def client() -> Iterator[distributed.Client]:
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="inproc://"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as found,
    ):
        yield found


def test_executors_and_blocks_change_nothing(
    slide: Path, listed: Path, embedded: Path, client: distributed.Client, tmp_path: Path
) -> None:
    """A Dask cluster, which packs units and plans, and blocks of other sizes: the same bytes."""
    request = api.embed_request(slide, output=tmp_path / "dask", tiles=listed, **OPTIONS)
    assert run_slides(request, lambda: DaskExecutor(client), lambda event: None).exit_code == 0
    assert same(features(tmp_path / "dask"), features(embedded))
    for block in (1, 8):
        options = {**OPTIONS, "block_tiles": block}
        assert api.embed(slide, output=tmp_path / str(block), tiles=listed, **options).exit_code == 0
        assert same(features(tmp_path / str(block)), features(embedded))


def test_blocks_of_another_size_take_up_where_a_run_ended(
    slide: Path, listed: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same process and folder: tiles lie elsewhere in the made-up grid, and are the same."""
    write = forward._write_values

    def fail(*given: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(forward, "_write_values", fail)
    assert api.embed(slide, output=tmp_path, tiles=listed, **OPTIONS | {"block_tiles": 3}).exit_code != 0
    monkeypatch.setattr(forward, "_write_values", write)
    assert api.embed(slide, output=tmp_path, tiles=listed, **OPTIONS | {"block_tiles": 1}).exit_code == 0
    assert same(features(tmp_path), features(embedded))


def test_lists_on_far_slides_are_fetched_ahead(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles in whole target px; the others are fetched when they are read. Vectors are the same."""
    corners = np.append(CORNERS // 2 * 2, [[301, 77]], axis=0)
    tiles = trident_file(tmp_path / "s.h5", corners, size=64, slide=SIZE, magnification=40)
    assert api.embed(slide, output=tmp_path / "near", tiles=tiles, **OPTIONS).exit_code == 0
    fetched: list[int] = []
    inner = TiffReader.fetch

    def fetch(reader: TiffReader, tiles: Any) -> Any:
        fetched.append(sum(len(some.xy) for some in tiles))
        return inner(reader, tiles)

    monkeypatch.setattr(TiffReader, "fetch", fetch)
    monkeypatch.setattr(prefetch, "is_far", lambda reader: True)
    assert api.embed(slide, output=tmp_path / "far", tiles=tiles, **OPTIONS).exit_code == 0
    assert sum(fetched) == len(CORNERS) and same(features(tmp_path / "far"), features(tmp_path / "near"))


def test_several_encoders_read_listed_tiles_once(
    slide: Path, listed: Path, embedded: Path, tmp_path: Path, read: list[int]
) -> None:
    """Each as alone."""
    options = {name: value for name, value in OPTIONS.items() if name != "encoder"}
    reports = api.embed_encoders(slide, ["test_efficientnet", "test_resnet"], output=tmp_path, tiles=listed, **options)
    assert all(report.exit_code == 0 for report in reports.values()) and sum(read) == len(CORNERS)
    assert same(features(tmp_path / "test_resnet"), features(embedded))


def test_a_slide_without_its_list_stops_no_other(slide: Path, listed: Path, tmp_path: Path) -> None:
    """Missing, broken, of another slide, of tiles of another size: one line each; the good one is done."""
    names = ["s", "none", "broken", "other", "larger", "empty"]
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in names[1:]:
        shutil.copy(slide, tmp_path / f"{name}.tiff")
    shutil.copy(listed / "patches" / "s_patches.h5", lists / "s.h5")
    (lists / "broken.h5").write_bytes(b"nothing")
    trident_file(lists / "other_patches.h5", CORNERS, size=64, slide=(9000, 8000), magnification=40)
    trident_file(lists / "larger_patches.h5", CORNERS, size=128, slide=SIZE, magnification=40)
    trident_file(lists / "empty_patches.h5", [], size=64, slide=SIZE, magnification=40)
    slides = [slide, *(tmp_path / f"{name}.tiff" for name in names[1:])]
    report = api.embed(slides, output=tmp_path / "out", tiles=lists, **OPTIONS)
    rows = {row.id: row for row in report.slides}
    assert {name: rows[name].status for name in names} == dict.fromkeys(names, "failed") | {
        "s": "done",
        "empty": "empty",
    }
    for name, words in {
        "none": "looked for none_patches.h5", "broken": "no list of tiles", "other": "9000 x 8000 px",
        "larger": "tiles of 128 px and others of this run 64 px",
    }.items():  # fmt: skip
        assert words in rows[name].error and "\n" not in rows[name].error
        assert not (tmp_path / "out" / name / "features.zarr").exists()


def test_the_command_and_its_dry_run(slide: Path, listed: Path, embedded: Path, tmp_path: Path) -> None:
    """The tiles that the files list are counted, and computed; what contradicts a file names the way out."""
    said = ["embed", str(slide), "--encoder", "test_resnet", "--weights", "random", "--tiles", str(listed)]
    [line] = json_lines(invoke(*said, "--dry-run", "--json"))
    assert (line["tiles"], "tiles_at_most" in line) == (9, False)
    assert "9 listed tiles" in invoke(*said, "--dry-run").stdout
    wrong = invoke(*said, "--dry-run", "--tile-size", "256")
    assert wrong.exit_code != 0 and "use --tile-size 64, or leave it out" in wrong.stderr
    assert invoke(*said, "-o", str(tmp_path), "--device", "cpu", "--mpp", "0.5", "--tile-size", "64").exit_code == 0
    assert same(features(tmp_path), features(embedded))


@pytest.mark.parametrize(
    "options", [{"tissue": "none"}, {"min_tissue": 0.5}, {"regions": "a.geojson"}, {"cache": "c", "cache_tiles": "on"}]
)
def test_options_that_choose_tiles_are_refused_beside_a_list(
    options: dict[str, Any], slide: Path, tmp_path: Path
) -> None:
    """Before any slide."""
    with pytest.raises(OptionError, match="a file lists the tiles"):
        api.embed(slide, output=tmp_path / "out", tiles="a.h5", **OPTIONS, **options)


def test_a_model_with_tasks_runs_on_a_grid(slide: Path, listed: Path, tmp_path: Path) -> None:
    """Its maps are put together of tiles that lie on one."""
    with pytest.raises(OptionError, match="give the list to embed --tiles"):
        wsi_mmm.run(slide, output=tmp_path / "out", tiles=listed)
