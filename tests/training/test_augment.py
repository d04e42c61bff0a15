"""Recolouring: nuclei stay darker than their ground, stains become those of others, odd pictures are odd."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Generator, Tensor

from wsi_mmm.training import augment

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
