"""Bags of vectors and of tiles: bounded, drawn purely, with the truth of their slide."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import wsi_mmm
from wsi_mmm.cache import ArraySpec, CacheEntry
from wsi_mmm.errors import InputError, StorageError
from wsi_mmm.outputs.exports import export, write_features
from wsi_mmm.outputs.tables import tiles_table
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.fake import synthetic_slide
from wsi_mmm.tasks.targets import Survival
from wsi_mmm.tiles.grid import make_grid, tile_xy
from wsi_mmm.training.data.bags import (
    BagItem,
    Draws,
    bags_of_table,
    entry_features,
    feature_bags,
    read_h5,
    tile_bags,
)
from wsi_mmm.training.data.base import DataSource
from wsi_mmm.training.data.embedding import Embedding
from wsi_mmm.training.data.slides import SlideItem, TileSampling
from wsi_mmm.training.data.tables import TableTask, balance_labels, read_table, slide_table
from wsi_mmm.types import I64

RNG = np.random.default_rng(0)


MADE = {"encoder": "e", "model_hash": "h" * 64, "mpp": 0.5, "patch_size": 256, "overlap": 0}


def features(folder: Path, name: str, count: int, width: int = 6, **more: object) -> str:
    """Vectors whose first value is their number; ``more``: attributes that differ."""
    vectors = RNG.normal(size=(count, width)).astype(np.float32)
    vectors[:, 0] = np.arange(count)
    uri = str(folder / name / "features.zarr")
    write_features(uri, vectors, np.arange(2 * count).reshape(count, 2), {**MADE, **more})
    return uri


def test_bags_hold_the_vectors_of_their_slide_and_its_truth(tmp_path: Path) -> None:
    """All of them, or so many as allowed; every time another draw, the same item always the same one."""
    items = [
        BagItem("a", features(tmp_path, "a", 50), "P", {"os": Survival(3.0, True)}, 1),
        BagItem("b", features(tmp_path, "b", 7)),
    ]
    whole: DataSource = feature_bags("d", items)
    sample = whole.read([0], 0)[0]
    assert sample.vectors is not None and sample.vectors.shape == (50, 6) and sample.pixels is None
    assert sample.targets == {"os": Survival(3.0, True)}
    assert whole.tasks == ("os",)
    drawn = feature_bags("d", items, Draws(most=20, times=3, seed=5))
    assert list(drawn.index.keys) == ["a#0", "a#1", "a#2", "b#0", "b#1", "b#2"]
    assert list(drawn.index.groups) == ["P"] * 3 + ["b"] * 3
    assert drawn.index.labels.tolist() == [1] * 3 + [-1] * 3
    bags = drawn.read([0, 1, 0, 4], 256)
    first, second, again, small = (bag.vectors[:, 0].astype(int) for bag in bags if bag.vectors is not None)
    assert len(first) == len(set(first.tolist())) == 20 and len(small) == 7
    assert (first == again).all() and set(first.tolist()) != set(second.tolist())
    assert bags[0].xy is not None and (bags[0].xy[:, 0] == 2 * first).all()
    assert drawn.read([0], 7)[0].vectors.shape == (20, 6)  # type: ignore[union-attr]


def test_tiles_that_a_run_could_not_read_are_in_no_bag(tmp_path: Path) -> None:
    """They are listed in the tiles.parquet beside the features: what was computed on white is not learnt from."""
    uri = features(tmp_path, "a", 6)
    table = tiles_table(
        index=np.zeros((6, 2), np.int64), xy=np.arange(12).reshape(6, 2), size=(1, 1), failed=np.arange(6) == 2,
        tissue=np.ones(6, np.float32), columns={}, classes={},
    )  # fmt: skip
    (tmp_path / "a" / "tiles.parquet").write_bytes(table)
    sample = feature_bags("d", [BagItem("a", uri)]).read([0], 0)[0]
    assert sample.vectors is not None and sample.vectors[:, 0].tolist() == [0, 1, 3, 4, 5]
    (tmp_path / "a" / "tiles.parquet").write_bytes(b"no")
    with pytest.raises(StorageError, match=r"tiles\.parquet cannot be read"):
        feature_bags("d", [BagItem("a", uri)])


def test_exported_h5_gives_the_same_vectors(tmp_path: Path) -> None:
    """Of `wsi-mmm export`, and with a leading axis as other tools write it; damaged files are failed samples."""
    uri = features(tmp_path, "a", 9)
    target = str(tmp_path / "a.h5")
    export(uri, target)
    one, two = (feature_bags("d", [BagItem("a", place)]).read([0], 0)[0] for place in (uri, target))
    assert np.array_equal(one.vectors, two.vectors) and np.array_equal(one.xy, two.xy)
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["features"], file["coords"] = one.vectors[None], one.xy  # type: ignore[index]
    assert np.array_equal(read_h5(str(tmp_path / "t.h5")).vectors, one.vectors)
    (tmp_path / "x.h5").write_bytes(b"no")
    with pytest.raises(StorageError, match=r"x\.h5 is no HDF5"):
        read_h5(str(tmp_path / "x.h5"))
    broken = feature_bags("d", [BagItem("a", uri), BagItem("x", str(tmp_path / "x.h5"))])
    assert "x.h5" in broken.read([1], 0)[0].failed


def test_a_table_names_bags_and_their_truth(tmp_path: Path) -> None:
    """By a pattern; slides without features are named, or left out."""
    for name in ("a", "b"):
        features(tmp_path, name, 5)
    (tmp_path / "t.csv").write_text("slide,grade\na,low\nb,\nc,high\n")
    task = TableTask("grade", "classify", ("grade",), ("low", "high"))
    table = slide_table(read_table(str(tmp_path / "t.csv")), [task])
    labels = balance_labels("classify", table.targets["grade"])
    with pytest.raises(InputError, match="slide 'c' has no features"):
        bags_of_table(table, f"{tmp_path}/{{slide}}/features.zarr", labels=labels)
    items = bags_of_table(table, f"{tmp_path}/{{slide}}/features.zarr", labels=labels, needed=False)
    source = feature_bags("d", items)
    assert source.index.labels.tolist() == [0, -1]
    assert [sample.targets for sample in source.read([1, 0], 0)] == [{"grade": -1}, {"grade": 0}]


def test_bags_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """No slides, another encoder's vectors, an empty slide, senseless bounds."""
    with pytest.raises(InputError, match="wsi-mmm embed"):
        feature_bags("d", [])
    items = [BagItem("a", features(tmp_path, "a", 5)), BagItem("b", features(tmp_path, "b", 5, width=8)),
             BagItem("c", features(tmp_path, "c", 0))]  # fmt: skip
    source = feature_bags("d", items)
    with pytest.raises(InputError, match="b holds vectors of 8, a of 6: embed all slides with one encoder"):
        source.read([1], 0)
    assert "c: no tile" in source.read([2], 0)[0].failed
    with pytest.raises(InputError, match="two slides are called 'a'"):
        feature_bags("d", [items[0], items[0]])
    with pytest.raises(InputError):
        Draws(most=-1)


