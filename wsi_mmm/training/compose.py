"""From draws to a batch: cut, turn, scale, recolour, and make every task's target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor
from torch.nn import functional

from wsi_mmm.tasks import Task
from wsi_mmm.training import augment, stains
from wsi_mmm.training.sampler import Draw, Warp
from wsi_mmm.training.sources import LabelledImage, StainedTile
from wsi_mmm.types import F32, I32, Mask

MARGIN = 32  # px of labels read round a crop, so that objects cut by its rim keep their true centre
UNKNOWN = -1
RESTAINED = 0.35  # of the nuclei crops get new H&E-like colours
WEAK = (0, 1)  # stain classes (H&E, IHC) in whose tiles px without hematoxylin are taken for background
EDGE_SHARE = 0.25  # of the crops lie at the edge of a slide


@dataclass(frozen=True, slots=True)
class Picture:
    """Ready to be cut: ``levels`` float[1, 3, h, w] at scales 1, 1/2, 1/4; ``labels`` int32[h, w] or None."""

    levels: tuple[Tensor, ...]
    labels: I32 | None


@dataclass(frozen=True, slots=True)
class Batch:
    """``pixels`` float[n, 3, s, s] in [0, 1]; ``targets``: task -> stacked targets, unknown where there is no truth."""

    pixels: Tensor
    targets: dict[str, Tensor]


def picture_of(source: LabelledImage | StainedTile) -> Picture:
    """Pixels as a small pyramid, so that scaling down does not alias."""
    full = torch.from_numpy(np.ascontiguousarray(source.pixels)).permute(2, 0, 1)[None].float() / 255.0
    labels = source.labels if isinstance(source, LabelledImage) else None
    return Picture((full, functional.avg_pool2d(full, 2), functional.avg_pool2d(full, 4)), labels)


def places(warp: Warp, shape: tuple[int, int], size: int, margin: int = 0) -> tuple[F32, npt.NDArray[np.int32]]:
    """Where crop px lie in a picture of ``shape``: (x, y) float32[s, s, 2], mirrored at its rims, and the mirror image.

    s = size + 2 margin. Equal mirror numbers int32[s, s] (0: the picture itself) belong to one copy of the picture.
    """
    height, width = shape
    half_x = min(size / 2 / warp.zoom_x, width / 2)
    half_y = min(size / 2 / warp.zoom_y, height / 2)
    centre = (half_x + warp.centre_x * (width - 2 * half_x), half_y + warp.centre_y * (height - 2 * half_y))
    line = (np.arange(-margin, size + margin, dtype=np.float32) + 0.5) - size / 2
    x, y = line[None, :] * (warp.flip / warp.zoom_x), line[:, None] / warp.zoom_y
    cos, sin = math.cos(warp.angle), math.sin(warp.angle)
    fx, mx = _fold(cos * x - sin * y + centre[0], width)
    fy, my = _fold(sin * x + cos * y + centre[1], height)
    return np.stack([fx, fy], axis=-1).astype(np.float32), mx + 64 * my


def _fold(t: npt.NDArray[np.floating], length: int) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.int32]]:
    """Mirror ``t`` into [0, length); number of the mirror image (0 inside)."""
    number = np.floor(t / length).astype(np.int32)
    inside = t - number * length
    return np.where(number % 2 == 0, inside, length - inside), number


def cut_pixels(picture: Picture, warp: Warp, size: int) -> Tensor:
    """float[3, size, size]."""
    height, width = picture.levels[0].shape[-2:]
    where, _ = places(warp, (height, width), size)
    unit = torch.from_numpy(where / np.array([width, height], np.float32) * 2.0 - 1.0)[None]
    zoom = min(warp.zoom_x, warp.zoom_y)
    level = picture.levels[0 if zoom > 0.7 else 1 if zoom > 0.35 else 2]
    return functional.grid_sample(level, unit, mode="bilinear", padding_mode="border", align_corners=False)[0]


def cut_labels(labels: I32, warp: Warp, size: int) -> I32:
    """int32[size + 2 MARGIN, ...]: nearest labels; mirror images get labels of their own."""
    height, width = labels.shape
    where, mirror = places(warp, (height, width), size, MARGIN)
    x = np.clip(where[..., 0].astype(np.int64), 0, width - 1)
    y = np.clip(where[..., 1].astype(np.int64), 0, height - 1)
    found = labels[y, x]
    return np.where(found > 0, found + 4096 * (mirror + 2048), 0).astype(np.int32)


def beyond_slide(g: Generator, size: int) -> Mask:
    """bool[s, s], s = size + 2 MARGIN: the part of a crop that lies beyond the slide's edge; mostly none.

    There tiles are padded with pure white, a hard line that must not be taken for a nucleus.
    """
    whole = size + 2 * MARGIN
    out = np.zeros((whole, whole), np.bool_)
    chance, share, side = torch.rand(3, generator=g).tolist()
    if chance < EDGE_SHARE:
        out[: MARGIN + int(0.6 * size * share)] = True
    return np.ascontiguousarray(np.rot90(out, int(side * 4)))


class Composer:
    """Makes batches for the tasks ``nuclei`` (instances) and ``stain`` (classify) out of pictures held in memory."""

    def __init__(
        self, nuclei: Sequence[LabelledImage], tiles: Sequence[StainedTile], *, tasks: Mapping[str, Task], size: int
    ) -> None:
        self.nuclei = [picture_of(image) for image in nuclei]
        self.tiles = [picture_of(tile) for tile in tiles]
        self.stains = [tile.stain for tile in tiles]
        self.tasks = tasks
        self.size = size

    def batch(self, draws: Sequence[Draw], generator: Generator) -> Batch:
        """Cut, recolour and label the draws; nuclei draws come first."""
        some = [d for d in draws if d.kind == "nuclei"]
        rest = [d for d in draws if d.kind != "nuclei"]
        labels = [cut_labels(_labels(self.nuclei[d.picture]), d.warp, self.size) for d in some]
        tiles, empty = self._stains(rest, generator)
        plain = [
            stains.surely_background(tile) if d.stain in WEAK else None for tile, d in zip(tiles, rest, strict=True)
        ]
        tiles = augment.stain_jitter(tiles, generator, 0.45)
        pixels = augment.camera(torch.cat([self._nuclei(some, labels, generator), tiles]), generator)
        beyond = [beyond_slide(generator, self.size) for _ in draws]
        for picture, white in zip(pixels, beyond, strict=True):
            picture[:, torch.from_numpy(white[MARGIN:-MARGIN, MARGIN:-MARGIN])] = 1.0
        labels = [np.where(white, 0, label) for label, white in zip(labels, beyond, strict=False)]
        nothing = np.zeros((self.size, self.size), np.int32)
        truths = [self._target(label) for label in labels]
        truths += [self._weak(nothing, none, known) for none, known in zip(empty, plain, strict=True)]
        stain = [self.tasks["stain"].target(d.stain) for d in draws]
        return Batch(pixels, {"nuclei": torch.stack(truths), "stain": torch.stack(stain)})

    def _weak(self, nothing: I32, empty: bool, known: Tensor | None) -> Tensor:
        """Pictures without labels: all background, or background where that is sure, or nothing known."""
        target = self.tasks["nuclei"].target(nothing if empty or known is not None else nothing + UNKNOWN)
        if known is not None and not empty:
            share = functional.avg_pool2d(known[None].float(), self.tasks["nuclei"].stride)[0]
            target[0] = torch.where(share > 0.99, target[0], torch.nan)
        return target

    def _target(self, labels: I32) -> Tensor:
        """Made with the margin, then cut to the crop."""
        rim = MARGIN // self.tasks["nuclei"].stride
        return self.tasks["nuclei"].target(labels)[:, rim:-rim, rim:-rim]

    def _nuclei(self, draws: Sequence[Draw], labels: Sequence[I32], g: Generator) -> Tensor:
        pixels = torch.stack([cut_pixels(self.nuclei[d.picture], d.warp, self.size) for d in draws])
        inner = np.stack([label[MARGIN:-MARGIN, MARGIN:-MARGIN] > 0 for label in labels])
        mask = torch.from_numpy(inner).float()[:, None]
        chosen = torch.rand(len(draws), generator=g) < RESTAINED
        if bool(chosen.any()):
            pixels[chosen] = augment.restain(pixels[chosen], mask[chosen], g)
        return augment.stain_jitter(pixels, g, 1.0)

    def _stains(self, draws: Sequence[Draw], g: Generator) -> tuple[Tensor, list[bool]]:
        """Pictures of the stain task, and which of them surely show no nuclei."""
        made = [self._stain(draw, g) for draw in draws]
        if not made:
            return torch.zeros(0, 3, self.size, self.size), []
        return torch.stack([x for x, _ in made]), [empty for _, empty in made]

    def _stain(self, draw: Draw, g: Generator) -> tuple[Tensor, bool]:
        """A tile as it is; sometimes an IHC or Giemsa picture is made of another tile (there is one slide of each)."""
        tile = cut_pixels(self.tiles[draw.picture], draw.warp, self.size)
        if draw.kind == "odd":
            return stains.odd_picture(tile, g)
        recolour = {1: stains.as_ihc, 2: stains.as_giemsa}.get(draw.stain)
        if recolour is None or float(torch.rand(1, generator=g)) > 0.4:
            return tile, False
        he = [i for i, stain in enumerate(self.stains) if stain == 0]
        other = he[int(torch.randint(0, len(he), (1,), generator=g))]
        return recolour(cut_pixels(self.tiles[other], draw.warp, self.size)[None], g)[0], False


def _labels(picture: Picture) -> I32:
    assert picture.labels is not None, "nuclei pictures carry labels"
    return picture.labels
