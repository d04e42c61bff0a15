"""Aggregators: ragged bags in, one vector per bag and honest attention out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.model.aggregator import MilAggregator
from wsi_mmm.model.card import BagCard

KINDS = ["mean", "gated", "transformer"]


def aggregator(kind: str, heads: int = 2, width: int = 8) -> MilAggregator:
    """An aggregator of seeded random weights over vectors of 6 channels, in float64."""
    torch.manual_seed(1)
    card = BagCard.model_validate({"kind": kind, "width": width, "hidden": 5, "heads": heads})
    return MilAggregator(card, 6).double().eval()


def ragged() -> tuple[Tensor, Tensor]:
    """Bags of 1, 7, 3 and 20 tiles, mixed."""
    dice = torch.Generator().manual_seed(0)
    bag = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 7, 3, 20]))
    bag = bag[torch.randperm(31, generator=dice)]
    return torch.randn(31, 6, dtype=torch.float64, generator=dice), bag


@pytest.mark.parametrize("kind", KINDS)
def test_attention_sums_to_one_per_bag(kind: str) -> None:
    """Also for a bag of one, where it is 1."""
    vectors, bag = ragged()
    out, attention = aggregator(kind)(vectors, bag)
    assert out.shape == (4, 8) and attention.shape == (31,)
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, bag, attention)
    torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(attention[bag == 0], torch.ones(1, dtype=torch.float64))
    if kind == "mean":
        torch.testing.assert_close(attention[bag == 3], torch.full((20,), 0.05, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bag_does_not_know_its_companions_or_its_order(kind: str) -> None:
    """Each bag alone, its tiles in another order, gives the same vector and attention as among others."""
    vectors, bag = ragged()
    model = aggregator(kind)
    out, attention = model(vectors, bag)
    for number in range(4):
        rows = (bag == number).nonzero()[:, 0].flip(0)
        one, own = model(vectors[rows], torch.zeros(len(rows), dtype=torch.int64))
        torch.testing.assert_close(one[0], out[number])
        torch.testing.assert_close(own, attention[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_no_tiles_and_empty_bags_are_answered(kind: str) -> None:
    """An empty batch gives no bags; a bag without tiles among others is zeros and changes nothing of theirs."""
    vectors, bag = ragged()
    model = aggregator(kind)
    out, attention = model(vectors[:0], bag[:0])
    assert out.shape == (0, 8) and attention.shape == (0,)
    alone, _ = model(vectors, bag)
    among, _ = model(vectors, bag + (bag >= 2), bags=6)
    torch.testing.assert_close(among[[0, 1, 3, 4]], alone)
    assert not bool(among[[2, 5]].any())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    """Through softmax, sums and padding."""
    vectors, bag = ragged()
    some = vectors[:9].clone().requires_grad_()
    model = aggregator(kind)
    assert torch.autograd.gradcheck(lambda v: model(v, bag[:9])[0], (some,))


def test_gated_attention_is_the_formula_of_its_paper() -> None:
    """One head, one bag, written out: a = softmax(w (tanh(V h) * sigmoid(U h))), z = sum of a h (Ilse et al. 2018)."""
    model = aggregator("gated", heads=1, width=0)
    h = ragged()[0]
    assert model.score is not None
    v, u, w = model.score.value, model.score.gate, model.score.out
    a = torch.softmax(w(torch.tanh(v(h)) * torch.sigmoid(u(h)))[:, 0], dim=0)
    z, attention = model(h, torch.zeros(31, dtype=torch.int64))
    torch.testing.assert_close(attention, a)
    torch.testing.assert_close(z[0], a @ h)


def test_a_long_bag_beside_short_ones_is_not_padded() -> None:
    """One bag of 20,000 tiles among 2,000 of one: padded to the longest these would take 240 GB."""
    bag = torch.cat([torch.zeros(20_000, dtype=torch.int64), torch.arange(1, 2001)])
    vectors = torch.randn(len(bag), 768)
    model = MilAggregator(BagCard(kind="gated", width=0), 768).eval()
    with torch.inference_mode():
        out, attention = model(vectors, bag)
    assert out.shape == (2001, 768)
    torch.testing.assert_close(attention[20_000:], torch.ones(2000))
    torch.testing.assert_close(out[1:], vectors[20_000:])


def test_huge_scores_do_not_overflow() -> None:
    """Softmax subtracts each bag's own largest score."""
    model = aggregator("gated", heads=1)
    assert model.score is not None
    torch.nn.init.constant_(model.score.out.bias, 1e4)
    vectors, bag = ragged()
    assert bool(torch.isfinite(model(vectors * 100, bag)[0]).all())


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    """The message names the option."""
    with pytest.raises(ModelError, match=r"bag\.heads is 3"):
        MilAggregator(BagCard(width=8, heads=3), 6)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_does_not_blur_attention(kind: str) -> None:
    """Under autocast to bfloat16 attention still sums to 1 within float32's rounding, and vectors stay close."""
    vectors, bag = ragged()
    model = aggregator(kind).float()
    exact, _ = model(vectors.float(), bag)
    with torch.autocast("cpu", torch.bfloat16):
        out, attention = model(vectors.float(), bag)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(torch.zeros(4).index_add(0, bag, attention), torch.ones(4))
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
