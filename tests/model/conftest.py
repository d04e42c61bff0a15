"""A small model with random weights, saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wsi_mmm.model.card import DecoderCard, EncoderCard, ModelCard, TaskCard
from wsi_mmm.model.checkpoint import build_model, save_model

CARD = ModelCard(
    name="small", encoder=EncoderCard(name="resnet18", args={"channels": [8, 16, 24, 32]}),
    decoder=DecoderCard(bottleneck=16, widths=(8, 8, 16, 16)), mpp=0.5, tile_size=64, overlap=16,
    mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2),
    tasks=(
        TaskCard(name="nuclei", kind="instances", head="map", outputs=4, classes=("nucleus",), colors=((0, 1, 2),)),
        TaskCard(name="stain", kind="classify", head="vector", outputs=2, classes=("a", "b"), colors=((0, 0, 0),) * 2),
    ),
)  # fmt: skip


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved model with seeded random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    save_model(build_model(CARD), folder)
    return folder
