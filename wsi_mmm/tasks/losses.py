"""Losses, each scaled to about 1 for random predictions. Tensors in, scalar tensors out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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


def classes_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over classes (dim 1) in units of ln(classes); negative targets are left out."""
    known = target >= 0
    if not bool(known.any()):
        return logits.sum() * 0.0
    scale = float(torch.log(torch.tensor(float(logits.shape[1]))))
    return functional.cross_entropy(logits, target.long(), ignore_index=-1, label_smoothing=0.02) / scale
