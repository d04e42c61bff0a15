"""Configurations of the WSInfer zoo: what they come to, and that each fault is one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from helpers.wsinfer_models import COLOURS, config_of, write_model
from wsi_mmm.errors import ModelError, OptionError
from wsi_mmm.model import card, script_process
from wsi_mmm.model.script_process import Network, read_script
from wsi_mmm.model.wsinfer import find_script, parse_config, read_script_model
from wsi_mmm.options import RunOptions
from wsi_mmm.requests import encoder_recipe, model_recipe


def refused(call: Any, *arguments: Any, kind: type[Exception] = ModelError) -> str:
    """The text of the error, one line."""
    with pytest.raises(kind) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_configuration_gives_card_and_transform() -> None:
    """Tile, resolution, classes and colours are those of the file; the task is named classify."""
    found, transform = parse_config(config_of(["benign", "grade4+5"]), "config.json")
    assert (found.tile_size, found.mpp, found.overlap) == (150, 0.5, 0)
    [task] = found.tasks
    assert (task.name, task.kind, task.classes) == ("classify", "classify", ("benign", "grade4+5"))
    assert (transform.size, transform.interpolation) == ((64,), "bilinear")
    assert (list(transform.mean), list(transform.std)) == (COLOURS["mean"], COLOURS["std"])
    assert parse_config(config_of(["tumor"]), "x")[0].tasks[0].kind == "multilabel"  # a sigmoid, as in WSInfer


TO_TENSOR = {"name": "ToTensor"}
NORMALIZE = {"name": "Normalize", "arguments": COLOURS}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"spec_version": "2.0"}, "spec_version '2.0'"),
        ({"num_classes": 3}, "num_classes 3 and names 2"),
        ({"class_names": ["a", "a"]}, "two classes of one name"),
        ({"class_names": ["a", "b\n"]}, "the class name"),
        ({"class_names": "ab"}, "no list class_names"),
        ({"patch_size_pixels": 10**9}, "patch_size_pixels 1000000000"),
        ({"patch_size_pixels": 100.5}, "patch_size_pixels 100.5"),
        ({"spacing_um_px": 0}, "spacing_um_px 0"),
        ({"spacing_um_px": float("nan")}, "spacing_um_px nan"),
        ({"transform": None}, "no list transform"),
        ({"transform": [NORMALIZE]}, "the transform Normalize:"),
        ({"transform": [NORMALIZE, {"name": "ToTensor"}]}, "in this sequence"),
        ({"transform": [{"name": "CenterCrop"}, {"name": "ToTensor"}]}, "CenterCrop, ToTensor"),
        ({"transform": [{"name": "Resize", "arguments": {"size": 10**6}}, {"name": "ToTensor"}]}, "the size 1000000"),
        ({"transform": [{"name": "Resize", "arguments": {"size": 9, "max_size": 9}}, TO_TENSOR]}, "max_size"),
        (
            {"transform": [{"name": "ToTensor"}, {"name": "Normalize", "arguments": {**COLOURS, "std": [0, 1, 1]}}]},
            "the std [0, 1, 1]",
        ),
    ],
)  # fmt: skip
def test_a_fault_of_a_configuration_is_named(changed: dict[str, Any], words: str) -> None:
    """With the file, and the way out."""
    text = refused(parse_config, config_of(["a", "b"], **changed), "m/config.json")
    assert words in text and text.startswith("m/config.json") and "published with the model" in text


class Mean(nn.Module):
    """Logits of two classes: the mean of red and of blue."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float[n, 3, h, w] -> float[n, 2]."""
        return torch.stack([x[:, 0].mean((1, 2)), x[:, 2].mean((1, 2))], 1)


def network_of(folder: Path) -> Network:
    """What the process of a model opens, in this process: the script is of this test."""
    model = read_script_model(folder)
    facts: dict[str, Any] = {
        "script": str(model.script),
        "sha256": model.sha256,
        "outputs": len(model.card.tasks[0].classes),
    }
    facts |= {"batch": 8, "transform": model.transform.to_json()}
    return Network(facts, read_script(facts))


@pytest.mark.parametrize("size", [[64], [40, 90], None])
@pytest.mark.parametrize("interpolation", [2, 3, 0])
def test_tiles_are_resized_as_torchvision_does(tmp_path: Path, size: list[int] | None, interpolation: int) -> None:
    """Larger and smaller, by each of the filters: the probabilities are those of its own transforms, to the bit."""
    asked = {"size": size[0] if size and len(size) == 1 else size, "interpolation": interpolation}
    steps = [{"name": "Resize", "arguments": asked}] * (size is not None) + [{"name": "ToTensor"}, NORMALIZE]
    folder = write_model(tmp_path / "m", Mean(), ["a", "b"], transform=steps)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 75, 75, 3), np.uint8)
    modes = {0: transforms.InterpolationMode.NEAREST, 2: transforms.InterpolationMode.BILINEAR}
    mode = modes.get(interpolation, transforms.InterpolationMode.BICUBIC)
    first = [transforms.Resize(asked["size"], interpolation=mode)] if size else []
    done = transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(**COLOURS)])
    wanted = Mean()(torch.stack([done(Image.fromarray(tile)) for tile in tiles])).softmax(1)
    found = np.frombuffer(network_of(folder).answer(tiles), np.float32).reshape(3, 2)
    assert np.array_equal(found, wanted.numpy())


