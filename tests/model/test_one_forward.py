"""Training, inference and export run one and the same forward pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wsi_mmm.model import multitask, onnx
from wsi_mmm.model.checkpoint import load_model
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import make_task
from wsi_mmm.training.forward import TrainingContext, shared

TASKS = ("nuclei", "stain")


def test_training_inference_and_export_are_one_pass(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the bit in evaluation mode, because each calls the same `trunk` and the same `normalise` once."""
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda *args: calls.append(name) or function(*args)

    normalise = counted("normalise", multitask.normalise)
    monkeypatch.setattr(MultiTaskModel, "trunk", counted("trunk", MultiTaskModel.trunk))
    monkeypatch.setattr(multitask, "normalise", normalise)
    monkeypatch.setattr(onnx, "normalise", normalise)
    model = load_model(small_model)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))
    batch: Any = SimpleNamespace(pixels=pixels, vectors=None, bag=None, seed=0, targets=dict.fromkeys(TASKS))
    context = TrainingContext(model, {task.name: make_task(task) for task in model.card.tasks})
    with torch.no_grad():
        reads = {name: read for name, (read, _) in shared(context, batch, TASKS).items()}
        trained = [model.heads[name](reads[name]) for name in TASKS]
        vector, logits = model.forward_all(model.prepare(pixels), TASKS)
        exported = onnx.Graph(model, TASKS)(pixels)
    assert torch.equal(reads["stain"], vector) and torch.equal(exported[0], vector)
    for n, name in enumerate(TASKS):
        assert torch.equal(trained[n], logits[name]) and torch.equal(exported[n + 1], logits[name])
    assert sorted(calls) == ["normalise"] * 3 + ["trunk"] * 3
