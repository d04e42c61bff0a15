"""Losses per pixel: 1 for who knows nothing, gradients that finite differences confirm, unknown px left out."""

from __future__ import annotations

import pytest
import torch

from wsi_mmm.tasks import losses_dense as losses


def dice(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64 that ask for gradients."""
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return numbers.requires_grad_()


def heat() -> torch.Tensor:
    """A centre in each of two pictures, a slope beside it, unknown px."""
    out = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    out[:, 0, 1, 1], out[:, 0, 1, 2], out[0, 0, 3] = 1.0, 0.6, torch.nan
    return out


def masks() -> torch.Tensor:
    """Ones, zeros and unknown px of two classes."""
    return torch.tensor([1, 0, -1, 1]).view(1, 1, 2, 2).expand(2, 2, 2, 2).contiguous()


CASES = {
    "classes": (lambda x: losses.pixel_classes_loss(x, torch.tensor([[[0, 1], [-1, 2]]])), (1, 3, 2, 2)),
    "weighted": (
        lambda x: losses.pixel_classes_loss(x, torch.tensor([[[0, 1], [-1, 2]]]), weights=(1.0, 3.0, 0.0)), (1, 3, 2, 2)
    ),
    "masks": (lambda x: losses.masks_loss(x, masks(), weights=(1.0, 4.0)), (2, 2, 2, 2)),
    "centres": (lambda x: losses.centres_loss(x, heat()), (2, 1, 4, 4)),
    "sides": (lambda x: losses.sides_loss(x, torch.ones(1, 4, 2, 2), torch.eye(2)[None] / 2), (1, 4, 2, 2)),
    "pixels": (lambda x: losses.pixels_loss(x, dice(2, 4, 3, 3, seed=1).detach().abs()), (2, 3, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Of every loss, in float64."""
    loss, shape = CASES[name]
    assert torch.autograd.gradcheck(loss, (dice(*shape),))


@pytest.mark.parametrize("name", ["classes", "weighted", "masks", "centres"])
def test_logits_of_zero_cost_one(name: str) -> None:
    """Whatever the weights and whatever is unknown."""
    loss, shape = CASES[name]
    assert float(loss(torch.zeros(shape, dtype=torch.float64))) == pytest.approx(1.0)


def test_random_heads_cost_about_one() -> None:
    """Logits of a fresh head (spread 0.5) on sparse centres: between one half and two."""
    target = torch.zeros(4, 1, 64, 64, dtype=torch.float64)
    target[:, 0, 10::20, 10::20] = 1.0
    assert 0.5 < float(losses.centres_loss(dice(4, 1, 64, 64).detach() * 0.5, target)) < 2.0


def test_every_class_of_masks_counts_alike() -> None:
    """A class with one known px weighs as much as one with all known."""
    target = torch.full((1, 2, 4, 4), -1)
    target[0, 0], target[0, 1, 0, 0] = 0, 1
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 0] = -20.0
    assert float(losses.masks_loss(logits, target)) == pytest.approx(0.5, abs=1e-5)


def test_classes_of_no_weight_cost_nothing() -> None:
    """When all known px have weight 0 there is nothing to learn, not a division by zero."""
    x = dice(1, 2, 2, 2)
    loss = losses.pixel_classes_loss(x, torch.zeros(1, 2, 2, dtype=torch.int64), weights=(0.0, 1.0))
    loss.backward()
    assert loss.item() == 0.0 and x.grad is not None and not bool(x.grad.any())
