"""From names, files and options to a complete recipe; from a recipe to a network that is known by its bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from wsi_mmm.errors import ModelError
from wsi_mmm.model.checkpoint import load_encoder, open_encoder, read_tensors
from wsi_mmm.model.choose import EncoderOptions, choose_encoder, locate_weights, unread_encoder
from wsi_mmm.model.recipe import IMAGENET_MEAN, IMAGENET_STD

ARGUMENTS: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
VIT = "vit_tiny_patch16_224"
MEAN, STD = (0.7, 0.6, 0.5), (0.2, 0.21, 0.22)
GIVEN = EncoderOptions(ARGUMENTS, MEAN, STD)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights of a tiny ViT."""
    torch.manual_seed(0)
    return dict(timm.create_model(VIT, num_classes=0, **ARGUMENTS).state_dict())


def put(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, object] | None = None) -> Path:
    """A folder of weights, with a config.json as timm writes it, or without."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


CONFIG: dict[str, object] = {
    "architecture": VIT, "model_args": ARGUMENTS, "num_classes": 0, "pretrained_cfg": {"mean": MEAN, "std": STD}
}  # fmt: skip


def one_line(name: str, weights: str | None = None, said: EncoderOptions | None = None) -> str:
    """The text of the error."""
    with pytest.raises(ModelError) as error:
        choose_encoder(name, weights, said)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_configuration_beside_weights_is_honoured(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Mean, std and arguments of config.json; what the user says wins; a folder does as well as its file."""
    folder = put(tmp_path / "w", weights, CONFIG)
    for given in (folder, folder / "model.safetensors"):
        recipe = choose_encoder(VIT, str(given)).recipe
        assert (recipe.mean, recipe.std, recipe.arguments) == (MEAN, STD, ARGUMENTS)
    said = EncoderOptions({"img_size": 32}, IMAGENET_MEAN, IMAGENET_STD, "patch_mean", 48)
    recipe = choose_encoder(VIT, str(folder), said).recipe
    assert (recipe.mean, recipe.std, recipe.pooling, recipe.input_px) == (IMAGENET_MEAN, IMAGENET_STD, "patch_mean", 48)
    assert recipe.arguments == ARGUMENTS | {"img_size": 32}
    assert "architecture vit_tiny_patch16_224, not vit_small_patch16_224" in one_line(
        "vit_small_patch16_224", str(folder)
    )