def test_one_output_is_a_sigmoid(tmp_path: Path) -> None:
    """And a model that answers more than its configuration says is a fault, as is one that answers no tensor."""

    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3))[:, None]

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    tiles = np.full((2, 150, 150, 3), 200, np.uint8)
    folder = write_model(tmp_path / "one", One(), ["tumor"], transform=[{"name": "ToTensor"}])
    chances = np.frombuffer(network_of(folder).answer(tiles), np.float32)
    assert np.allclose(chances, 1 / (1 + np.exp(-200 / 255)), atol=1e-6)
    folder = write_model(tmp_path / "one", One(), ["tumor", "stroma"])
    assert "answers [8, 1] for 8 tiles, its config.json names 2 classes" in refused(network_of(folder).answer, tiles)
    folder = write_model(tmp_path / "two", Two(), ["tumor", "stroma"])
    assert "answers tuple, not a tensor" in refused(network_of(folder).answer, tiles)


def test_a_file_that_changed_is_not_opened(tmp_path: Path) -> None:
    """The process compares the hash of what it read itself, before torch sees it."""
    model = read_script_model(write_model(tmp_path, Mean(), ["a", "b"]))
    model.script.write_bytes(b"another")
    facts = {"script": str(model.script), "sha256": model.sha256}
    assert "is not the file that the run was begun with" in refused(read_script, facts)


def test_words_of_a_script_are_one_line() -> None:
    """Of torch's text, which quotes the source, the line that says what is wrong."""
    text = "The following operation failed\nTraceback of TorchScript:\n    x = y\n\nRuntimeError: sizes do not match\n"
    assert script_process.words_of(RuntimeError(text)) == b"raises RuntimeError: sizes do not match"
    assert script_process.words_of(KeyError("a")) == b"raises KeyError: 'a'"


def test_a_model_wants_a_word_and_is_asked_only_what_it_can(tmp_path: Path) -> None:
    """Without the word nothing is begun; features, runtimes and GPUs are refused; identity is of both files."""
    folder = write_model(tmp_path / "model", Mean(), ["a", "b"])
    assert "--allow-torchscript" in refused(model_recipe, str(folder), None, RunOptions(), kind=OptionError)
    allowed = RunOptions(allow_torchscript=True)
    recipe = model_recipe(str(folder), None, allowed)
    assert (recipe.tasks, recipe.tile, recipe.mpp, recipe.overlap) == (("classify",), 150, 0.5, 0)
    assert recipe.script and not recipe.options.features
    assert [text for text in recipe.warnings() if "TorchScript, which is code" in text]
    for wrong in (
        RunOptions(allow_torchscript=True, device="cuda"),
        RunOptions(allow_torchscript=True, runtime="bf16"),
    ):
        assert "leave --runtime and --device out" in refused(model_recipe, str(folder), None, wrong, kind=OptionError)
    assert "no features: wsi-mmm run" in refused(encoder_recipe, str(folder), None, RunOptions(), kind=OptionError)
    assert "wsi-mmm run -m alone" in refused(card.read_card, folder)
    (folder / "config.json").write_text(json.dumps(config_of(["a", "c"])))
    other = model_recipe(str(folder), None, allowed)
    write_model(folder, nn.Sequential(Mean(), nn.Identity()), ["a", "c"])
    assert len({recipe.model_hash, other.model_hash, model_recipe(str(folder), None, allowed).model_hash}) == 3
    (folder / "config.json").unlink()
    assert "but no config.json" in refused(model_recipe, str(folder), None, allowed)


def test_models_in_the_cache_of_the_hub_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By repository and revision; one that is not there is a line that says how to get it, and nothing is fetched."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    home = tmp_path / "hub" / "models--kaczmarj--breast"
    folder = write_model(home / "snapshots" / "abc", Mean(), ["a", "b"])
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    assert find_script("hf-hub:kaczmarj/breast") == folder == find_script("hf-hub:kaczmarj/breast@abc")
    text = refused(find_script, "hf-hub:kaczmarj/lung@v1")
    assert "hf download kaczmarj/lung --local-dir lung" in text
    assert find_script("default") is None and find_script("s3://bucket/model") is None
