"""Running statistics of batch norms, the same whichever rank does which micro-batch.

A batch norm that sees micro-batches 1 .. B in order ends with r' = (1 - m)^B r + sum of m (1 - m)^(B - i) s_i: linear
in the statistics s_i of each. So every rank finds the terms of its own micro-batches, the terms are added over the
ranks, and the result is that of one process up to rounding. Layers that only some micro-batches pass (decoders, heads)
count only those. In a single process the layers do it themselves, and all that is kept is how to go back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsi_mmm.errors import ModelError
from wsi_mmm.training.ranks import Ranks, add, total


@dataclass(frozen=True, slots=True)
class _Seen:
    """One pass of a layer: the number of its micro-batch, and m times the statistics found in it."""

    place: int
    mean: Tensor
    var: Tensor


class Norms:
    """A model's batch norms during a step: `begin`, forward passes with ``place`` set, then `settle` or `drop`."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.place = 0
        self.ranks = ranks
        self._layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._seen: list[list[_Seen]] = [[] for _ in self._layers]
        self._before: list[tuple[Tensor, ...]] = []
        self._hooks: list[Any] = []
        for index, layer in enumerate(self._layers if ranks.world > 1 else ()):
            if layer.momentum is None:
                raise ModelError("batch norms without momentum cannot be trained on several ranks; give them one")
            self._hooks.append(layer.register_forward_pre_hook(_reset_statistics))
            self._hooks.append(layer.register_forward_hook(self._record_pass(index)))

    def _record_pass(self, index: int) -> Any:
        def record(layer: _BatchNorm, *_: object) -> None:
            if layer.training:
                mean, var, _tracked = _layer_statistics(layer)
                self._seen[index].append(_Seen(self.place, mean.clone(), var.clone()))

        return record

    def close(self) -> None:
        """Leave the model as it was found."""
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """A step begins."""
        self._before = [tuple(t.clone() for t in _layer_statistics(layer)) for layer in self._layers]
        for seen in self._seen:
            seen.clear()

    @torch.no_grad()
    def drop(self) -> None:
        """The step does not count: back to what was."""
        for layer, before in zip(self._layers, self._before, strict=True):
            for tensor, old in zip(_layer_statistics(layer), before, strict=True):
                tensor.copy_(old)

    @torch.no_grad()
    def settle(self, places: int) -> None:
        """The step counts; it had ``places`` micro-batches on all ranks together."""
        if self.ranks.world == 1:
            return
        counts = self._pass_counts(places)
        sums: list[Tensor] = []
        for layer, seen, passes in zip(self._layers, self._seen, counts, strict=True):
            sums += _local_sums(seen, passes, 1.0 - float(layer.momentum or 0.0), _layer_statistics(layer)[0])
        add(self.ranks, sums)
        for index, (layer, before) in enumerate(zip(self._layers, self._before, strict=True)):
            number = sum(counts[index])
            fade = (1.0 - float(layer.momentum or 0.0)) ** number
            mean, var, tracked = _layer_statistics(layer)
            mean.copy_(before[0] * fade + sums[2 * index])
            var.copy_(before[1] * fade + sums[2 * index + 1])
            tracked.copy_(before[2] + number)

    def _pass_counts(self, places: int) -> list[list[int]]:
        """[layer][place]: how often the layer was passed in that micro-batch, whoever did it."""
        flat = [float(sum(s.place == place for s in seen)) for seen in self._seen for place in range(places)]
        found = total(self.ranks, flat)
        return [[int(v) for v in found[i * places : (i + 1) * places]] for i in range(len(self._layers))]


def _local_sums(seen: list[_Seen], passes: list[int], keep: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the sums of mean and variance."""
    mean, var = torch.zeros_like(like), torch.zeros_like(like)
    for number, one in enumerate(seen):
        later = sum(passes[one.place + 1 :]) + sum(s.place == one.place for s in seen[number + 1 :])
        mean.add_(one.mean, alpha=keep**later)
        var.add_(one.var, alpha=keep**later)
    return mean, var


def _reset_statistics(layer: nn.Module, _: object) -> None:
    """From zero, a pass leaves m times what it found."""
    if layer.training and isinstance(layer, _BatchNorm):
        mean, var, _tracked = _layer_statistics(layer)
        # By ``data``: the graphs of earlier batches hold these buffers, though their backward does not read them.
        mean.data.zero_()
        var.data.zero_()


def _layer_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or tracked is None:
        raise ModelError("a batch norm without running statistics cannot be trained on several ranks")
    return mean, var, tracked
