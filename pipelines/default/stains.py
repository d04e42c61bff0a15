"""Pictures of stains that the slides at hand do not show enough of, and of things that are no stained tissue at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional

from wsi_mmm.training.augment import DAB, EOSIN, HEMATOXYLIN, from_od, noise_field, stain_vector, to_od, uniform

BACKGROUND_OD = (0.2, 0.45)


def as_ihc(x: Tensor, g: Generator) -> Tensor:
    """H&E float[n, 3, h, w] recoloured as hematoxylin and DAB: eosin becomes brown."""
    basis = torch.tensor([HEMATOXYLIN, EOSIN])
    basis = (basis / basis.norm(dim=1, keepdim=True)).T
    amounts = torch.einsum("ij,njhw->nihw", torch.linalg.pinv(basis), to_od(x)).clamp_min(0.0)
    n = len(x)
    blue, brown = stain_vector(g, n, (0.72, 0.62, 0.33), 0.06), stain_vector(g, n, DAB, 0.06)
    counter, marker = uniform(g, (n, 1, 1, 1), 0.4, 1.0), uniform(g, (n, 1, 1, 1), 0.3, 1.3)
    return from_od(amounts[:, :1] * blue * counter + amounts[:, 1:] * brown * marker)


def as_giemsa(x: Tensor, g: Generator) -> Tensor:
    """Any tissue float[n, 3, h, w] recoloured in blues."""
    n = len(x)
    dye = stain_vector(g, n, (0.85, 0.62, 0.16), 0.10)
    return from_od(to_od(x).mean(1, keepdim=True) * dye * uniform(g, (n, 1, 1, 1), 1.2, 2.4))


def surely_background(tile: Tensor) -> Tensor:
    """bool[s, s] of a tile float[3, s, s]: where little red light is absorbed there is no hematoxylin, so no nucleus.

    Glass, eosin and connective tissue let red pass; nuclei do not. "Little" is an optical density, averaged over 5 px,
    below a third of the darkest in the tile, within `BACKGROUND_OD`: scanners and sections differ in depth.
    """
    red = to_od(tile[None, :1])
    mean = functional.avg_pool2d(functional.pad(red, (2, 2, 2, 2), mode="replicate"), 5, 1)[0, 0]
    known: Tensor = mean < (0.35 * mean.quantile(0.97)).clamp(*BACKGROUND_OD)
    return known


def odd_picture(tile: Tensor, g: Generator) -> tuple[Tensor, bool]:
    """float[3, s, s] made of a tile float[3, s, s] or of nothing, and whether it surely shows no nuclei.

    Glass and ink show none; negatives, greys, fluorescence, blur and wrong hues may.
    """
    make = _ODD[int(torch.randint(0, len(_ODD), (1,), generator=g))]
    return make(tile, g).clamp(0.0, 1.0), make in (_draw_glass, _draw_ink)


def _draw_glass(tile: Tensor, g: Generator) -> Tensor:
    size = int(tile.shape[-1])
    grey = uniform(g, (1, 1, 1), 0.80, 1.0) + uniform(g, (3, 1, 1), -0.03, 0.03)
    sheet = grey + 0.012 * torch.randn((3, size, size), generator=g) + 0.015 * noise_field(g, 1, size, 80.0)[0]
    dust = torch.sigmoid((noise_field(g, 1, size, 20.0)[0] - uniform(g, (1,), 2.0, 5.0)) * 6.0)
    return sheet * (1.0 - 0.6 * dust)


def _invert_tile(tile: Tensor, g: Generator) -> Tensor:
    return 1.0 - tile


def _grey_tile(tile: Tensor, g: Generator) -> Tensor:
    return tile.mean(0, keepdim=True).repeat(3, 1, 1)


def _fluorescence_tile(tile: Tensor, g: Generator) -> Tensor:
    return (1.0 - tile.mean(0, keepdim=True)).square() * uniform(g, (3, 1, 1), 0.0, 1.2)


def _draw_ink(tile: Tensor, g: Generator) -> Tensor:
    size = int(tile.shape[-1])
    stroke = noise_field(g, 1, size, 90.0, 3.0)[0] - uniform(g, (1,), -1.0, 0.6)
    mask = torch.sigmoid(stroke * 20.0)
    sheet = 0.95 * (1.0 - mask) + mask * uniform(g, (3, 1, 1), 0.0, 0.75)
    return sheet + 0.01 * torch.randn((3, size, size), generator=g)


def _out_of_focus(tile: Tensor, g: Generator) -> Tensor:
    soft = tile[None]
    for _ in range(3):
        soft = functional.avg_pool2d(functional.pad(soft, (7, 7, 7, 7), mode="reflect"), 15, 1)
    return soft[0]


def _wrong_hue(tile: Tensor, g: Generator) -> Tensor:
    orders = torch.tensor([[1, 0, 2], [2, 0, 1], [1, 2, 0]])
    return tile[orders[int(torch.randint(0, 3, (1,), generator=g))]]


_ODD: tuple[Callable[[Tensor, Generator], Tensor], ...] = (
    _draw_glass, _draw_glass, _invert_tile, _grey_tile, _fluorescence_tile, _draw_ink, _out_of_focus, _wrong_hue,
)  # fmt: skip
