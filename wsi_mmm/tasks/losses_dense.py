"""Losses of tasks that answer per pixel, each 1 for a head whose logits are all 0. Tensors in, scalar tensors out.

What is unknown is left out; where nothing can be learnt the loss is ``logits.sum() * 0``: zero gradients, none missing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from wsi_mmm.tasks.losses_tile import zero_loss

PRIOR = -2.5
"""Added to the logits of centres: most px are none, so that an untrained head says 0.08, not one half."""


def pixel_classes_loss(
    logits: Tensor, target: Tensor, *, smoothing: float = 0.02, weights: tuple[float, ...] | None = None
) -> Tensor:
    """Cross entropy of float[n, K, h, w] in units of ln K. ``target`` int64[n, h, w], negative: unknown.

    ``weights`` (K of them) weigh px by their true class, in a weighted mean. 0 for a single class.
    """
    count, known = logits.shape[1], target >= 0
    if count < 2 or not bool(known.any()):
        return zero_loss(logits)
    weigh = None if weights is None else logits.new_tensor(weights)
    if weigh is not None and not bool(weigh[target[known].long()].any()):
        return zero_loss(logits)
    wanted = target.long().clamp_min(-1)
    found = functional.cross_entropy(logits, wanted, weight=weigh, ignore_index=-1, label_smoothing=smoothing)
    return found / math.log(count)


def masks_loss(logits: Tensor, target: Tensor, *, weights: tuple[float, ...] | None = None) -> Tensor:
    """Binary cross entropy of K masks float[n, K, h, w] in units of ln 2, averaged over the classes that are known.

    ``target`` [n, K, h, w]: 1, 0, negative: unknown. Every class counts alike, however few of its px are known.
    ``weights`` (K of them) weigh px of a mask against those beside it, in a weighted mean.
    """
    known = target >= 0
    share = target.clamp_min(0).to(logits.dtype)
    weigh = known.to(logits.dtype)
    if weights is not None:
        weigh = weigh * (1.0 + (logits.new_tensor(weights).view(1, -1, 1, 1) - 1.0) * share)
    total = weigh.sum((0, 2, 3))
    if not bool((total > 0).any()):
        return zero_loss(logits)
    each = functional.binary_cross_entropy_with_logits(logits, share, reduction="none")
    per_class = (each * weigh).sum((0, 2, 3)) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return per_class[total > 0].mean() / math.log(2.0)


def detect_loss(logits: Tensor, target: Tensor) -> Tensor:
    """``logits`` float[n, K + 4, h, w], ``target`` float[n, K + 5, h, w] as `Detect.target` makes it.

    0.6 of what centres cost (in units of what an untrained head's would), 0.4 of how far sides are off, in octaves.
    """
    count = logits.shape[1] - 4
    return 0.6 * centres_loss(logits[:, :count], target[:, :count]) + 0.4 * sides_loss(
        logits[:, count:], target[:, count : count + 4], target[:, count + 4]
    )


def centres_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Focal loss of a heat map that is 1 at centres and falls off round them (Law and Deng 2018, equation 1), NaN where
    unknown, divided by what it is when all ``logits`` are 0. Pictures without objects count, too.
    """
    known = ~torch.isnan(heat)
    if not bool(known.any()):
        return zero_loss(logits)
    heat = torch.where(known, heat, 0.0).to(logits.dtype)
    found = _focal_sum(logits + PRIOR, heat, known)
    return found / _focal_sum(torch.full_like(logits, PRIOR), heat, known).detach()


def _focal_sum(logits: Tensor, heat: Tensor, known: Tensor) -> Tensor:
    chance = torch.sigmoid(logits)
    hit = -functional.logsigmoid(logits) * (1.0 - chance) ** 2
    clear = -functional.logsigmoid(-logits) * chance**2 * (1.0 - heat) ** 4
    return torch.where(known, torch.where(heat == 1.0, hit, clear), 0.0).sum()


def sides_loss(logits: Tensor, sides: Tensor, weight: Tensor) -> Tensor:
    """Smooth L1 of the logarithms (base 2) of distances to the four sides, by ``weight`` [n, h, w], which is 1 in sum
    per object: in octaves, the same for small and large objects."""
    total = weight.sum()
    if not bool(total > 0):
        return zero_loss(logits)
    error = functional.smooth_l1_loss(logits, sides.to(logits.dtype), reduction="none", beta=0.1).mean(1)
    return (error * weight).sum() / total


def pixels_loss(logits: Tensor, target: Tensor, *, least: float = 0.05) -> Tensor:
    """Squared error of drawn px against ``target`` float[n, 4, h, w] (three channels, and which px count), divided by
    the variance of those px in the batch: 1 for drawing their mean. Blank batches count as of spread ``least``."""
    wanted, weight = target[:, :3].to(logits.dtype), target[:, 3:].to(logits.dtype)
    total = weight.sum()
    if not bool(total > 0):
        return zero_loss(logits)
    mean = (wanted * weight).sum((0, 2, 3), keepdim=True) / total
    spread = ((wanted - mean) ** 2 * weight).sum() / (3 * total)
    error = ((logits - wanted) ** 2 * weight).sum() / (3 * total)
    return error / spread.clamp_min(least**2)


# ---------------------------------------------------------------- instances


def instances_loss(logits: Tensor, target: Tensor, *, unit: float) -> Tensor:
    """``logits`` float[n, 4, h, w], ``target`` float[n, 5, h, w] as `Instances.target` makes it.

    Map px whose first channel is NaN are left out; so are pictures that have nothing else.
    """
    some = ~torch.isnan(target[:, 0]).flatten(1).all(1)
    if not bool(some.any()):
        return logits.sum() * 0.0
    logits, target = logits[some], target[some]
    known = ~torch.isnan(target[:, 0])
    target = torch.where(known[:, None], target, 0.0)
    parts = (
        0.30 * foreground_loss(logits[:, 0], target[:, 0], known),
        0.60 * depth_loss(logits[:, 1], target[:, 1], known),
        0.15 * offset_loss(logits[:, 2:] * unit, target[:, 2:4], target[:, 4]),
    )
    return torch.stack(parts).sum()


def foreground_loss(logits: Tensor, soft: Tensor, known: Tensor) -> Tensor:
    """Cross entropy plus 0.7 Dice (per picture, smoothed so that empty pictures count little) over ``known`` px."""
    entropy = functional.binary_cross_entropy_with_logits(logits[known], soft[known])
    chance = torch.sigmoid(logits) * known
    overlap = 2.0 * (chance * soft).sum((1, 2)) + 20.0
    dice = 1.0 - overlap / (chance.sum((1, 2)) + soft.sum((1, 2)) + 20.0)
    return entropy + 0.7 * dice.mean()


def depth_loss(logits: Tensor, depth: Tensor, known: Tensor) -> Tensor:
    """Cross entropy against the soft depth, less its own entropy (so that 0 is reached), heavier inside objects."""
    plain = functional.binary_cross_entropy_with_logits(logits, depth, reduction="none")
    least = functional.binary_cross_entropy(depth, depth, reduction="none")
    return ((plain - least) * (1.0 + 3.0 * (depth > 0)))[known].mean()


def offset_loss(found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Weighted smooth L1 in target px of both components, per px of weight > 0."""
    error = functional.smooth_l1_loss(found, wanted, reduction="none").sum(1)
    return (error * weight).sum() / (weight > 0).sum().clamp_min(1)
