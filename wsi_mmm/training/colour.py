"""Augmentation of colour, focus and noise, on batches where they are.

What is random is drawn on the CPU from the batch's own seed and then moved: a CPU and a GPU get the same numbers, and a
batch that is made again is augmented as before. Costs are those of the pictures chosen: the others are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor
from torch.nn import functional

from wsi_mmm.errors import ConfigError
from wsi_mmm.training.augment import DAB, EOSIN, HEMATOXYLIN, coin, from_od, jpeg, normal, to_od, uniform

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, slots=True)
class Augment:
    """Colour changes that laboratories and scanners cause. 0 switches one off.

    ``stain``: other dyes and thickness, a mixing of the three optical densities (deviation 0.1 of each, 0.25 of their
    log scale, times this); ``hed``: hematoxylin, eosin and DAB by themselves, scaled by up to 1 +- this and shifted
    (Tellez et al. 2018). ``brightness`` (of full light), ``contrast``, ``gamma`` (of their logs) and ``saturation``
    (of 1): deviations. ``blur``, ``sharpen``, ``noise``, ``jpeg``: shares of the pictures; ``blur_width``: px of the
    widest blur; ``noise_level``: strongest noise, of full light. ``jpeg`` runs on the CPU only.
    """

    stain: float = 0.5
    hed: float = 0.0
    brightness: float = 0.05
    contrast: float = 0.12
    gamma: float = 0.12
    saturation: float = 0.1
    blur: float = 0.15
    blur_width: float = 1.6
    sharpen: float = 0.1
    noise: float = 0.2
    noise_level: float = 0.04
    jpeg: float = 0.0

    def __post_init__(self) -> None:
        for name in ("blur", "sharpen", "noise", "jpeg"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"augmentation: '{name}' is a share of the pictures: give 0 to 1")
        if any(not 0.0 <= getattr(self, part.name) < 10.0 for part in fields(self)):
            raise ConfigError("augmentation: strengths are 0 (off) or more; 1 is strong")


NO_AUGMENT = Augment(
    stain=0.0, brightness=0.0, contrast=0.0, gamma=0.0, saturation=0.0, blur=0.0, sharpen=0.0, noise=0.0
)


def recolour(x: Tensor, augment: Augment, *, seed: int) -> Tensor:
    """float[n, 3, h, w] in [0, 1] -> the same, augmented; ``x`` itself when there is nothing to do.

    Raises ConfigError when JPEG is asked for off the CPU.
    """
    if augment == NO_AUGMENT or not len(x):
        return x
    if augment.jpeg and x.device.type != "cpu":
        raise ConfigError("augmentation: 'jpeg' runs on the CPU only; set it to 0 for training on a GPU")
    g = Generator().manual_seed(seed)
    for part in (_change_stains, _change_light, _gaussian_blur, _unsharp_mask, _add_noise):
        x = part(x, augment, g)
    return jpeg(x, g, augment.jpeg) if augment.jpeg else x


def _change_stains(x: Tensor, a: Augment, g: Generator) -> Tensor:
    """Both changes are affine in the three densities, so they are one matrix."""
    n = len(x)
    mix, shift = torch.eye(3).repeat(n, 1, 1), torch.zeros(n, 3, 1)
    if a.stain:
        mix = mix + normal(g, (n, 3, 3), 0.10 * a.stain)
        mix = mix * torch.exp(normal(g, (n, 1, 1), 0.25 * a.stain))
        shift = shift + normal(g, (n, 3, 1), 0.04 * a.stain)
    if a.hed:
        to_stains = torch.linalg.inv(_dye_matrix())
        scaled = torch.diag_embed(1.0 + uniform(g, (n, 3), -a.hed, a.hed))
        hed = _dye_matrix() @ scaled @ to_stains
        mix, shift = hed @ mix, hed @ shift + _dye_matrix() @ uniform(g, (n, 3, 1), -0.2 * a.hed, 0.2 * a.hed)
    if not (a.stain or a.hed):
        return x
    return from_od(_mix_channels(to_od(x), mix, shift))


def _dye_matrix() -> Tensor:
    """float[3, 3]: columns are the unit optical densities of hematoxylin, eosin and DAB."""
    dyes = torch.tensor([HEMATOXYLIN, EOSIN, DAB])
    unit: Tensor = (dyes / dyes.norm(dim=1, keepdim=True)).T
    return unit


def _mix_channels(x: Tensor, mix: Tensor, shift: Tensor) -> Tensor:
    """Each px's three values times a matrix of its picture, plus a shift; channels_last stays so."""
    n, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(n, height * width, 3)
    done = torch.baddbmm(shift.transpose(1, 2).to(rows), rows, mix.transpose(1, 2).to(rows))
    return done.view(n, height, width, 3).permute(0, 3, 1, 2)


