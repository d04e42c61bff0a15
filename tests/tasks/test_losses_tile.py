"""Losses of tile and bag tasks: 1 for who knows nothing, less for who knows, 0 where nothing can be learnt."""

from __future__ import annotations

import math

import pytest
import torch

from wsi_mmm.tasks import losses_tile as losses

NAN = float("nan")


def survival(*pairs: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(pairs)


def test_equal_logits_lose_one() -> None:
    """The stated unit, with smoothing and weights too: ln K, ln 2, the variance, equal risks, hazards of a half."""
    classes = torch.tensor([0, 2, 1, 1, -1])
    labels = torch.tensor([[1.0, 0.0], [NAN, 1.0], [0.0, 0.25]])
    times = survival((1, 1), (2, 0), (2, 1), (2, 1), (5, 1), (NAN, 1))
    values = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    for found in (
        losses.classes_loss(torch.full((5, 3), 0.7), classes),
        losses.classes_loss(torch.zeros(5, 3), classes, smoothing=0.3, weights=(1.0, 5.0, 0.1)),
        losses.labels_loss(torch.zeros(3, 2), labels),
        losses.labels_loss(torch.zeros(3, 2), labels, smoothing=0.1, weights=(4.0, 1.0)),
        losses.cox_loss(torch.full((6, 1), 3.0), times),
        losses.cox_loss(torch.full((6, 1), 3.0), times, efron=False),
        losses.hazards_loss(torch.zeros(6, 4), times, edges=(1.0, 2.0, 3.0, 4.0)),
    ):
        assert float(found) == pytest.approx(1.0, abs=1e-5)
    assert float(losses.values_loss(torch.zeros(20_000, 2), values)) == pytest.approx(1.0, abs=0.02)
    assert float(losses.values_loss(torch.zeros(20_000, 2), values, huber=True)) == pytest.approx(1.0, abs=0.02)


def test_who_knows_loses_less_and_who_is_wrong_more() -> None:
    """Each loss falls towards the truth and rises away from it."""
    classes, labels = torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    times = survival((1, 1), (3, 0))
    right = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])
    hazard = torch.tensor([[3.0, 0.0, 0.0], [-3.0, -3.0, -3.0]])
    edges = (1.0, 2.0, 3.0)
    for loss, logits, target in (
        (losses.classes_loss, right, classes),
        (losses.labels_loss, right, labels),
        (losses.values_loss, torch.tensor([[1.0]]), torch.tensor([[1.5]])),
        (losses.cox_loss, torch.tensor([[2.0], [-2.0]]), times),
        (lambda x, t: losses.hazards_loss(x, t, edges=edges), hazard, times),
    ):
        at_rest = loss(torch.zeros_like(logits), target)
        assert float(loss(logits, target)) < float(at_rest) < float(loss(-logits, target))


def test_where_nothing_can_be_learnt_the_loss_is_zero_with_gradients() -> None:
    """All unknown, a single class, no event, an event that nobody outlives, weights of 0: 0, never NaN."""
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one = logits[:, :1]
    unknown = torch.full((3, 2), NAN)
    for found in (
        losses.classes_loss(logits, torch.tensor([-1, -1, -1])),
        losses.classes_loss(one, torch.tensor([0, 0, 0])),
        losses.classes_loss(logits, torch.tensor([0, 0, 0]), weights=(0.0, 1.0)),
        losses.labels_loss(logits, unknown),
        losses.values_loss(logits, unknown),
        losses.cox_loss(one, unknown),
        losses.cox_loss(one, survival((1, 0), (2, 0), (3, 0))),
        losses.cox_loss(one, survival((1, 0), (2, 0), (3, 1))),
        losses.cox_loss(one[:1], survival((1, 1))),
        losses.hazards_loss(logits, unknown, edges=(1.0, 2.0)),
        losses.hazards_loss(logits, survival((0.2, 0), (0.1, 0), (0.4, 0)), edges=(1.0, 2.0)),
    ):
        assert found.item() == 0.0
        [gradient] = torch.autograd.grad(found, logits, retain_graph=True)
        assert (gradient == 0).all()


