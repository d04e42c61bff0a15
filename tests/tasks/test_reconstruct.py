"""The `reconstruct` task: hide, draw, compare; at inference nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks import View, make_task
from wsi_mmm.tasks.reconstruct import Reconstruct

CARD = TaskCard(name="draw", kind="reconstruct", head="image", outputs=3, classes=("px",), colors=((0, 0, 0),))


def task(**params: float) -> Reconstruct:
    """The task with parameters."""
    made = make_task(CARD.model_copy(update={"params": params}))
    assert isinstance(made, Reconstruct)
    return made


def pictures(n: int = 3, side: int = 40) -> torch.Tensor:
    """Random RGB in [0, 1], brighter in red."""
    noise = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([1.0, 0.5, 0.7]).view(1, 3, 1, 1)


def test_hidden_squares_are_half_and_follow_from_the_seed() -> None:
    """Whole squares show the picture's mean, the rest is as it was; the same seed hides the same, another others."""
    x = pictures(side=64)
    shown, target = task().hide(x, 7)
    hidden = target[:, 3] == 1
    assert hidden.float().mean() == 0.5
    assert torch.equal(shown.movedim(1, -1)[~hidden], x.movedim(1, -1)[~hidden])
    squares = hidden.view(3, 4, 16, 4, 16).permute(0, 1, 3, 2, 4).flatten(3)
    assert bool((squares.all(3) | ~squares.any(3)).all())
    means = x.mean((2, 3))[:, :, None, None].expand_as(x)
    torch.testing.assert_close(shown.movedim(1, -1)[hidden], means.movedim(1, -1)[hidden])
    assert torch.equal(task().hide(x, 7)[0], shown)
    assert not torch.equal(task().hide(x, 8)[0], shown)


def test_any_size_can_be_hidden() -> None:
    """Squares are cut at the picture's edge."""
    shown, target = task(patch=16, share=0.3).hide(pictures(side=40), 0)
    assert shown.shape == (3, 3, 40, 40) and target.shape == (3, 4, 40, 40)
    assert 0 < float(target[:, 3].mean()) < 0.6


def test_drawing_the_mean_costs_one_and_the_truth_nothing() -> None:
    """Of the px that count, per channel; px that were not hidden play no role."""
    _, target = task().hide(pictures(side=64), 1)
    hidden = target[:, 3:] == 1
    mean = torch.stack([target[:, c][hidden[:, 0]].mean() for c in range(3)]).view(1, 3, 1, 1).expand(3, 3, 64, 64)
    assert float(task().loss(mean, target)) == pytest.approx(1.0, abs=1e-5)
    assert float(task().loss(torch.where(hidden, target[:, :3], 100.0), target)) == 0.0


def test_blank_pictures_and_place_holders_do_no_harm() -> None:
    """White glass costs what is bounded; a target that was never made costs nothing, with zero gradients."""
    logits = torch.zeros(2, 3, 32, 32, requires_grad=True)
    _, target = task().hide(torch.ones(2, 3, 32, 32), 0)
    assert bool(torch.isfinite(task().loss(target[:, :3] + 0.01, target)))
    holder = torch.stack([task().target(None)] * 2)
    loss = task().loss(logits, holder)
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not bool(logits.grad.any())


def test_grey_pictures_ask_for_colours() -> None:
    """share 0: three equal channels are shown, every px counts."""
    x = pictures()
    shown, target = task(share=0).hide(x, 0)
    assert torch.equal(shown[:, 0], shown[:, 2])
    assert bool((target[:, 3] == 1).all())
    torch.testing.assert_close(target[:, :3] * 0.2 + 0.7, x)


def test_bytes_are_colours_and_psnr_compares_them() -> None:
    """Drawing the target gives the picture back within a byte's rounding; an error of 10 everywhere is 28.13 dB."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    drawn = task().quantise(task().target(picture)[None, :3])[0].numpy()
    assert (drawn.transpose(1, 2, 0) == picture).all()
    assert task().metrics([(picture, drawn), (None, drawn)]) == {}
    grey = np.full((16, 16, 3), 100, np.uint8)
    figures = task().metrics([(grey, np.full((3, 16, 16), 110, np.uint8))])
    assert figures["psnr"] == pytest.approx(28.1308, abs=1e-3)


def test_nothing_is_drawn_on_slides() -> None:
    """interpret finds nothing."""
    assert len(task().interpret(np.zeros((3, 8, 8), np.uint8), View(0, 0, (0, 0, 8, 8), 1.0, 1.0, 8, 8))) == 0


def test_impossible_parameters_are_refused() -> None:
    """Unknown ones by name, others with the span."""
    with pytest.raises(ModelError, match="'share' is 2"):
        task(share=2)
    with pytest.raises(ModelError, match="does not know: 'dogs'"):
        task(dogs=1)
