"""Made-up models in the format of the WSInfer zoo."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

COLOURS = {"mean": [0.72, 0.57, 0.68], "std": [0.11, 0.15, 0.11]}


def config_of(classes: Sequence[str], **changed: Any) -> dict[str, Any]:
    """A config.json with the keys that the zoo's schema wants; ``changed``: those that differ."""
    steps: list[dict[str, Any]] = [
        {"name": "Resize", "arguments": {"size": 64}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": COLOURS},
    ]
    return {
        "spec_version": "1.0", "architecture": "resnet18", "num_classes": len(classes), "class_names": list(classes),
        "patch_size_pixels": 150, "spacing_um_px": 0.5, "transform": steps, **changed,
    }  # fmt: skip


def write_model(folder: Path, network: nn.Module, classes: Sequence[str], **changed: Any) -> Path:
    """Write config.json and torchscript_model.pt of a network."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(classes, **changed)))
    with warnings.catch_warnings():  # torch says that another format is to come
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network.eval()).save(str(folder / "torchscript_model.pt"))  # type: ignore[no-untyped-call]
    return folder


def small_resnet(classes: int, seed: int = 0) -> nn.Module:
    """A resnet18 with random weights whose norms have seen pictures, so that its answers differ from tile to tile."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = torchvision.models.resnet18(num_classes=classes)
        network.train()
        with torch.no_grad():
            for _ in range(2):
                network(torch.randn(4, 3, 64, 64))
    return network.eval()
