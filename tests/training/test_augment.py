"""Augmentation is exact where it is off and in range where it is on; stains look like stains, nuclei stay darker."""

from __future__ import annotations

import runpy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from wsi_mmm.errors import ConfigError
from wsi_mmm.training import augment
from wsi_mmm.training.augment import EOSIN, HEMATOXYLIN, NO_AUGMENT, Augment, from_od, recolour, to_od

STRONG = Augment(1.0, 0.3, 0.3, 0.5, 0.5, 0.5, blur=1.0, sharpen=1.0, noise=1.0, jpeg=1.0)
ONE = {
    "stain": 1.0, "hed": 0.3, "brightness": 0.3, "contrast": 0.4, "gamma": 0.4, "saturation": 0.5, "blur": 1.0,
    "sharpen": 1.0, "noise": 1.0, "jpeg": 1.0,
}  # fmt: skip


def tissue(n: int = 8, size: int = 48) -> Tensor:
    """Smooth H&E-like pictures in [0, 1], channels_last."""
    rng = np.random.default_rng(0)
    amounts = torch.from_numpy(rng.random((n, 2, 6, 6), np.float32))
    amounts = torch.nn.functional.interpolate(amounts, size=size, mode="bilinear")
    dyes = torch.tensor([HEMATOXYLIN, EOSIN])
    x = from_od(torch.einsum("nkhw,kc->nchw", amounts, dyes))
    return x.contiguous(memory_format=torch.channels_last)


def test_off_is_off() -> None:
    """Nothing asked for: the very tensor that came in. So with every share and strength 0, whatever the widths."""
    x = tissue()
    assert recolour(x, NO_AUGMENT, seed=1) is x
    assert torch.equal(recolour(x, replace(NO_AUGMENT, blur_width=9.0), seed=1), x)
    assert all(getattr(NO_AUGMENT, f.name) == 0 for f in fields(NO_AUGMENT) if f.name in ONE)


@pytest.mark.parametrize("name", ONE)
def test_each_change_alone(name: str) -> None:
    """Each does something, stays in [0, 1], is a function of the seed, and leaves the input as it was."""
    x = tissue()
    before, augment = x.clone(), replace(NO_AUGMENT, **{name: ONE[name]})
    one = recolour(x, augment, seed=7)
    assert torch.equal(x, before) and one.shape == x.shape and one.dtype == x.dtype
    assert float(one.min()) >= 0.0 and float(one.max()) <= 1.0
    assert torch.equal(one, recolour(x, augment, seed=7))
    changed = (one - x).abs().mean((1, 2, 3))
    assert (changed > 1e-4).all()
    assert not torch.equal(one, recolour(x, augment, seed=8))


def test_all_together_stay_finite() -> None:
    """White, black and noise through everything at once; channels_last stays channels_last."""
    x = torch.cat([torch.ones(2, 3, 32, 32), torch.zeros(2, 3, 32, 32), torch.rand(4, 3, 32, 32)])
    for seed in range(5):
        y = recolour(x, STRONG, seed=seed)
        assert torch.isfinite(y).all() and float(y.min()) >= 0.0 and float(y.max()) <= 1.0
    kept = recolour(tissue(), replace(Augment(), blur=0.0, sharpen=0.0, noise=0.0), seed=0)
    assert kept.is_contiguous(memory_format=torch.channels_last)


def test_shares_are_shares() -> None:
    """About a third of 300 pictures are blurred, the others are as they were."""
    x = torch.rand(300, 3, 8, 8)
    changed = (recolour(x, replace(NO_AUGMENT, blur=0.33), seed=3) != x).flatten(1).any(1)
    assert 0.23 < float(changed.float().mean()) < 0.43


def test_pictures_differ() -> None:
    """Each picture of a batch is changed in its own way."""
    x = tissue(1).repeat(6, 1, 1, 1)
    y = recolour(x, replace(NO_AUGMENT, stain=1.0, brightness=0.1), seed=0).flatten(1)
    assert len({tuple(row[:5].tolist()) for row in y}) == 6


def test_hed_scales_each_dye_by_itself() -> None:
    """Pure hematoxylin keeps its hue, but for a shift that is the same for every px, and gets deeper or paler."""
    amounts = torch.linspace(0.2, 1.2, 16)
    unit = torch.tensor(HEMATOXYLIN) / torch.tensor(HEMATOXYLIN).norm()
    x = from_od(amounts.view(1, 1, 4, 4) * unit.view(1, 3, 1, 1))
    slopes = []
    for seed in range(12):
        od = to_od(recolour(x, replace(NO_AUGMENT, hed=0.2), seed=seed)).view(3, 16)
        inside = (od > 0.02).all(0) & (od < 5).all(0)
        step = (od[:, inside][:, -1] - od[:, inside][:, 0]) / (amounts[inside][-1] - amounts[inside][0])
        assert torch.allclose(step / step.norm(), unit, atol=0.03)
        slopes.append(float(step.norm()))
    assert 0.78 < min(slopes) < 0.95 and 1.05 < max(slopes) < 1.22