@pytest.mark.parametrize("form", ["zarr", "h5"])
@pytest.mark.parametrize(
    ("name", "value"), [("model_hash", "x" * 64), ("mpp", 1.0), ("patch_size", 224), ("overlap", 32)]
)
def test_bags_that_were_made_otherwise_are_refused(tmp_path: Path, form: str, name: str, value: object) -> None:
    """Whichever slide it is: the line names both files and both values. What the model is called does not matter."""
    good = [features(tmp_path, one, 4, encoder=one) for one in "ab"]
    odd = features(tmp_path, "odd", 4, **{name: value})
    places = [*good, odd]
    if form == "h5":
        places = [str(tmp_path / f"{n}.h5") for n in range(3)]
        for source, target in zip([*good, odd], places, strict=True):
            export(source, target)
    items = [BagItem(one, uri) for one, uri in zip(("a", "b", "odd"), places, strict=True)]
    found = feature_bags("d", items[:2])
    assert found.embedding.to_json() == {**MADE, "encoder": "a"}
    words = rf"data 'd': odd was embedded with {name} {value}, a with {MADE[name]} \({places[2]}, {places[0]}\)"
    with pytest.raises(InputError, match=words):
        feature_bags("d", items)
    with pytest.raises(InputError, match=f"odd was embedded with {name}"):
        replace(found, items=(items[0], items[2])).read([1], 0)  # the file was replaced since


def test_files_of_other_tools_say_what_they_say(tmp_path: Path) -> None:
    """No attributes: nothing is known. Those of TRIDENT and CLAM: sizes, and a magnification for mpp."""
    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((3, 6), np.float32), np.zeros((3, 2), np.int64)
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((1, 3, 6), np.float32), np.zeros((3, 2), np.int64)
        file["coords"].attrs.update({"patch_size": 512, "overlap": 0, "target_magnification": 20, "level0_width": 9000})
        file["features"].attrs["encoder"] = "uni_v1"
    bare, other = (feature_bags("d", [BagItem("a", str(tmp_path / name))]) for name in ("bare.h5", "trident.h5"))
    assert bare.embedding == Embedding() and bare.embedding.missing == "model_hash"
    assert other.embedding == Embedding("uni_v1", None, 0.5, 512, 0) and other.embedding.missing == "model_hash"
    with pytest.raises(InputError, match="b was embedded with encoder uni_v1, a with None"):
        feature_bags("d", [BagItem("a", str(tmp_path / "bare.h5")), BagItem("b", str(tmp_path / "trident.h5"))])


