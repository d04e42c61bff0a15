"""Batch norms folded into the convolutions before them: the same function but for float rounding, in fewer passes.

Which convolution feeds which norm is seen by running the model once, not guessed from names; the folded model is then
compared with the first one. Measured on two cores, mobilenetv4_conv_small: 9.3 -> 8.0 ms of a core per 256 px tile.
"""

from __future__ import annotations

import copy

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from wsi_mmm.errors import first_line
from wsi_mmm.model.multitask import MultiTaskModel

TOLERANCE = 1e-4
"""Largest difference between the answers of the folded and the plain model, as a share of the largest answer."""


def fold_norms(model: MultiTaskModel) -> tuple[MultiTaskModel, str]:
    """A copy of ``model``, for evaluation only, with its norms folded, and a report's words for what was done.

    ``model`` itself when it has none to fold, when it cannot be run at its card's tile size, or when the copy's answers
    differ by more than rounding explains (a convolution's result that something besides its norm uses, too).
    """
    norms = sum(_is_norm(module) for module in model.modules())
    if not norms:
        return model, "none to fold"
    try:
        probe = model.prepare(seeded_noise(1, model.card.tile_size, model.card.tile_size))
        wanted, pairs = _find_pairs(model, probe)
    except (RuntimeError, AssertionError, ValueError) as error:  # a size that this encoder does not take
        line = first_line(error, 120)
        return model, f"not folded: the model could not be tried at {model.card.tile_size} px ({line})"
    if not pairs:
        return model, f"not folded: no convolution feeds one of the {norms} alone"
    copied = copy.deepcopy(model)
    for conv, norm in pairs.items():
        _fold_norm(copied, conv, norm)
    copied.requires_grad_(False)
    compared = zip(wanted, _all_answers(copied, probe), strict=True)
    if any(float((one - two).abs().max()) > TOLERANCE * float(one.abs().max()) for one, two in compared):
        return model, f"not folded: the answers would change by more than {TOLERANCE:g} of the largest"
    return copied, f"{len(pairs)} of {norms} folded into convolutions"


def _is_norm(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm2d, BatchNormAct2d) and bool(getattr(module, "track_running_stats", False))


def _is_conv(module: nn.Module) -> bool:
    return type(module) in (nn.Conv2d, Conv2dSame)  # others change their weights as they run


def seeded_noise(count: int, height: int, width: int) -> Tensor:
    """Tiles uint8[count, height, width, 3] to try a model with, the same each time."""
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), generator=numbers, dtype=torch.uint8)


@torch.inference_mode()
def _all_answers(model: MultiTaskModel, probe: Tensor) -> list[Tensor]:
    """Everything the model says of the probe."""
    vector, logits = model.forward_all(probe)
    return [vector, *logits.values()]


def _find_pairs(model: MultiTaskModel, probe: Tensor) -> tuple[list[Tensor], dict[str, str]]:
    """The answers, and the names of convolutions whose result goes into a norm: {convolution: norm}."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no two share an id
    calls: dict[str, int] = {}
    pairs: dict[str, str] = {}

    def called(name: str, module: nn.Module, given: Tensor, result: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if _is_conv(module):
            made[id(result)] = (name, result)
        elif id(given) in made:
            pairs[made[id(given)][0]] = name

    handles = [
        module.register_forward_hook(lambda m, given, result, name=name: called(name, m, given[0], result))
        for name, module in model.named_modules()
        if _is_conv(module) or _is_norm(module)
    ]
    try:
        answers = _all_answers(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    once = {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}
    return answers, once


def _fold_norm(model: nn.Module, conv_name: str, norm_name: str) -> None:
    """norm(conv(x)) = conv'(x) with w' = w * s, b' = (b - mean) * s + shift, s = gain / sqrt(var + eps).

    The activation that timm puts into a norm stays.
    """
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    mean, var = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    scale = (var + norm.eps).rsqrt() * (norm.weight.double() if norm.affine else 1.0)
    shift = norm.bias.double() if norm.affine else torch.zeros_like(scale)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(scale)
    with torch.no_grad():
        conv.weight.copy_(conv.weight.double() * scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(((bias - mean) * scale + shift).float())
    parent, _, name = norm_name.rpartition(".")
    rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    setattr(model.get_submodule(parent), name, rest)
