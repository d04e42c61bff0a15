"""Losses of tasks that answer per tile or per bag, each 1 for a predictor that knows nothing. Tensors in, scalars out.

Such a predictor is an untrained head, whose logits are all alike: every class equally likely, every label and every
hazard a half, every value the average, every risk the same. What is unknown is left out; where nothing can be learnt
(all unknown, one class, no event) the loss is ``logits.sum() * 0``, so that gradients are zeros and never missing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

HUBER_UNIT = 0.42466022
"""Mean of the Huber loss (delta 1) of a standard normal: erf(1/sqrt 2) + phi(1) - 1/2, phi its density."""


def zero_loss(logits: Tensor) -> Tensor:
    """A loss of 0 whose gradients are zeros."""
    return logits.sum() * 0.0


def classes_loss(
    logits: Tensor, target: Tensor, *, smoothing: float = 0.0, weights: tuple[float, ...] | None = None
) -> Tensor:
    """Cross entropy of float[n, K] in units of ln K: 1 when all K logits are equal. 0 for a single class.

    ``target`` int64[n], negative: unknown. The wanted share is ``1 - smoothing`` for the true class plus
    ``smoothing / K`` for every class; ``weights`` (K of them) weigh items by their true class, in a weighted mean.
    """
    known = target >= 0
    count = logits.shape[1]
    if count < 2 or not bool(known.any()):
        return zero_loss(logits)
    chance, true = functional.log_softmax(logits[known], dim=1), target[known].long()
    each = -(1.0 - smoothing) * chance.gather(1, true[:, None])[:, 0] - smoothing * chance.mean(dim=1)
    weigh = torch.ones_like(each) if weights is None else each.new_tensor(weights)[true]
    return _weighted_mean(each, weigh, logits) / math.log(count)


def labels_loss(
    logits: Tensor, target: Tensor, *, smoothing: float = 0.0, weights: tuple[float, ...] | None = None
) -> Tensor:
    """Binary cross entropy of float[n, K] in units of ln 2: 1 when every logit is 0.

    ``target`` float[n, K] shares in [0, 1], NaN: unknown; moved towards a half by ``smoothing``. ``weights`` (K of
    them) weigh what holds of each label, in a weighted mean over everything that is known.
    """
    known = ~torch.isnan(target)
    if not bool(known.any()):
        return zero_loss(logits)
    share = torch.where(known, target, 0.0).to(logits.dtype)
    weigh = known.to(logits.dtype)
    if weights is not None:
        weigh = weigh * (1.0 + (logits.new_tensor(weights) - 1.0) * share)
    soft = share * (1.0 - smoothing) + 0.5 * smoothing
    each = functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    return _weighted_mean(each, weigh, logits) / math.log(2.0)


def values_loss(logits: Tensor, target: Tensor, *, huber: bool = False) -> Tensor:
    """Squared error of float[n, K] against targets in units of their spread round their centre, NaN: unknown.

    1 on average when every logit is 0, since the variance of such targets is 1. ``huber``: absolute beyond one
    spread, in units of `HUBER_UNIT`: 1 when the targets are normal.
    """
    known = ~torch.isnan(target)
    if not bool(known.any()):
        return zero_loss(logits)
    found, wanted = logits[known], target[known].to(logits.dtype)
    if huber:
        return functional.huber_loss(found, wanted) / HUBER_UNIT
    return functional.mse_loss(found, wanted)


# ---------------------------------------------------------------- survival


def cox_loss(logits: Tensor, target: Tensor, *, efron: bool = True) -> Tensor:
    """Cox's negative log partial likelihood of risks float[n, 1], as a share of that of equal risks: 1 for those.

    ``target`` float[n, 2]: time (NaN: unknown) and 1 where the event happened, 0 where it was not seen by then. The
    batch is the risk set. Ties by Efron (1977), or by Breslow (1974). 0 without an event that another item outlives.
    """
    known = ~torch.isnan(target[:, 0])
    if not bool(known.any()):
        return zero_loss(logits)
    risk, time, event = logits[known, 0], target[known, 0], target[known, 1] > 0.5
    worst = _partial_likelihood(torch.zeros_like(risk), time, event, efron=efron)
    if float(worst) <= 0.0:
        return zero_loss(logits)
    return _partial_likelihood(risk, time, event, efron=efron) / worst


def _partial_likelihood(risk: Tensor, time: Tensor, event: Tensor, *, efron: bool) -> Tensor:
    """-log partial likelihood: per event, log of the summed hazards of those still at risk, less its own risk.

    Efron takes from the d tied events of a time the share l / d of their own hazards, l = 0 .. d - 1.
    """
    by_time = torch.argsort(time, descending=True, stable=True)
    risk, event = risk[by_time], event[by_time]
    _, group, sizes = torch.unique_consecutive(time[by_time], return_inverse=True, return_counts=True)
    at_risk = torch.logcumsumexp(risk, 0)[sizes.cumsum(0) - 1]  # per time: all whose time is not earlier
    risk, group = risk[event], group[event]
    each = at_risk[group] - risk
    if efron:
        tied = torch.zeros_like(at_risk).index_add(0, group, torch.exp(-each))
        count = torch.bincount(group, minlength=len(sizes))
        place = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
        each = each + torch.log1p(-(place / count[group]) * tied[group])
    return each.sum()


def hazards_loss(logits: Tensor, target: Tensor, *, edges: tuple[float, ...]) -> Tensor:
    """Negative log likelihood of discrete hazards per interval at risk, in units of ln 2: 1 when every logit is 0.

    ``logits`` float[n, B]: log odds that the event happens in an interval, given that it has not before. Interval j
    reaches from ``edges[j - 1]`` (0) to ``edges[j]``, which belongs to it. ``target`` as of `cox_loss`. An item is at
    risk up to the interval of its event; without one, in the intervals of which it was seen through the first half
    (Gensheimer and Narasimhan 2019). Events after the last edge count as not seen by then.
    """
    ends = logits.new_tensor(edges)
    middles = (ends + torch.cat([ends.new_zeros(1), ends[:-1]])) / 2
    time, event = target[:, :1].to(logits.dtype), target[:, 1:] > 0.5
    number = torch.arange(len(edges), device=logits.device)[None]
    place = torch.searchsorted(ends, time.contiguous())
    at_risk = torch.where(event, number <= place, time >= middles) & ~torch.isnan(time)
    if not bool(at_risk.any()):
        return zero_loss(logits)
    wanted = (event & (number == place)).to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits[at_risk], wanted[at_risk]) / math.log(2.0)


def _weighted_mean(each: Tensor, weigh: Tensor, logits: Tensor) -> Tensor:
    """Weighted mean; nothing when no weight is left."""
    total = weigh.sum()
    return (each * weigh).sum() / total if bool(total > 0) else zero_loss(logits)