@pytest.mark.parametrize("form", ["zarr", "h5"])
def test_vectors_that_are_not_finite_are_a_failed_bag(tmp_path: Path, form: str) -> None:
    """The file and the number of tiles are named; nothing is learnt from it."""
    vectors = np.zeros((5, 6), np.float32)
    vectors[1, 3], vectors[4, 0] = np.nan, np.inf
    uri = str(tmp_path / "x" / "features.zarr")
    write_features(uri, vectors, np.zeros((5, 2), np.int64), MADE)
    if form == "h5":
        uri = str(tmp_path / "x.h5")
        with h5py.File(uri, "w") as file:
            file["features"], file["coords"] = vectors, np.zeros((5, 2), np.int64)
            file["coords"].attrs.update(MADE)
    found = feature_bags("d", [BagItem("a", features(tmp_path, "a", 4)), BagItem("x", uri)])
    assert f"{uri} holds NaN or infinity in the features of 2 of 5 tiles" in found.read([1], 0)[0].failed


def test_an_entry_of_the_feature_cache_is_a_bag(tiny_slide: Path, tmp_path: Path) -> None:
    """Tiles with a receipt, without those that failed; another grid is refused."""
    with open_slide(str(tiny_slide)) as slide:
        grid = make_grid(slide.info, 0.5, tile=256, overlap=0)
        other = make_grid(slide.info, 0.5, tile=128, overlap=0)
    entry = CacheEntry(str(tmp_path / "entry"), grid.rows, grid.columns, 2)
    index: I64 = np.array([[0, 0], [0, 1], [1, 1]])
    values = RNG.normal(size=(3, 4)).astype(np.float32)
    entry.write_block(ArraySpec("features", (4,), "float32"), index, values)
    bad = tile_xy(grid, index)[1].tolist()
    entry.write_block_record("0-0", {"tiles": index.astype(np.int32).tobytes().hex(), "failed": [[*bad, 256, 256]]})
    found = entry_features(str(tmp_path / "entry"), grid)
    assert np.array_equal(found.vectors, values[[0, 2]])
    assert found.coords.tolist() == [[0, 0], [256, 256]]
    sample = feature_bags("d", [BagItem("s", str(tmp_path / "entry"), grid=grid)]).read([0], 0)[0]
    assert np.array_equal(sample.vectors, values[[0, 2]])
    with pytest.raises(StorageError, match="give the mpp, tile and overlap"):
        entry_features(str(tmp_path / "entry"), other)
    (tmp_path / "entry" / "receipts" / "0-0.json").write_text(json.dumps({"tiles": "zz"}))
    with pytest.raises(StorageError, match="is damaged"):
        entry_features(str(tmp_path / "entry"), grid)


def test_bags_of_tiles_are_tissue_of_their_slide(tiny_slide: Path) -> None:
    """k tiles, their places, the same item the same tiles, each time others."""
    items = [SlideItem("s", str(tiny_slide), group="P", targets={"t": 1}, label=1)]
    source: DataSource = tile_bags("d", items, TileSampling(0.5, tile=96), Draws(most=5, times=2, seed=1))
    one, two, again = source.read([0, 1, 0], 128)
    assert one.pixels is not None and one.pixels.shape == (5, 128, 128, 3) and one.targets == {"t": 1}
    assert np.array_equal(one.pixels, again.pixels) and not np.array_equal(one.xy, two.xy)
    with open_slide(str(tiny_slide)) as slide:
        for (x, y), tile in zip(one.xy.tolist(), one.pixels, strict=True):  # type: ignore[union-attr]
            assert (slide.read_region(x, y, 128, 128) == tile).all()
    assert (one.pixels.reshape(5, -1).min(axis=1) < 200).all()
    with pytest.raises(InputError, match="how many tiles"):
        tile_bags("d", items, TileSampling(0.5), Draws())


def test_a_slide_without_tissue_is_named(tmp_path: Path) -> None:
    """It has no bag."""
    from wsi_mmm.slides.tiff.writer import TiffForm, write_tiff

    write_tiff(tmp_path / "w.tiff", [np.full((600, 600, 3), 255, np.uint8)], TiffForm("deflate", mpp=0.5))
    with pytest.raises(InputError, match="w has no tile with tissue"):
        tile_bags("d", [SlideItem("w", str(tmp_path / "w.tiff"))], TileSampling(0.5, tile=128), Draws(most=3))


@pytest.mark.slow
def test_what_embed_wrote_becomes_bags(tmp_path: Path) -> None:
    """From a slide to a bag, by the public way."""
    synthetic_slide(tmp_path / "s.tiff", seed=1, width=2048, height=1536, nuclei=100)
    wsi_mmm.embed(str(tmp_path / "s.tiff"), output=str(tmp_path / "out"))
    source = feature_bags("d", [BagItem("s", str(tmp_path / "out" / "s" / "features.zarr"))])
    sample = source.read([0], 0)[0]
    assert sample.vectors is not None and len(sample.vectors) > 3
    assert sample.vectors.std() > 0 and sample.xy is not None and sample.xy.max() < 2048
