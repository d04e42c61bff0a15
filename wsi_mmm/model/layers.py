"""The layers of a model in their order from the pixels to the answers: for rates that differ by depth, and freezing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from wsi_mmm.model.multitask import MultiTaskModel

_STAGE = re.compile(r"(?:model\.)?((?:blocks|layers?|stages?|features|block)[._]?\d+)")


@dataclass(frozen=True, slots=True)
class Layer:
    """One parameter: ``depth`` 0 is nearest to the pixels; ``name`` as in the model's ``named_parameters``."""

    depth: int
    name: str
    parameter: nn.Parameter


def layers(model: MultiTaskModel) -> tuple[Layer, ...]:
    """Every parameter with its depth, in the model's order.

    Depth 0 is the encoder's stem, then one per stage or block of its; what it has after them counts with the last of
    them. The shared parts (squeezer, decoder, neck, aggregator) are one deeper, the heads two.
    """
    depths = _encoder_depths(model.encoder.backbone)
    above = max(depths.values(), default=0)
    found = []
    for name, parameter in model.named_parameters():
        room, _, rest = name.partition(".")
        if room == "encoder":
            depth = depths[rest.removeprefix("backbone.")]
        else:
            depth = above + (2 if room == "heads" else 1)
        found.append(Layer(depth, name, parameter))
    return tuple(found)


def depth_of(model: MultiTaskModel) -> int:
    """Number of depths: 1 + the largest of `layers`."""
    return 1 + max(layer.depth for layer in layers(model))


def freeze(model: MultiTaskModel, below: int) -> int:
    """Let the parameters of a depth less than ``below`` stay as they are (0: none) and all others learn.

    Norms none of whose parameters learn keep their statistics, too. Returns how many parameters stay.
    """
    held = 0
    for layer in layers(model):
        layer.parameter.requires_grad_(layer.depth >= below)
        held += layer.depth < below
    model.train(model.training)
    return held


def _encoder_depths(backbone: nn.Module) -> dict[str, int]:
    """Depth by parameter name: timm numbers its stages (or blocks); what comes before the first is the stem.

    A backbone without such numbers: its children one by one.
    """
    depths: dict[str, int] = {}
    stages = list(_stage_names(backbone))
    stem = int(bool(stages) and not stages[0][1])
    numbers = {stage: stem + i for i, stage in enumerate(dict.fromkeys(s for _, s in stages if s))}
    depth = 0
    for name, stage in stages:
        depth = numbers.get(stage, depth) if numbers else 0
        depths[name] = depth
    if numbers:
        return depths
    children = list(dict.fromkeys(name.split(".")[0] for name, _ in stages))
    return {name: children.index(name.split(".")[0]) for name, _ in stages}


def _stage_names(backbone: nn.Module) -> Iterator[tuple[str, str]]:
    """(parameter, name of its stage or "")."""
    for name, _ in backbone.named_parameters():
        match = _STAGE.match(name)
        yield name, match.group(1) if match else ""