def test_the_unknown_changes_nothing() -> None:
    """Items and entries that are not known leave value and gradient of the others as they are."""
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    few = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    more = torch.cat([few, torch.full((2, 2), NAN)])
    times, longer = survival((1, 1), (2, 1)), survival((1, 1), (2, 1), (NAN, 1), (NAN, 0))
    pairs = (
        (losses.classes_loss, torch.tensor([0, 1]), torch.tensor([0, 1, -1, -1])),
        (losses.labels_loss, few, more),
        (losses.values_loss, few, more),
        (lambda x, t: losses.cox_loss(x[:, :1], t), times, longer),
        (lambda x, t: losses.hazards_loss(x, t, edges=(1.0, 2.0)), times, longer),
    )
    for loss, short, long in pairs:
        a, b = loss(logits[:2], short), loss(logits, long)
        assert a.item() == pytest.approx(b.item())
        [ga], [gb] = torch.autograd.grad(a, logits), torch.autograd.grad(b, logits)
        assert torch.allclose(ga, gb)
        assert not torch.isnan(gb).any()


def test_classes_agree_with_torch() -> None:
    """Without weights, smoothing is that of torch; with them, the unsmoothed weighted mean is."""
    generator = torch.Generator().manual_seed(2)
    logits, target = torch.randn(9, 4, generator=generator), torch.tensor([0, 1, 2, 3, 3, -1, 2, 1, 0])
    weights = (0.5, 1.0, 2.0, 4.0)
    smooth = torch.nn.functional.cross_entropy(logits, target, ignore_index=-1, label_smoothing=0.1) / math.log(4)
    heavy = torch.nn.functional.cross_entropy(logits, target, torch.tensor(weights), ignore_index=-1) / math.log(4)
    assert float(losses.classes_loss(logits, target, smoothing=0.1)) == pytest.approx(float(smooth), rel=1e-5)
    assert float(losses.classes_loss(logits, target, weights=weights)) == pytest.approx(float(heavy), rel=1e-5)


def test_cox_is_the_partial_likelihood() -> None:
    """Worked by hand: three at risk when the first event comes, two tied events among the three that follow."""
    risk = torch.tensor([[0.5], [-0.3], [1.2], [0.1]], dtype=torch.float64)
    times = torch.tensor([(1, 1), (2, 1), (2, 1), (3, 0)], dtype=torch.float64)
    e = [math.exp(v) for v in risk[:, 0].tolist()]
    first, rest, tied = math.log(sum(e)) - 0.5, sum(e[1:]), e[1] + e[2]
    breslow = first + 2 * math.log(rest) - (-0.3 + 1.2)
    efron = first + math.log(rest) + math.log(rest - tied / 2) - (-0.3 + 1.2)
    equal_breslow, equal_efron = math.log(4) + 2 * math.log(3), math.log(4) + math.log(3) + math.log(2)
    assert float(losses.cox_loss(risk, times, efron=False)) == pytest.approx(breslow / equal_breslow)
    assert float(losses.cox_loss(risk, times)) == pytest.approx(efron / equal_efron)
    shuffled = torch.tensor([2, 0, 3, 1])
    assert float(losses.cox_loss(risk[shuffled], times[shuffled])) == pytest.approx(efron / equal_efron)


def test_cox_stays_finite_for_large_risks() -> None:
    """Risks that float32 cannot raise e to still have a loss and a gradient, ties included."""
    logits = torch.tensor([[200.0], [-200.0], [300.0], [0.0]], requires_grad=True)
    found = losses.cox_loss(logits, survival((1, 1), (2, 1), (2, 1), (3, 0)))
    [gradient] = torch.autograd.grad(found, logits)
    assert torch.isfinite(found)
    assert torch.isfinite(gradient).all()


def test_discrete_hazards_are_the_likelihood() -> None:
    """Worked by hand: an event in the second interval, one on an edge, one seen for half, one beyond the last edge."""
    logits = torch.tensor([[0.2, -0.4, 1.0]] * 4, dtype=torch.float64)
    times = torch.tensor([(1.5, 1), (1.0, 1), (1.5, 0), (9.0, 1)], dtype=torch.float64)
    h = [1 / (1 + math.exp(-v)) for v in (0.2, -0.4, 1.0)]
    live = [math.log(1 - v) for v in h]
    logs = live[0] + math.log(h[1])  # event in (1, 2]
    logs += math.log(h[0])  # event at 1, which belongs to (0, 1]
    logs += live[0] + live[1]  # seen through half of (1, 2]
    logs += sum(live)  # the event came after the last edge
    found = losses.hazards_loss(logits, times, edges=(1.0, 2.0, 3.0))
    assert float(found) == pytest.approx(-logs / 8 / math.log(2))
