"""Exports as other tools read them: readers written from the formats of TRIDENT, CLAM, TITAN and STAMP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from wsi_mmm import api
from wsi_mmm.cli.main import app
from wsi_mmm.errors import StorageError
from wsi_mmm.outputs import exports
from wsi_mmm.slides import open_slide
from wsi_mmm.slides.fake import synthetic_slide

SIZE, MPP, TILE = 1000, 0.25, 128
VIT = '{"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 128}'
FACTS = {
    "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20.0, "overlap": 0,
    "level0_width": 9000, "level0_height": 8000, "mpp": 0.5, "encoder": "uni", "pooling": "cls", "model_hash": "abcdef",
    "name": "a", "level0_mpp_x": 0.25, "level0_mpp_y": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one slide (16 tiles of 256 level-0 px) with every export beside its features."""
    folder = tmp_path_factory.mktemp("embedded")
    synthetic_slide(folder / "s.tiff", 1, width=SIZE, height=SIZE, mpp=MPP, nuclei=20)
    report = api.embed(
        folder / "s.tiff", "vit_small_patch16_224", output=folder / "o", weights="random", encoder_args=VIT,
        tissue="none", tile_size=TILE, device="cpu", export=("h5", "pt", "stamp"),
    )  # fmt: skip
    assert report.exit_code == 0
    return folder / "o" / "s"


# ---------------------------------------------------------------- readers, from the descriptions of the formats


