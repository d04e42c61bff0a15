"""A card from anywhere: what it asks for is bounded before anything is built, and the bound is said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wsi_mmm.errors import ModelError
from wsi_mmm.model.bounds import MAX_TASKS, check_arguments
from wsi_mmm.model.card import CARD, parse_card
from wsi_mmm.model.checkpoint import load_model

TASK = {"name": "t", "kind": "classify", "head": "vector", "outputs": 2, "classes": ["a", "b"],
        "colors": [[0, 0, 0]] * 2, "params": {}}  # fmt: skip


def card(**more: Any) -> dict[str, Any]:
    plain = {"format": "wsi-mmm-model/1", "name": "m", "encoder": {"name": "resnet18"}, "mpp": 0.5, "tile_size": 256,
             "overlap": 0, "mean": [0.5] * 3, "std": [0.2] * 3, "tasks": [TASK]}  # fmt: skip
    return plain | more


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (card(encoder={"name": "vit", "args": {"depth": 100_000}}), "depth is 100000: at most 16,384"),
        (card(encoder={"name": "vit", "args": {"depth": 2_000}}), "depth makes 2,000 layers: at most 1,024"),
        (card(encoder={"name": "resnet18", "args": {"layers": [900] * 4}}), "layers makes 3,600 layers: at most 1,024"),
        (card(encoder={"name": "resnet18", "args": {"channels": [1 << 40] * 4}}), "channels is .*: at most 16,384"),
        (card(encoder={"name": "vit", "args": {"img_size": 9_999}}), "img_size is 9999: at most 4,096"),
        (card(encoder={"name": "vit", "args": {"a": {"b": [float("inf")]}}}), "a is inf: at most"),
        (card(encoder={"name": "vit", "args": {"x": [1] * 2_000}}), "2,000 values .*more than 1,000"),
        (card(decoder={"bottleneck": 1 << 30}), "decoder.bottleneck: .*less than or equal to 16384"),
        (card(decoder={"widths": [1 << 30] * 4}), "decoder.widths.0: .*less than or equal to 16384"),
        (card(decoder={"widths": [8] * 99}), "decoder.widths: .*at most 16 items"),
        (card(neck={"width": 1 << 30}), "neck.width: .*less than or equal to 16384"),
        (card(bag={"layers": 1 << 30}), "bag.layers: .*less than or equal to 1024"),
        (card(bag={"hidden": 1 << 30}), "bag.hidden: .*less than or equal to 16384"),
        (card(squeezer={"kind": "attention", "heads": 1 << 30}), "squeezer.heads: .*less than or equal to 1024"),
        (card(tasks=[{**TASK, "name": f"t{n}"} for n in range(MAX_TASKS + 1)]), "tasks: .*at most 256 items"),
        (card(tasks=[{**TASK, "outputs": 1 << 30}]), "tasks.0.outputs: .*less than or equal to 4096"),
        (card(tasks=[{**TASK, "params": {"x": float("nan")}}]), "tasks.0.params.x.* finite"),
        (card(tile_size=1 << 30), "tile_size: .*less than or equal to 16384"),
    ],
)  # fmt: skip
def test_absurd_numbers_are_refused_before_anything_is_built(raw: dict[str, Any], words: str) -> None:
    """One line that names the field and the bound."""
    with pytest.raises(ModelError, match=words) as error:
        parse_card(raw, "card")
    assert "\n" not in str(error.value)


def test_networks_of_the_field_are_within_bounds() -> None:
    """The largest that are published."""
    check_arguments({"img_size": 224, "depth": 48, "embed_dim": 1536, "num_heads": 24, "mlp_ratio": 5.33334})
    check_arguments({"layers": [3, 30, 48, 8], "channels": [256, 512, 1024, 2048], "img_size": 1024})


def _more_layers(raw: dict[str, Any]) -> None:
    raw["encoder"]["args"]["layers"] = [250, 250, 250, 250]


def _wider(raw: dict[str, Any]) -> None:
    raw["encoder"]["args"]["channels"] = [16_384] * 4


def _wide_bag(raw: dict[str, Any]) -> None:
    raw["tasks"][0] |= {"head": "bag"}
    raw["bag"] = {"kind": "transformer", "width": 16_384, "layers": 1_000}


@pytest.mark.parametrize("change", [_more_layers, _wider, _wide_bag])
def test_a_card_that_asks_for_more_than_its_weights_hold_ends_soon(
    small_model: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """Within the bounds of its fields it could still take hours and terabytes: building ends where the weights do."""
    raw = json.loads((small_model / CARD).read_text())
    raw["tasks"] = [task for task in raw["tasks"] if task["kind"] == "classify"]
    change(raw)
    (tmp_path / CARD).write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(small_model / "model.safetensors")
    began = time.process_time()
    with pytest.raises(ModelError, match=r"describes a network of more than .* card and weights are not of one model"):
        load_model(tmp_path)
    assert time.process_time() - began < 10
    assert load_model(small_model).tasks  # the bound has gone
