"""Stains as optical densities, textures, and new colours for nuclei: what augmentation and made pictures build on.

Images are float[n, 3, h, w] in [0, 1]; every function draws from the generator it is given and from nothing else.
Optical density (OD) is -ln(intensity), the space in which stains add up (Beer-Lambert; Ruifrok & Johnston 2001).
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

HEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.15, 0.92, 0.36)
DAB = (0.27, 0.57, 0.78)
_FLOOR = 1.0 / 255.0


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
    od, inside = to_od(x), _soften_mask(foreground)
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


def _soften_mask(foreground: Tensor) -> Tensor:
    """The mask with a rim of about a pixel, so that recolouring leaves no knife edge."""
    return functional.avg_pool2d(functional.pad(foreground, (1, 1, 1, 1), mode="replicate"), 3, 1)


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