def test_mean_and_std_are_never_guessed(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Weights that lie alone say nothing: timm's default tag of a network is not theirs. A tag is a statement."""
    file = str(put(tmp_path, weights) / "model.safetensors")
    assert "--mean 0.485,0.456,0.406" in one_line(VIT, file, EncoderOptions(ARGUMENTS))
    assert choose_encoder(VIT, file, GIVEN).recipe.mean == MEAN
    assert choose_encoder(f"{VIT}.augreg_in21k_ft_in1k", file, EncoderOptions(ARGUMENTS)).recipe.mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    assert choose_encoder(VIT, file, EncoderOptions(ARGUMENTS)).recipe.std == STD


@pytest.mark.parametrize("form", ["local-dir:{}", "{}"])
@torch.inference_mode()
def test_a_folder_is_an_encoder(form: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """By its config.json alone: the vector is that of the network it describes, at any tile that fits."""
    folder = put(tmp_path / "w", weights, CONFIG)
    model = load_encoder(form.format(folder))
    network = timm.create_model(VIT, num_classes=0, dynamic_img_size=True, **ARGUMENTS).eval()
    network.load_state_dict(weights)
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(model.features(x), network(x), rtol=1e-5, atol=1e-5)
    assert (model.card.mean, model.card.std) == (MEAN, STD)


def test_a_folder_that_is_none_or_says_nothing(tmp_path: Path) -> None:
    """One line each: the path is wrong; there is no configuration."""
    with pytest.raises(ModelError, match=r"there is no folder .*/gone: check the path behind local-dir:"):
        choose_encoder(f"local-dir:{tmp_path}/gone")
    with pytest.raises(ModelError, match=r"has no config\.json that names a timm architecture"):
        choose_encoder(f"local-dir:{tmp_path}")


def test_the_hub_cache_is_used_offline(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied cache is enough; a revision is another snapshot; what is not in it is an error in one line."""
    home = tmp_path / "hub" / "models--org--tiny"
    put(home / "snapshots" / "abc", weights, CONFIG)
    other = {key: value + 1 for key, value in weights.items()}
    put(home / "snapshots" / "def", other, CONFIG | {"pretrained_cfg": {"mean": STD, "std": STD}})
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    first, second = choose_encoder("hf-hub:org/tiny"), choose_encoder("hf-hub:org/tiny@def")
    assert (first.recipe.mean, second.recipe.mean) == (MEAN, STD)
    assert first.sha256 != second.sha256
    assert load_encoder("hf-hub:org/tiny").vector_width == 48
    (home / "snapshots" / "abc" / "model.safetensors").unlink()
    assert "not on this machine" in one_line("hf-hub:org/tiny")
    given = str(put(tmp_path / "given", weights, CONFIG))
    assert choose_encoder("hf-hub:org/unknown", given).recipe.architecture == VIT


@pytest.mark.parametrize(
    ("name", "words"),
    [("vit_tiny_pach16_224", "did you mean vit_tiny_patch16_224"), ("unii", "uni"), ("virchow-2", "virchow2"),
     ("vit_tiny_patch16_224.no_such_tag", "there is no encoder")],
)  # fmt: skip
def test_unknown_names_suggest_near_ones(name: str, words: str) -> None:
    """Of the registry, or of timm."""
    assert words in one_line(name, "random")


def test_an_encoder_is_known_by_its_bytes_and_its_recipe(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other bytes, mean, pooling, arguments, input size: another identity. Another place of the same file: the same."""
    file = str(put(tmp_path / "a", weights) / "model.safetensors")
    same = str(put(tmp_path / "b", weights))
    other = str(put(tmp_path / "c", weights | {"norm.bias": weights["norm.bias"] + 1}))
    first = choose_encoder(VIT, file, GIVEN).identity
    assert choose_encoder(VIT, same, GIVEN).identity == first
    assert choose_encoder(VIT, other, GIVEN).identity != first
    for said in (
        EncoderOptions(ARGUMENTS, IMAGENET_MEAN, STD), EncoderOptions(ARGUMENTS, MEAN, STD, "cls"),
        EncoderOptions(ARGUMENTS, MEAN, STD, input_px=64), EncoderOptions(ARGUMENTS | {"depth": 1}, MEAN, STD),
    ):  # fmt: skip
        assert choose_encoder(VIT, file, said).identity != first


def test_other_weights_than_those_a_run_began_with_are_refused(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    """As a worker finds them: by the same address, with other bytes."""
    folder = put(tmp_path, weights)
    chosen = choose_encoder(VIT, str(folder), GIVEN)
    here = unread_encoder(chosen.recipe, locate_weights(chosen.recipe, str(folder)), str(folder))
    assert open_encoder(here, identity=chosen.identity).vector_width == 48
    put(tmp_path, weights | {"norm.bias": weights["norm.bias"] + 1})
    with pytest.raises(ModelError, match="are not those the run was begun with"):
        open_encoder(here, identity=chosen.identity)
    with pytest.raises(ModelError, match="are not those the run was begun with"):
        open_encoder(chosen)


def test_random_weights_are_the_same_everywhere() -> None:
    """Two workers with "random" make one set of vectors, and the caller's dice stay as they were."""
    said = EncoderOptions(ARGUMENTS)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = (load_encoder(VIT, "random", options=said).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_read_as_they_are_written(dtype: torch.dtype, tmp_path: Path) -> None:
    """All kinds of numbers, empty tensors and single ones; the hash is that of the file."""
    import hashlib

    path = tmp_path / "t.safetensors"
    written = {"b": torch.randn(3, 5).to(dtype), "a": torch.tensor(7), "empty": torch.empty(0, 4, dtype=dtype)}
    save_file(written, path)
    found, sha256 = read_tensors(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(found) == set(written)
    assert all(torch.equal(found[key], value.float() if value.is_floating_point() else value)
               for key, value in written.items())  # fmt: skip


_PEAK = """
import resource, sys
from wsi_mmm.model.checkpoint import load_encoder
from wsi_mmm.model.choose import EncoderOptions
args = {"depth": 12, "embed_dim": 768, "num_heads": 12, "img_size": 64}
said = EncoderOptions(args, (0.5,) * 3, (0.5,) * 3)
load_encoder("vit_tiny_patch16_224", "random", options=EncoderOptions({"depth": 1, "embed_dim": 48, "num_heads": 1}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_encoder("vit_tiny_patch16_224", sys.argv[1], options=said)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    """Loading takes at most 1.2 times the file, however it is counted: nothing is held twice."""
    arguments = {"depth": 12, "embed_dim": 768, "num_heads": 12, "img_size": 64}
    with torch.device("meta"):
        empty = timm.create_model(VIT, num_classes=0, **arguments).state_dict()
    path = tmp_path / "b.safetensors"
    save_file({key: torch.ones(value.shape) for key, value in empty.items()}, path)
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 <= 1.2 * path.stat().st_size


def test_a_repository_in_the_folder_of_folders(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf-hub:org/name, downloaded to where the message about missing weights says: config.json is found there, too."""
    monkeypatch.setenv("WSI_MMM_WEIGHTS", str(tmp_path / "all"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = put(tmp_path / "all" / "tiny", weights, CONFIG) / "model.safetensors"
    chosen = choose_encoder("hf-hub:org/tiny")
    assert chosen.path == file and (chosen.recipe.mean, chosen.recipe.arguments) == (MEAN, ARGUMENTS)


@pytest.mark.parametrize("name", ["uni2-h", "vit_tiny_patch16_224"])
def test_an_address_of_storage_is_no_path(name: str) -> None:
    """The address stays readable in the line, without its password."""
    with pytest.raises(ModelError, match=r"the weights s3://b/w\.safetensors are not on a disk: copy them to a folder"):
        choose_encoder(name, "s3://me:secret@b/w.safetensors")
