"""Weights must fit completely: every fault is one line that names a tensor and what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.model.fitting import fit_weights
from wsi_mmm.model.networks import create_network

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
VIT = "vit_tiny_patch16_224"
REG = "vit_small_patch14_reg4_dinov2"
PLAIN = "vit_small_patch14_dinov2"
GATED = "vit_giant_patch14_dinov2"
TINY14 = TINY | {"img_size": 56}


def weights_of(name: str, arguments: dict[str, object], **more: object) -> dict[str, Tensor]:
    """Random weights of a network of timm."""
    return dict(timm.create_model(name, **{"num_classes": 0, **arguments, **more}).state_dict())


def fault(tensors: dict[str, Tensor], name: str, arguments: dict[str, object]) -> str:
    """The one line of the error."""
    with pytest.raises(ModelError, match=r"the weights w\.safetensors (do not fit|hold NaN)") as error:
        fit_weights(create_network(name, arguments, empty=True), tensors, "w.safetensors")
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("theirs", "ours", "tensor", "way_out"),
    [
        ((VIT, TINY | {"init_values": 1e-5}), (VIT, TINY), "blocks.0.ls1.gamma", '{"init_values": 1e-05}'),
        ((VIT, TINY), (VIT, TINY | {"init_values": 1e-5}), "blocks.0.ls1.gamma", '{"init_values": null}'),
        ((REG, TINY14), (PLAIN, TINY14), "reg_token", '{"reg_tokens": 4}'),
        ((PLAIN, TINY14), (REG, TINY14), "reg_token", '{"reg_tokens": 0}'),
        ((REG, TINY14 | {"reg_tokens": 8}), (REG, TINY14), "reg_token", '{"reg_tokens": 8}'),
        ((GATED, TINY14), (PLAIN, TINY14), "blocks.0.mlp.fc1.weight", f'--encoder {GATED} .*"embed_dim": 48'),
        ((VIT, TINY | {"depth": 3}), (VIT, TINY), "blocks.2.norm1.weight", '{"depth": 3}'),
        ((VIT, TINY), (VIT, TINY | {"depth": 3}), "blocks.2.norm1.weight", '{"depth": 2}'),
        ((VIT, TINY | {"img_size": 96}), (VIT, TINY), "pos_embed", '{"img_size": 96}'),
        ((VIT, TINY | {"patch_size": 8, "img_size": 32}), (VIT, TINY), "patch_embed.proj.weight", '{"patch_size": 8}'),
        ((REG, TINY14 | {"no_embed_class": False}), (REG, TINY14), "pos_embed", '{"no_embed_class": false}'),
        ((VIT, TINY | {"global_pool": "avg"}), (VIT, TINY), "fc_norm.weight", '{"global_pool": "avg"}'),
        ((VIT, TINY | {"embed_dim": 96}), (VIT, TINY), "cls_token", "96 numbers, the network's 48"),
        (("resnet18", {}), (VIT, TINY), "conv1.weight", "of quite another network"),
    ],
)
def test_the_message_names_the_tensor_and_the_argument(
    theirs: tuple[str, dict[str, object]], ours: tuple[str, dict[str, object]], tensor: str, way_out: str
) -> None:
    """Surplus, missing, of another shape; with the argument that these weights want."""
    text = fault(weights_of(*theirs), *ours)
    assert f"'{tensor}'" in text
    assert re.search(way_out.replace("{", r"\{").replace("}", r"\}"), text), text


def test_a_published_encoder_is_known_by_its_tensors() -> None:
    """A UNI file in a plain ViT-L/16: its 48 LayerScales and the name that takes them are said."""
    with torch.device("meta"):
        theirs = weights_of("vit_large_patch16_224", {"img_size": 224, "init_values": 1e-5})
    text = fault(theirs, "vit_large_patch16_224", {})
    assert "'blocks.0.ls1.gamma' (48 surplus tensors)" in text
    assert re.search(r"--encoder uni or ", text), text


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("encoder.layer.0.norm1.weight", "names of transformers"),
        ("blocks.0.0.norm1.weight", "Meta's DINOv2 names"),
        ("blocks.0.mlp.w12.weight", "w12"),
        ("dino_head.last_layer.weight", "give the architecture"),
    ],
)
def test_names_of_other_libraries_are_recognised(key: str, words: str) -> None:
    """They are surplus; the message says whose they are."""
    assert words in fault({key: torch.zeros(2)} | weights_of(VIT, TINY), VIT, TINY)


def prefixed(prefix: str) -> Callable[[str], str]:
    """Put before a name."""
    return lambda key: prefix + key


@pytest.mark.parametrize(
    ("name", "arguments"), [(VIT, TINY), ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]})]
)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.backbone.model."])
def test_a_classifier_and_wrappers_are_left_out(name: str, arguments: dict[str, object], prefix: str) -> None:
    """Files of whole classifiers, saved from within other modules, fit; nothing else is dropped."""
    whole = weights_of(name, arguments, num_classes=10)
    plain = create_network(name, arguments, empty=True).state_dict()
    fitting = fit_weights(
        create_network(name, arguments, empty=True), {prefix + key: value for key, value in whole.items()}, "w"
    )
    assert set(fitting) == set(plain)
    assert len(whole) > len(fitting)
    assert all(torch.equal(value, whole[key]) for key, value in fitting.items())


def test_counters_of_batch_norms_may_be_missing() -> None:
    """Files of old versions of torch lack them."""
    arguments: dict[str, Any] = {"channels": [8, 16, 24, 32]}
    tensors = {k: v for k, v in weights_of("resnet18", arguments).items() if not k.endswith("num_batches_tracked")}
    fitting = fit_weights(create_network("resnet18", arguments, empty=True), tensors, "w")
    assert set(fitting) == set(create_network("resnet18", arguments, empty=True).state_dict())


def test_only_one_repository_fits_a_published_encoder() -> None:
    """Arguments would not help: its own weights are named."""
    with pytest.raises(ModelError) as error:
        fit_weights(create_network(VIT, TINY, empty=True), weights_of(VIT, TINY | {"depth": 3}), "w", "Lab/Tiny")
    text = str(error.value)
    assert "not those that Lab/Tiny publishes, which hf download Lab/Tiny brings" in text
    assert "--encoder-args" not in text


def test_quantised_weights_are_refused() -> None:
    """Whole numbers where the network computes: named, before torch complains of each."""
    tensors = weights_of(VIT, TINY)
    tensors["norm.bias"] = tensors["norm.bias"].to(torch.int8)
    with pytest.raises(ModelError, match=r"hold whole numbers \(int8\) in 'norm.bias': quantised .* F32 or F16"):
        fit_weights(create_network(VIT, TINY, empty=True), tensors, "w")


def test_a_number_that_is_none_is_refused() -> None:
    """NaN in one tensor, which is named."""
    tensors = weights_of(VIT, TINY)
    tensors["norm.bias"][3] = float("nan")
    assert "'norm.bias'" in fault(tensors, VIT, TINY)