def read_as_trident(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Attributes and coordinates; TRIDENT goes on without a warning only when none of these is missing."""
    with h5py.File(path) as file:
        found, coords = dict(file["coords"].attrs), file["coords"][:]
    missing = [name for name in ("patch_size", "level0_magnification", "target_magnification") if name not in found]
    assert not missing
    return found, coords


def read_as_clam(folder: Path, slide: str) -> tuple[torch.Tensor, np.ndarray]:
    """The bag of a slide from ``h5_files``; it must be that of ``pt_files``."""
    with h5py.File(folder / "h5_files" / f"{slide}.h5") as file:
        vectors, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
    assert torch.equal(vectors, torch.load(folder / "pt_files" / f"{slide}.pt", weights_only=True))
    return vectors, coords


def grid_as_titan(path: Path) -> np.ndarray:
    """int[n, 2]: the cell of each tile, as TITAN lays features out by the distance of tiles at level 0."""
    with h5py.File(path) as file:
        coords = torch.from_numpy(file["coords"][:])
        step = int(file["coords"].attrs["patch_size_level0"])
    return torch.div(coords - coords.min(dim=0).values, step, rounding_mode="floor").numpy()


def read_as_stamp(path: Path, version: tuple[int, ...] = (2, 5, 0)) -> dict[str, Any]:
    """Features, coordinates in micrometres, tile width; RuntimeError where STAMP of ``version`` raises one."""
    with h5py.File(path) as file:
        said = file.attrs
        kind = str(said["feat_type"]) if "feat_type" in said or "encoder" in said else "tile"
        width = said.get("tile_size") if said.get("unit") == "um" else None
        width = width or said.get("tile_size_um")
        if not width:
            raise RuntimeError("unable to infer coordinates")
        if tuple(map(int, said["stamp_version"].split("."))) > version:
            raise RuntimeError("features of a newer version")
        return {
            "feats": torch.from_numpy(file["feats"][()]).float(), "coords_um": file["coords"][:], "kind": kind,
            "tile_um": float(width), "tile_px": int(said["tile_size_px"]), "extractor": str(said["extractor"]),
        }  # fmt: skip


# ---------------------------------------------------------------- TRIDENT, TITAN


def test_trident_finds_every_attribute_of_its_coordinates(embedded: Path) -> None:
    """Those that it reads and those that it writes itself; a tile at level 0 is as wide as its formula says."""
    said, coords = read_as_trident(embedded / "features.h5")
    table = pq.read_table(embedded / "tiles.parquet").to_pydict()
    assert coords.dtype == np.int64 and coords.tolist() == [[x, y] for x, y in zip(table["x"], table["y"], strict=True)]
    assert (
        said["patch_size_level0"] == said["patch_size"] * said["level0_magnification"] // said["target_magnification"]
    )
    assert (said["patch_size"], said["overlap"], said["name"]) == (TILE, 0, "s")
    assert (said["level0_width"], said["level0_height"]) == (SIZE, SIZE)
    with h5py.File(embedded / "features.h5") as file:
        assert dict(file["features"].attrs) == {"encoder": "vit_small_patch16_224", "name": "s"}


def test_titan_lays_every_tile_into_a_cell_of_its_own(embedded: Path) -> None:
    """The distance of tiles at level 0 makes the grid without holes and without two tiles in a cell."""
    cells = grid_as_titan(embedded / "features.h5")
    assert cells.tolist() == [[x, y] for y in range(4) for x in range(4)]


# ---------------------------------------------------------------- CLAM


class AttentionMil(nn.Module):
    """Gated attention over the instances of a bag."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.Linear(width, 8), nn.Linear(width, 8)])
        self.score, self.classify = nn.Linear(8, 1), nn.Linear(width, 2)

    def forward(self, bag: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.gates[0](bag)) * torch.sigmoid(self.gates[1](bag))
        return self.classify((torch.softmax(self.score(hidden), dim=0) * bag).sum(dim=0))


def test_an_attention_mil_of_clam_trains_on_the_exports(tmp_path: Path) -> None:
    """`export` fills CLAM's two folders; a few instances of a bag decide its label, and slides left out are right."""
    rng, labels = np.random.default_rng(0), [n % 2 for n in range(14)]
    for number, label in enumerate(labels):
        vectors = rng.normal(size=(30, 6)).astype(np.float32)
        vectors[:5, 0] += 6 * label
        coords = np.stack([np.arange(30) * 512, np.zeros(30)], axis=1).astype(np.int64)
        exports.write_features(str(tmp_path / "f" / f"s{number}" / "features.zarr"), vectors, coords, FACTS)
    for to in ("h5", "pt"):
        done = CliRunner().invoke(app, ["export", str(tmp_path / "f"), "--to", to, "-o", str(tmp_path / f"{to}_files")])
        assert done.exit_code == 0
    bags = [read_as_clam(tmp_path, f"s{number}")[0] for number in range(14)]
    torch.manual_seed(0)
    model = AttentionMil(6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        for bag, label in zip(bags[:10], labels[:10], strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(bag)[None], torch.tensor([label])).backward()
            optimizer.step()
    assert [int(model(bag).argmax()) for bag in bags[10:]] == labels[10:]


@pytest.mark.parametrize("mpp", [MPP, 2 * MPP])
def test_clam_reads_the_pixels_of_tiles_of_level_0_alone(embedded: Path, tmp_path: Path, mpp: float) -> None:
    """Its reader takes patch_size px of patch_level: that is said only where these are the tile's pixels."""
    facts = FACTS | {"patch_size": TILE, "patch_size_level0": round(TILE * mpp / MPP)}
    uri = str(tmp_path / "features.zarr")
    exports.write_features(uri, np.zeros((1, 3), np.float32), np.array([[256, 128]]), facts)
    exports.export(uri, str(tmp_path / "f.h5"))
    with h5py.File(tmp_path / "f.h5") as file:
        said, place = dict(file["coords"].attrs), file["coords"][0]
    assert ("patch_level" in said) == (mpp == MPP)
    if "patch_level" in said:
        path = embedded.parent.parent / "s.tiff"
        with openslide.OpenSlide(path) as slide:
            image = slide.read_region(tuple(place.tolist()), int(said["patch_level"]), (int(said["patch_size"]),) * 2)
        with open_slide(path) as ours:
            pixels = ours.read_region(256, 128, TILE, TILE, mpp=mpp)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)


# ---------------------------------------------------------------- STAMP


def test_stamp_reads_micrometres_and_feats(embedded: Path) -> None:
    """Coordinates are level-0 px times the slide's own mpp; the tile is TILE px of 0.5 micrometres."""
    found = read_as_stamp(embedded / "features.stamp.h5")
    ours = exports.read_features(str(embedded / "features.zarr"))
    with openslide.OpenSlide(embedded.parent.parent / "s.tiff") as slide:
        per_px = [10_000 / float(slide.properties[f"tiff.{axis}Resolution"]) for axis in "XY"]
    np.testing.assert_allclose(found["coords_um"], ours.coords * per_px, rtol=1e-6)
    assert found["coords_um"].dtype == np.float32
    np.testing.assert_array_equal(found["feats"].numpy(), ours.vectors)
    assert (found["tile_um"], found["tile_px"], found["kind"]) == (TILE * 0.5, TILE, "tile")
    assert found["extractor"] == "vit_small_patch16_224-native"


def test_stamp_reads_pixels_that_are_not_square(tmp_path: Path) -> None:
    """Each axis has its own micrometres; a version that does not know the format says that it is older."""
    uri, target = str(tmp_path / "features.zarr"), tmp_path / "f.h5"
    facts = FACTS | {"level0_mpp_x": 0.2, "level0_mpp_y": 0.3}
    exports.write_features(uri, np.zeros((2, 3), np.float32), np.array([[0, 1000], [2000, 0]]), facts)
    exports.export(uri, str(target), "stamp")
    np.testing.assert_allclose(read_as_stamp(target)["coords_um"], [[0, 300], [400, 0]], rtol=1e-6)
    with pytest.raises(RuntimeError, match="newer"):
        read_as_stamp(target, (2, 0, 0))


@pytest.mark.parametrize(
    ("encoder", "pooling", "name"),
    [
        ("uni2-h", "cls", "uni2"), ("virchow2", "cls", "virchow2"), ("virchow", "cls+patch_mean", "virchow-full"),
        ("virchow2", "cls+patch_mean", "virchow2-cls+patch_mean"), ("default", "", "default"),
    ],
)  # fmt: skip
def test_stamp_knows_an_extractor_only_by_the_same_vectors(
    tmp_path: Path, encoder: str, pooling: str, name: str
) -> None:
    """Its slide encoders choose by the name: vectors pooled otherwise must not bear it."""
    facts = FACTS | {"encoder": encoder, "pooling": pooling}
    features = exports.SlideFeatures(np.zeros((1, 3), np.float32), np.zeros((1, 2), np.int64), facts)
    (tmp_path / "f.h5").write_bytes(exports.as_stamp(features))
    assert read_as_stamp(tmp_path / "f.h5")["extractor"] == name


def test_features_without_a_resolution_are_no_micrometres(tmp_path: Path) -> None:
    """Of features that an older version wrote: one line, and no file."""
    uri = str(tmp_path / "features.zarr")
    older = {name: value for name, value in FACTS.items() if not name.startswith("level0_mpp")}
    exports.write_features(uri, np.zeros((1, 3), np.float32), np.zeros((1, 2), np.int64), older)
    with pytest.raises(StorageError, match=r"features of a do not say the slide's resolution.*--force"):
        exports.export(uri, str(tmp_path / "f.h5"), "stamp")
    assert not (tmp_path / "f.h5").exists()


def test_exports_for_stamp_and_trident_lie_side_by_side(embedded: Path, tmp_path: Path) -> None:
    """Beside the features each format has its own file; in a folder of one's own files are named <slide>.h5."""
    before = (embedded / "features.h5").read_bytes()
    done = CliRunner().invoke(app, ["export", str(embedded), "--to", "stamp"])
    assert done.exit_code == 0 and (embedded / "features.h5").read_bytes() == before
    done = CliRunner().invoke(app, ["export", str(embedded.parent), "--to", "stamp", "-o", str(tmp_path / "stamp")])
    assert done.exit_code == 0 and [path.name for path in (tmp_path / "stamp").iterdir()] == ["s.h5"]
    assert (tmp_path / "stamp" / "s.h5").read_bytes() == (embedded / "features.stamp.h5").read_bytes()