def _change_light(x: Tensor, a: Augment, g: Generator) -> Tensor:
    """Saturation, contrast and brightness are one affine change; then gamma."""
    if not (a.brightness or a.contrast or a.saturation or a.gamma):
        return x
    n, device = len(x), x.device
    grey = torch.tensor(_GREY).expand(3, 3)
    keep = torch.exp(normal(g, (n, 1, 1), a.saturation))
    gain = torch.exp(normal(g, (n, 1, 1), a.contrast))
    mix = gain * (keep * torch.eye(3) + (1.0 - keep) * grey)
    mean = x.mean((1, 2, 3)).view(n, 1, 1)
    shift = mean * (1.0 - gain).to(device) + normal(g, (n, 1, 1), a.brightness).to(device)
    power = torch.exp(normal(g, (n, 1, 1, 1), a.gamma)).to(device)
    done = _mix_channels(x, mix, shift.expand(n, 3, 1)).clamp_(1e-4, 1.0)
    return done.pow_(power) if a.gamma else done


def _apply_to_some(x: Tensor, share: float, g: Generator, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change`` of a drawn share of the pictures."""
    which = torch.nonzero(coin(g, len(x), share).flatten()).flatten()
    if not len(which):
        return x
    there = which.to(x.device)
    return x.index_copy(0, there, change(x[there]).to(x.dtype))


def _gaussian_blur(x: Tensor, a: Augment, g: Generator) -> Tensor:
    """Gaussian, of one drawn width for the batch."""
    if not a.blur or not a.blur_width:
        return x
    width = float(uniform(g, (1,), 0.25 * a.blur_width, a.blur_width))
    reach = max(1, min(round(2.5 * width), min(x.shape[-2:]) - 1))
    t = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (t / width) ** 2)
    kernel = (kernel / kernel.sum()).to(x)

    def change(some: Tensor) -> Tensor:
        wide = functional.pad(some, (reach, reach, reach, reach), mode="reflect")
        rows = functional.conv2d(wide, kernel.view(1, 1, 1, -1).repeat(3, 1, 1, 1), groups=3)
        return functional.conv2d(rows, kernel.view(1, 1, -1, 1).repeat(3, 1, 1, 1), groups=3)

    return _apply_to_some(x, a.blur, g, change)


def _unsharp_mask(x: Tensor, a: Augment, g: Generator) -> Tensor:
    """Unsharp mask, as many scanners apply it."""
    if not a.sharpen:
        return x

    def change(some: Tensor) -> Tensor:
        soft = functional.avg_pool2d(functional.pad(some, (1, 1, 1, 1), mode="replicate"), 3, 1)
        amount = uniform(g, (len(some), 1, 1, 1), 0.3, 1.5).to(some)
        return (some + amount * (some - soft)).clamp_(0.0, 1.0)

    return _apply_to_some(x, a.sharpen, g, change)


def _add_noise(x: Tensor, a: Augment, g: Generator) -> Tensor:
    """Sensor noise, of a strength drawn for each picture."""
    if not a.noise or not a.noise_level:
        return x

    def change(some: Tensor) -> Tensor:
        noise = torch.randn(some.shape, generator=g) * uniform(g, (len(some), 1, 1, 1), 0.0, a.noise_level)
        return (some + noise.to(some)).clamp_(0.0, 1.0)

    return _apply_to_some(x, a.noise, g, change)
