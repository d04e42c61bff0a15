"""The pass over a bag: the same numbers whatever else computes, and one line when it cannot be done."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import ModelCard
from wsi_mmm.model.checkpoint import build_model
from wsi_mmm.model.runner import Runner, bag_part

CARD = {
    "name": "bags", "encoder": {"name": "resnet18", "args": {"channels": [8, 16, 24, 32]}},
    "decoder": {"bottleneck": 16, "widths": [8, 8, 16, 16]}, "mpp": 0.5, "tile_size": 64, "overlap": 0,
    "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2],
    "tasks": [{"name": "grade", "kind": "classify", "head": "bag", "outputs": 2, "classes": ["a", "b"],
               "colors": [[0, 0, 0]] * 2}],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["mean", "gated", "transformer"])
def test_a_bag_gives_the_same_bits_for_any_threads(kind: str) -> None:
    """Answers and attention equal those of the model itself on one thread, however many the caller may use."""
    torch.manual_seed(0)
    card = ModelCard.model_validate({**CARD, "bag": {"kind": kind, "width": 16, "hidden": 8}})
    runner = Runner(build_model(card), "cpu", 1, quantise={"grade": lambda x: torch.softmax(x, 1)})
    vectors = np.random.default_rng(0).normal(size=(501, 32)).astype(np.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(runner.answer_bag(vectors, ["grade"]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        runner.close()
    (answers, attention), (again, more) = found
    assert (answers["grade"] == again["grade"]).all()
    assert (attention["grade"] == more["grade"]).all()
    assert answers["grade"].shape == (2,)
    assert attention["grade"].sum() == pytest.approx(1.0, abs=1e-5)
    with torch.inference_mode():
        logits, _ = runner.model.bag_logits(torch.from_numpy(vectors), torch.zeros(501, dtype=torch.int64), ["grade"])
        part = bag_part(runner.model)
        alone, _ = part.bag_logits(torch.from_numpy(vectors), torch.zeros(501, dtype=torch.int64), ["grade"])
    assert answers["grade"] == pytest.approx(torch.softmax(logits["grade"], 1)[0].numpy(), abs=1e-6)
    assert torch.equal(alone["grade"], logits["grade"])
    assert sum(p.numel() for p in part.encoder.parameters()) == 0 < sum(p.numel() for p in part.parameters())


def test_a_bag_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory: ModelError that says how many tiles there were and what to do."""
    card = ModelCard.model_validate(CARD)
    runner = Runner(build_model(card), "cpu", 1, quantise={"grade": lambda x: x})

    def full(*_: object) -> None:
        raise RuntimeError("out of memory\nmore words")

    monkeypatch.setattr(runner.model, "bag_logits", full)
    with pytest.raises(ModelError, match=r"7 tiles cannot be answered as one bag \(out of memory\); use a coarser mpp"):
        runner.answer_bag(np.zeros((7, 32), np.float32), ["grade"])
    runner.close()
