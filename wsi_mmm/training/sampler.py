"""What a training step looks at: a pure function of (seed, step). It chooses, and reads nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["nuclei", "tile", "odd"]
SMALL, LARGE = 0.17, 1.7  # zooms beyond these show nothing that could be learnt


@dataclass(frozen=True, slots=True)
class Warp:
    """Crop px -> picture px: picture = centre + R(angle) . diag(flip / zoom_x, 1 / zoom_y) . (crop - size / 2).

    ``centre_x``, ``centre_y``: where in the range of possible centres, 0 to 1.
    """

    zoom_x: float
    zoom_y: float
    angle: float
    flip: int
    centre_x: float
    centre_y: float


@dataclass(frozen=True, slots=True)
class Draw:
    """One picture of a batch: number ``picture`` of its ``kind``, how it is cut out, and its ``stain`` class or -1."""

    kind: Kind
    picture: int
    warp: Warp
    stain: int = -1


@dataclass(frozen=True, slots=True)
class Shelf:
    """What there is to draw from: radii of the nuclei images, and the tile numbers of each stain class."""

    radii: tuple[float, ...]
    tiles: tuple[tuple[int, ...], ...]
    radius: float = 7.0  # px: what nuclei measure at the model's mpp


@dataclass(frozen=True, slots=True)
class Mix:
    """How many crops of each sort are in a batch."""

    nuclei: int = 14
    tiles: int = 4


def rng_of(seed: int, step: int) -> np.random.Generator:
    """The generator of a step."""
    return np.random.default_rng([seed, step])


def draw(seed: int, step: int, shelf: Shelf, mix: Mix) -> list[Draw]:
    """The batch of ``step``: nuclei crops first, then tiles and odd pictures. Equal arguments give equal draws."""
    rng = rng_of(seed, step)
    chosen = [_nuclei(rng, shelf) for _ in range(mix.nuclei)]
    return chosen + [_tile(rng, shelf) for _ in range(mix.tiles)]


def _nuclei(rng: np.random.Generator, shelf: Shelf) -> Draw:
    """Half of the crops are scaled to the radius of nuclei at the model's mpp, half stay near their own scale."""
    picture = int(rng.integers(len(shelf.radii)))
    if rng.random() < 0.5:
        zoom = shelf.radius * math.exp(0.32 * rng.standard_normal()) / shelf.radii[picture]
    else:
        zoom = math.exp(0.22 * rng.standard_normal())
    return Draw("nuclei", picture, _warp(rng, min(max(zoom, SMALL), LARGE), turn=rng.random() < 0.5))


def _tile(rng: np.random.Generator, shelf: Shelf) -> Draw:
    """Stains get a third of the draws each two out of three times; otherwise an odd picture is made of some tile."""
    other = len(shelf.tiles)
    stain = (0, 0, 1, 2, 3, 3)[int(rng.integers(6))] if other == 3 else int(rng.integers(other + 1))
    kind: Kind = "tile" if stain < other else "odd"
    numbers = shelf.tiles[stain] if stain < other else tuple(n for some in shelf.tiles for n in some)
    zoom = math.exp(rng.uniform(-0.6, 0.6))
    return Draw(kind, int(numbers[int(rng.integers(len(numbers)))]), _warp(rng, zoom, turn=False), stain)


def _warp(rng: np.random.Generator, zoom: float, *, turn: bool) -> Warp:
    """``turn``: any angle; else quarters of a circle."""
    angle = rng.random() * 2 * math.pi if turn else int(rng.integers(4)) * math.pi / 2
    stretch = np.exp(0.08 * rng.standard_normal(2))
    x, y = rng.random(2)
    return Warp(
        zoom * float(stretch[0]), zoom * float(stretch[1]), angle, 1 if rng.random() < 0.5 else -1, float(x), float(y)
    )