def test_saturation_keeps_grey_grey() -> None:
    """Grey has no saturation to lose or gain; colour has."""
    grey = torch.linspace(0.1, 0.9, 64).view(1, 1, 8, 8).repeat(2, 3, 1, 1)
    augment = replace(NO_AUGMENT, saturation=0.5)
    assert torch.allclose(recolour(grey, augment, seed=0), grey, atol=1e-5)
    spread = recolour(tissue(), augment, seed=0).std(1).mean((1, 2)) / tissue().std(1).mean((1, 2))
    assert float(spread.min()) < 0.9 and float(spread.max()) > 1.1


def test_what_makes_no_sense_is_refused() -> None:
    """Shares beyond 1, negative or absurd strengths, JPEG away from the CPU."""
    for bad in ({"blur": 1.5}, {"stain": -1.0}, {"contrast": 50.0}, {"gamma": float("nan")}):
        with pytest.raises(ConfigError):
            Augment(**bad)
    with pytest.raises(ConfigError, match="jpeg"):
        recolour(torch.empty(1, 3, 8, 8, device="meta"), Augment(jpeg=0.5), seed=0)


@pytest.mark.gpu
def test_a_gpu_gets_the_same_numbers() -> None:
    """CUDA and CPU agree to rounding."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    augment = replace(STRONG, jpeg=0.0)
    there = recolour(tissue().cuda(), augment, seed=3).cpu()
    assert torch.allclose(there, recolour(tissue(), augment, seed=3), atol=1e-4)


# ---------------------------------------------------------------- stains and made pictures


stains = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "pipelines/default/stains.py")))


def picture(seed: int) -> tuple[Tensor, Tensor]:
    """Dark discs on a light ground: float[1, 3, 96, 96] and where they are, float[1, 1, 96, 96]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96]
    inside = np.zeros((96, 96), np.bool_)
    for _ in range(12):
        inside |= (y - rng.uniform(0, 96)) ** 2 + (x - rng.uniform(0, 96)) ** 2 < 64
    pixels = np.where(inside[..., None], (90, 60, 140), (220, 190, 225)).astype(np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None], torch.from_numpy(inside).float()[None, None]


def test_restaining_keeps_nuclei_darker_than_their_ground() -> None:
    """Whatever colours are drawn, nuclei keep more optical density than the background on average."""
    one, where = picture(4)
    x, mask = one.repeat(16, 1, 1, 1), where.repeat(16, 1, 1, 1)
    od = augment.to_od(augment.restain(x, mask, Generator().manual_seed(0))).mean(1, keepdim=True)
    inside, outside = (
        (od * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)),
        (od * (1 - mask)).sum((1, 2, 3)) / (1 - mask).sum((1, 2, 3)),
    )
    assert float((inside > outside).float().mean()) > 0.8


def test_where_no_red_light_is_lost_there_is_no_nucleus() -> None:
    """Background that is sure is never inside a dark disc, and is most of what lies between them."""
    one, where = picture(1)
    known = stains.surely_background(one[0])
    assert not (known & (where[0, 0] > 0)).any()
    assert float(known[where[0, 0] == 0].float().mean()) > 0.5


def test_other_stains_are_made_of_tissue() -> None:
    """Giemsa is blue, IHC keeps what was light light; the same generator gives the same picture."""
    one, where = picture(2)
    blue = stains.as_giemsa(one, Generator().manual_seed(1))
    assert float(blue[:, 2].mean()) > float(blue[:, 0].mean())
    brown = stains.as_ihc(one, Generator().manual_seed(1))
    assert torch.equal(brown, stains.as_ihc(one, Generator().manual_seed(1)))
    ground = where.expand_as(brown) == 0
    assert float(brown[ground].mean()) > float(brown[~ground].mean())


def test_odd_pictures_are_in_range_and_of_several_kinds() -> None:
    """Values in [0, 1]; some surely show no nuclei, others may."""
    one, _ = picture(3)
    g = Generator().manual_seed(0)
    made = [stains.odd_picture(one[0], g) for _ in range(40)]
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 and x.shape == one[0].shape for x, _ in made)
    assert 0 < sum(empty for _, empty in made) < 40
