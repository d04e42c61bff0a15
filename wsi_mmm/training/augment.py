"""Augmentation of colour, focus and noise, on batches where they are; stains, textures and new colours for nuclei.

Images are float[n, 3, h, w] in [0, 1]; every function draws from the generator that it is given and from nothing else.
What is random is drawn on the CPU from the batch's own seed and then moved: a CPU and a GPU get the same numbers, and a
batch that is made again is augmented as before. Changes are computed for the chosen pictures only.
Optical density (OD) is -ln(intensity), the space in which stains add up (Beer-Lambert; Ruifrok & Johnston 2001).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

from wsi_mmm.errors import ConfigError

HEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.15, 0.92, 0.36)
DAB = (0.27, 0.57, 0.78)
_FLOOR = 1.0 / 255.0
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

    Raises ConfigError for JPEG on another device than the CPU.
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
        soft = _soften(some)
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


def jpeg(x: Tensor, g: Generator, share: float) -> Tensor:
    """JPEG at a drawn quality of 35 to 90, as slides come."""
    picked = torch.rand(len(x), generator=g) < share
    quality = torch.randint(35, 91, (len(x),), generator=g)
    out = x.clone()
    for i in torch.nonzero(picked).flatten().tolist():
        out[i] = _through_jpeg(x[i], int(quality[i]))
    return out


def _through_jpeg(x: Tensor, quality: int) -> Tensor:
    pixels = (x * 255.0 + 0.5).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0


# ---------------------------------------------------------------- draws, densities, stains


def uniform(g: Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """float tensor of draws from [low, high)."""
    return torch.rand(shape, generator=g) * (high - low) + low


def normal(g: Generator, shape: tuple[int, ...], sigma: float) -> Tensor:
    """float tensor of normal draws with mean 0."""
    return torch.randn(shape, generator=g) * sigma


def coin(g: Generator, n: int, share: float) -> Tensor:
    """bool[n, 1, 1, 1], true with probability ``share``."""
    return (torch.rand(n, generator=g) < share).view(n, 1, 1, 1)


def to_od(x: Tensor) -> Tensor:
    """Intensity in [0, 1] -> optical density in [0, 5.5]."""
    return -torch.log(x.clamp(_FLOOR, 1.0))


def from_od(od: Tensor) -> Tensor:
    """Optical density -> intensity in [0, 1]."""
    return torch.exp(-od.clamp(0.0, 8.0))


def stain_vector(g: Generator, n: int, base: tuple[float, float, float], sigma: float) -> Tensor:
    """float[n, 3, 1, 1]: unit OD vectors scattered round ``base``."""
    v = torch.tensor(base) + normal(g, (n, 3), sigma)
    v = v.clamp_min(0.02)
    unit: Tensor = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return unit.view(n, 3, 1, 1)


def noise_field(g: Generator, n: int, size: int, cells: float, stretch: float = 1.0) -> Tensor:
    """float[n, 1, size, size]: smooth random fields of mean 0 and deviation about 1, ``cells`` px wide.

    ``stretch`` > 1 draws them out along one random direction per image (fibres).
    """
    grid = max(4, math.ceil(2.0 * size / cells))
    coarse = torch.randn((n, 1, grid, grid), generator=g)
    angle = uniform(g, (n,), 0.0, math.pi)
    c, s = torch.cos(angle), torch.sin(angle)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = 0.45 * c / stretch, 0.45 * s / stretch
    theta[:, 1, 0], theta[:, 1, 1] = -0.45 * s, 0.45 * c
    where = functional.affine_grid(theta, [n, 1, size, size], align_corners=False)
    field: Tensor = functional.grid_sample(
        coarse, where, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return field


def restain(x: Tensor, foreground: Tensor, g: Generator) -> Tensor:
    """Give nuclei and background new H&E-like colours, texture and gaps; ``foreground`` float[n, 1, h, w] in [0, 1].

    The mean OD of either side is moved to a drawn one (background: eosin and a little hematoxylin; nuclei: that and
    more hematoxylin) while the structure round the mean is kept, so nuclei of any stain become nuclei of H&E.
    """
    n, size = len(x), int(x.shape[-1])
    one = (n, 1, 1, 1)
    od, inside = to_od(x), _soften(foreground)  # a rim of about a px, so that recolouring leaves no knife edge
    outside = 1.0 - inside
    mean_out, mean_in = _side_means(od, inside)
    blue, pink = stain_vector(g, n, HEMATOXYLIN, 0.10), stain_vector(g, n, EOSIN, 0.09)
    scale = uniform(g, one, 0.45, 1.0)
    amount, haze = uniform(g, one, 0.05, 1.3) * scale, uniform(g, one, 0.0, 0.45) * scale
    ground = _draw_texture(g, size, eosin=(amount, pink), haze=(haze, blue))
    depth = uniform(g, one, 0.6, 1.9) * scale
    nuclei = depth * blue + uniform(g, one, 0.3, 1.0) * amount * pink
    gain_out, gain_in = uniform(g, one, 0.3, 1.3), uniform(g, one, 0.5, 1.5) * (depth / 1.2).clamp(0.3, 1.2)
    return from_od((ground + gain_out * (od - mean_out)) * outside + (nuclei + gain_in * (od - mean_in)) * inside)


def _side_means(od: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Mean OD float[n, 3, 1, 1] of background and of nuclei (background + 0.5 where there are hardly any)."""
    outside = 1.0 - inside
    mean_out = (od * outside).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True).clamp_min(1.0)
    weight = inside.sum((2, 3), keepdim=True)
    mean_in = (od * inside).sum((2, 3), keepdim=True) / weight.clamp_min(1.0)
    return mean_out, torch.where(weight > 20.0, mean_in, mean_out + 0.5)


def _soften(x: Tensor) -> Tensor:
    """The mean of 3 x 3 px round each px."""
    return functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _draw_texture(g: Generator, size: int, *, eosin: tuple[Tensor, Tensor], haze: tuple[Tensor, Tensor]) -> Tensor:
    """Background OD float[n, 3, size, size]: fibres and clouds of eosin, haze of hematoxylin, white gaps, red cells.

    ``eosin`` and ``haze``: how much of it, and its OD vector.
    """
    (amount, pink), (mist, blue) = eosin, haze
    n = len(amount)
    cells, stretch = float(uniform(g, (1,), 5.0, 30.0)), float(uniform(g, (1,), 1.0, 5.0))
    fibre, cloud = noise_field(g, n, size, cells, stretch), noise_field(g, n, size, 60.0)
    rough = uniform(g, (n, 1, 1, 1), 0.0, 0.45)
    dye = amount * (1.0 + rough * fibre + 0.25 * cloud).clamp_min(0.05)
    ground = dye * pink + mist * (1.0 + 0.5 * noise_field(g, n, size, 25.0)).clamp_min(0.0) * blue
    gaps = torch.sigmoid((noise_field(g, n, size, cells * 2.0, stretch) - uniform(g, (n, 1, 1, 1), 0.6, 3.0)) * 8.0)
    red = torch.sigmoid((noise_field(g, n, size, 12.0) - uniform(g, (n, 1, 1, 1), 1.5, 4.5)) * 8.0)
    ground = ground * (1.0 - red) + red * pink * uniform(g, (n, 1, 1, 1), 0.5, 1.5)
    return ground * (1.0 - gaps) + 0.03 * gaps
