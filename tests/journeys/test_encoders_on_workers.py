"""Encoders on two Dask workers: weights go by name, address and identity, are found there, and checked there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import wsi_mmm
from helpers.cluster import PlainCluster
from wsi_mmm.errors import ModelError
from wsi_mmm.model.convert_weights import read_tensors, write_tensors
from wsi_mmm.outputs.exports import read_features
from wsi_mmm.slides.fake import synthetic_slide

pytest.importorskip("distributed")
pytestmark = pytest.mark.slow

VIT = "vit_small_patch16_224"
ARGUMENTS: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
MEAN, STD = [0.7, 0.6, 0.5], [0.2, 0.21, 0.22]
CONFIG = {"architecture": VIT, "model_args": ARGUMENTS, "num_classes": 0, "pretrained_cfg": {"mean": MEAN, "std": STD}}
OPTIONS: dict[str, Any] = {"tissue": "none", "tile_size": 64, "device": "cpu", "block_tiles": 2}
SAID: dict[str, Any] = {"encoder_args": ARGUMENTS, "mean": MEAN, "std": STD}


def put(folder: Path, seed: int) -> Path:
    """A made-up checkpoint with its config.json, as a repository of the hub has them."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    state = timm.create_model(VIT, num_classes=0, **ARGUMENTS).state_dict()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def put_cached(hub: Path, name: str, seed: int) -> None:
    """The same as the hub's own client keeps it: blobs, and snapshots that are links to them."""
    home = hub / f"models--Lab--{name}"
    made = put(home / "blobs", seed)
    snapshot = home / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in ("model.safetensors", "config.json"):
        blob = made / f"{file}-{'0' * 8}"
        (made / file).rename(blob)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123abc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf``: the cache of the machine that submits; ``copied``: ``cp -rL`` of it, where one repository changed."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("Tiny", "Other", "Changed", "Absent")):
        put_cached(folder / "hf" / "hub", name, seed)
    shutil.copytree(folder / "hf", folder / "copied", symlinks=False)
    shutil.rmtree(folder / "copied" / "hub" / "models--Lab--Absent")
    shutil.rmtree(folder / "copied" / "hub" / "models--Lab--Changed")
    put_cached(folder / "copied" / "hub", "Changed", 9)
    put(folder / "all" / "mine", 5)
    state = timm.create_model("efficientnet_b0", num_classes=0).state_dict()
    save_file(state, folder / "published.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    synthetic_slide(folder / "s.tiff", 1, width=256, height=256, mpp=0.5, nuclei=20)
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[PlainCluster]:
    """Two workers with an environment of their own: the copied cache, a folder of folders, no network."""
    env = {"HF_HOME": str(folder / "copied"), "WSI_MMM_WEIGHTS": str(folder / "all"), "HF_HUB_OFFLINE": "1"}
    with PlainCluster(folder, threads=1, env=env) as running:
        yield running


@pytest.fixture(autouse=True)
def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the machine that submits."""
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("WSI_MMM_WEIGHTS", str(folder / "all"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def embedded(folder: Path, encoder: str, output: Path, **options: Any) -> Path:
    """The features of the slide."""
    report = wsi_mmm.embed(str(folder / "s.tiff"), encoder, output=output, **OPTIONS | options)
    assert report.exit_code == 0, report.slides[0].error
    return output / "s"


def same_features(one: Path, other: Path) -> None:
    """Bit for bit."""
    mine, theirs = (read_features(str(place / "features.zarr")) for place in (one, other))
    assert mine.vectors.tobytes() == theirs.vectors.tobytes() and len(mine.vectors) == 16
    assert np.array_equal(mine.coords, theirs.coords) and mine.attributes == theirs.attributes


def test_wherever_weights_lie_workers_give_the_same_vectors(
    folder: Path, cluster: PlainCluster, tmp_path: Path
) -> None:
    """A file, a folder, local-dir:, the folder of folders, the hub's cache with links here and copied there."""
    mine = folder / "all" / "mine"
    there: dict[str, Any] = {"scheduler": cluster.address}
    want = embedded(folder, VIT, tmp_path / "here", weights=str(mine / "model.safetensors"), **SAID)
    forms: list[tuple[str, dict[str, Any]]] = [
        (VIT, {"weights": str(mine / "model.safetensors"), **SAID}), (VIT, {"weights": str(mine)}),
        ("hf-hub:Lab/mine", {}),
    ]  # fmt: skip
    for number, (encoder, options) in enumerate(forms):
        found = embedded(folder, encoder, tmp_path / f"there{number}", **options, **there)
        ours, theirs = (read_features(str(place / "features.zarr")).vectors for place in (found, want))
        assert ours.tobytes() == theirs.tobytes()
    one = embedded(folder, "hf-hub:Lab/Tiny", tmp_path / "cache", **there)
    same_features(one, embedded(folder, "hf-hub:Lab/Tiny", tmp_path / "cache-here"))


def test_a_published_encoder_from_a_pickle(folder: Path, cluster: PlainCluster, tmp_path: Path) -> None:
    """Converted into the folder of folders, its name is enough, here and on workers."""
    name = "efficientnet-b0-imagenet"
    target = folder / "all" / name / "model.safetensors"
    target.parent.mkdir()
    write_tensors(read_tensors(folder / "pytorch_model.bin")[0], target, 1 << 30)  # as models convert does
    one = embedded(folder, name, tmp_path / "there", scheduler=cluster.address, tile_size=128)
    two = embedded(folder, name, tmp_path / "here", weights=str(folder / "published.safetensors"), tile_size=128)
    mine, theirs = (read_features(str(place / "features.zarr")) for place in (one, two))
    assert mine.vectors.tobytes() == theirs.vectors.tobytes() and mine.vectors.shape == (4, 1280)
    assert mine.attributes["licence"] == "Apache-2.0"


def test_several_encoders_on_workers(folder: Path, cluster: PlainCluster, tmp_path: Path) -> None:
    """Each file as one encoder alone gives it on one machine."""
    names = ["hf-hub:Lab/Tiny", "hf-hub:Lab/Other"]
    reports = wsi_mmm.embed_encoders(
        str(folder / "s.tiff"), names, output=tmp_path / "both", scheduler=cluster.address, **OPTIONS
    )
    assert [report.exit_code for report in reports.values()] == [0, 0]
    for name in names:
        alone = embedded(folder, name, tmp_path / name.partition("/")[2])
        same_features(tmp_path / "both" / name.partition(":")[2].replace("/", "-") / "s", alone)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Changed", "are not those the run was begun with: copy those to every worker"),
        ("Absent", f"the worker on {os.uname().nodename}: the weights of .*Absent' are not on this .*hf download"),
    ],
)
def test_workers_refuse_other_weights(
    name: str, words: str, folder: Path, cluster: PlainCluster, tmp_path: Path
) -> None:
    """Other bytes under the same name, or none: one line that names the worker's machine; no features."""
    with pytest.raises(ModelError, match=words) as error:
        embedded(folder, f"hf-hub:Lab/{name}", tmp_path, scheduler=cluster.address)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("features.zarr"))
