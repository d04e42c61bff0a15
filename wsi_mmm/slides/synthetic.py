"""Drawing an H&E-like picture from a seed: tissue with an organic outline, stroma, lumens, pale parts, and nuclei.

Colours follow Beer-Lambert: light is dimmed by haematoxylin (absorbances of Ruifrok and
Johnston, 2001) and eosin (a little more blue absorbed than theirs, as measured on scanned H&E).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from wsi_mmm.types import F32, F64, U8, Mask

_LIGHT = 244.0
_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
_EOSIN = np.array([0.18, 0.93, 0.40], np.float32)
_BAND = 512
_NOISE = 1024  # side of the noise textures, repeated over the picture
_COARSE = 16  # px per cell of the slowly changing fields
_CORNERS = 48  # vertices of a nucleus
_TOUCHING = 0.3  # share of nuclei placed against another one
_REACH = 1.5  # a nucleus is painted, with its cytoplasm, up to this many radii


@dataclass(frozen=True, slots=True)
class SyntheticNuclei:
    """The nuclei of a synthetic slide, level-0 px; polygons are in continuous coordinates (pixel i covers [i, i + 1)).

    ``centers`` [n, 2] (x, y); ``radii`` [n, 2] (long, short); ``angles`` [n] radians; ``polygons`` [n, 48, 2] outlines
    (not closed); ``touching`` bool[n]: placed against another nucleus.
    """

    centers: F64
    radii: F64
    angles: F64
    polygons: F64
    touching: Mask


@dataclass(frozen=True, slots=True)
class _Scene:
    """Slow fields, one cell per 16 px: ``tissue`` (above 0 inside), ``cells`` density, ``stain``, ``weave``."""

    width: int
    height: int
    tissue: F32
    cells: F32
    stain: F32
    weave: F32


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Nuclei while they are placed: bumps are the amplitudes and phases of the outline's 2nd to 4th harmonics."""

    centers: F64
    radii: F64
    angles: F64
    bumps: F64
    touching: Mask


def synthetic_image(seed: int, *, width: int, height: int, mpp: float, nuclei: int) -> tuple[U8, SyntheticNuclei]:
    """Return the picture uint8[height, width, 3] and its nuclei; fewer than ``nuclei`` when they do not fit."""
    rng = np.random.default_rng(seed)
    scene = _draw_scene(rng, width, height)
    shapes = _place_nuclei(rng, scene, nuclei, 0.5 / mpp)
    grain = [_smooth_noise(rng, _NOISE, sigma) for sigma in (0.8, (1.6, 4.5), (4.5, 1.6), 3.0)]
    out = np.empty((height, width, 3), np.uint8)
    stains = np.empty((2, height, width), np.float32)
    for y in range(0, height, _BAND):
        _stain_stroma(stains, scene, grain, y)
    for n in range(len(shapes.centers)):
        _stain_nucleus(stains, shapes, n, (grain[0], float(rng.uniform(0.85, 1.35))))
    for y in range(0, height, _BAND):
        out[y : y + _BAND] = _light_through(stains[:, y : y + _BAND], grain[0], y)
    drawn = SyntheticNuclei(shapes.centers, shapes.radii, shapes.angles, _nucleus_outlines(shapes), shapes.touching)
    return out, drawn


def _smooth_noise(rng: np.random.Generator, side: int, sigma: float | tuple[float, float]) -> F32:
    """Return smooth noise [side, side] that repeats, mean 0, deviation 1."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal((side, side), dtype=np.float32), sigma, mode="wrap")
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def _draw_scene(rng: np.random.Generator, width: int, height: int) -> _Scene:
    from scipy.ndimage import zoom

    rows, columns = height // _COARSE + 2, width // _COARSE + 2
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    dx, dy = (x / columns - 0.5) / 0.42, (y / rows - 0.5) / 0.40

    def slow(cells: int) -> F32:
        coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
        fine = zoom(coarse, (rows / cells, columns / cells), order=3)
        return np.asarray(fine[:rows, :columns], np.float32)

    outline = 1 - np.sqrt(dx * dx + dy * dy) + 0.13 * slow(5) + 0.05 * slow(14)
    holes = slow(22) + 0.5 * slow(9)
    tissue = np.minimum(outline * 50, (1.8 - holes) * 8)
    cells = 1 / (1 + np.exp(-2.2 * slow(7) - 1.0 * slow(20)))
    pale = 1 / (1 + np.exp(7 * (dx + dy * 0.6 - 0.75)))
    stain = (0.35 + 0.65 * pale) * (1 + 0.12 * slow(6))
    weave = 1 / (1 + np.exp(-3 * slow(9)))
    return _Scene(width, height, *(np.asarray(f, np.float32) for f in (tissue, cells, stain, weave)))


def _rows_of_field(field: F32, y0: int, y1: int, width: int) -> F32:
    """Return a slow field enlarged (bilinear) to rows y0..y1-1."""
    x = np.arange(width) / _COARSE
    y = np.arange(y0, y1) / _COARSE
    i, j = y.astype(int), x.astype(int)
    fy, fx = (y - i).astype(np.float32)[:, None], (x - j).astype(np.float32)[None]
    rows = field[i] * (1 - fy) + field[i + 1] * fy
    return np.asarray(rows[:, j] * (1 - fx) + rows[:, j + 1] * fx, np.float32)


def _rows_of_texture(texture: F32, y0: int, y1: int, width: int) -> F32:
    rows = texture[np.arange(y0, y1) % _NOISE]
    return np.tile(rows, (1, -(-width // _NOISE)))[:, :width]


def _stain_stroma(stains: F32, scene: _Scene, grain: list[F32], y0: int) -> None:
    y1 = min(y0 + _BAND, scene.height)
    size = (y0, y1, scene.width)
    fine, across, along, soft = (_rows_of_texture(g, *size) for g in grain)
    weave = _rows_of_field(scene.weave, *size)
    edge = _rows_of_field(scene.tissue, *size) + 0.15 * soft
    inside = np.clip(edge * 1.5 + 0.5, 0, 1) * _rows_of_field(scene.stain, *size)
    fibres = across * weave + along * (1 - weave)
    dense = _rows_of_field(scene.cells, *size)
    stains[0, y0:y1] = inside * np.clip(0.10 + 0.10 * dense + 0.035 * fine + 0.03 * soft, 0, 2)
    stains[1, y0:y1] = inside * np.clip(0.40 - 0.10 * dense + 0.07 * fibres + 0.06 * soft + 0.025 * fine, 0.03, 2)


def _place_nuclei(rng: np.random.Generator, scene: _Scene, number: int, unit: float) -> _Shapes:
    """Choose where nuclei lie: in tissue, dense or not, apart or just touching; ``unit`` px per half micron."""
    long = rng.uniform(5.6, 9.0, number) * unit
    radii = np.stack([long, np.maximum(5.0 * unit, long * rng.uniform(0.62, 1.0, number))], axis=1)
    angles = rng.uniform(0, np.pi, number)
    bumps = np.stack([rng.uniform(0, [0.05, 0.04, 0.025], (number, 3)), rng.uniform(0, 2 * np.pi, (number, 3))], axis=1)
    chance = np.where(scene.tissue > 0.5, scene.cells**2 * np.clip(scene.stain, 0.3, 1), 0).astype(np.float64).ravel()
    crowd = _Crowd(scene.width, scene.height, 2 * radii.max(initial=1.0))
    touching = rng.random(number) < _TOUCHING
    kept: list[int] = []
    centers = np.zeros((number, 2))
    if chance.sum() > 0:
        spots = rng.choice(len(chance), (number, 12), p=chance / chance.sum())
        jitter, around = rng.random((number, 12, 2)), rng.uniform(0, 2 * np.pi, (number, 12))
        for n in range(number):
            for k in range(12):
                if touching[n] and kept:
                    centers[n] = _place_beside(
                        centers, radii, angles, n, (kept[int(spots[n, k]) % len(kept)], around[n, k])
                    )
                else:
                    row, column = divmod(int(spots[n, k]), scene.tissue.shape[1])
                    centers[n] = (np.array([column, row]) + jitter[n, k]) * _COARSE
                if crowd.fits(centers[n], radii[n], near=0.86 if touching[n] else 1.12) and _is_in_tissue(
                    scene, centers[n]
                ):
                    crowd.add(centers[n], radii[n])
                    kept.append(n)
                    break
    keep = np.array(kept, np.int64)
    return _Shapes(centers[keep], radii[keep], angles[keep], bumps[keep], touching[keep])


def _is_in_tissue(scene: _Scene, center: F64) -> bool:
    column, row = (center / _COARSE).astype(int)
    return bool(scene.tissue[row, column] > 0.4)


def _place_beside(centers: F64, radii: F64, angles: F64, n: int, other: tuple[int, float]) -> F64:
    """Return where nucleus n just touches an earlier one in the given direction."""
    m, direction = other
    reach = sum(
        radii[i, 0] * radii[i, 1]
        / np.hypot(radii[i, 1] * np.cos(direction - angles[i]), radii[i, 0] * np.sin(direction - angles[i]))
        for i in (n, m)
    )  # fmt: skip
    return np.asarray(centers[m] + reach * 0.99 * np.array([np.cos(direction), np.sin(direction)]))


class _Crowd:
    """Which nuclei are near: a grid of cells as wide as the largest one."""

    def __init__(self, width: int, height: int, cell: float) -> None:
        self.size = (width, height)
        self.cell = cell
        self.members: dict[tuple[int, int], list[tuple[F64, float]]] = {}

    def fits(self, center: F64, radius: F64, *, near: float) -> bool:
        """Tell whether a nucleus lies in the picture and no centre is nearer than ``near`` mean radii."""
        margin = radius.max() + 2
        if not (margin < center[0] < self.size[0] - margin and margin < center[1] < self.size[1] - margin):
            return False
        column, row = (center / self.cell).astype(int)
        mean = float(radius.mean())
        return all(
            np.hypot(*(center - other)) >= near * (mean + r)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            for other, r in self.members.get((column + i, row + j), ())
        )

    def add(self, center: F64, radius: F64) -> None:
        """Remember a nucleus."""
        column, row = (center / self.cell).astype(int)
        self.members.setdefault((column, row), []).append((center.copy(), float(radius.mean())))


def _outline_radius(bumps: F64, theta: Any) -> F64:
    """Return the outline relative to the ellipse, at angles ``theta``."""
    waves = [bumps[0, k] * np.cos((k + 2) * theta + bumps[1, k]) for k in range(3)]
    return np.asarray(1 + waves[0] + waves[1] + waves[2])


def _nucleus_outlines(shapes: _Shapes) -> F64:
    theta = np.arange(_CORNERS) * (2 * np.pi / _CORNERS)
    found = np.empty((len(shapes.centers), _CORNERS, 2))
    for n, bumps in enumerate(shapes.bumps):
        r = _outline_radius(bumps, theta)
        u, v = r * np.cos(theta) * shapes.radii[n, 0], r * np.sin(theta) * shapes.radii[n, 1]
        cos, sin = np.cos(shapes.angles[n]), np.sin(shapes.angles[n])
        found[n] = shapes.centers[n] + np.stack([u * cos - v * sin, u * sin + v * cos], axis=1)
    return found


def _stain_nucleus(stains: F32, shapes: _Shapes, n: int, look: tuple[F32, float]) -> None:
    """Paint one nucleus: dark rim, mottled inside, a touch of cytoplasm around."""
    grain, strength = look
    (cx, cy), (long, short) = shapes.centers[n], shapes.radii[n]
    reach = int(long * _REACH) + 2
    x0, y0 = max(int(cx) - reach, 0), max(int(cy) - reach, 0)
    window = stains[:, y0 : int(cy) + reach, x0 : int(cx) + reach]
    dy, dx = np.mgrid[y0 : y0 + window.shape[1], x0 : x0 + window.shape[2]] + 0.5
    dx, dy = dx - cx, dy - cy
    cos, sin = np.cos(shapes.angles[n]), np.sin(shapes.angles[n])
    u, v = (dx * cos + dy * sin) / long, (dy * cos - dx * sin) / short
    rho = np.hypot(u, v) / _outline_radius(shapes.bumps[n], np.arctan2(v, u))
    cover = np.clip((1 - rho) * short / 1.6 + 0.5, 0, 1)
    row, column = (n * 37) % (_NOISE - len(rho)), (n * 91) % (_NOISE - rho.shape[1])
    texture = grain[row : row + rho.shape[0], column : column + rho.shape[1]]
    rim = np.exp(-(((rho - 0.86) / 0.16) ** 2))
    inside = strength * np.clip(0.86 + 0.34 * rim + 0.17 * texture, 0.2, 2)
    window[0] = window[0] * (1 - cover) + inside * cover
    halo = np.clip(_REACH - rho, 0, 0.5) * 0.22
    window[1] = (window[1] + halo * (window[1] > 0.02)) * (1 - 0.35 * cover)


def _light_through(stains: F32, grain: F32, y0: int) -> U8:
    height, width = stains.shape[1:]
    noise = 1.3 * _rows_of_texture(grain, y0 + 333, y0 + 333 + height, width)
    out = np.empty((height, width, 3), np.uint8)
    for n in range(3):
        light = _LIGHT * np.exp(-(_HAEMATOXYLIN[n] * stains[0] + _EOSIN[n] * stains[1])) + noise
        out[..., n] = np.clip(light + 0.5, 0, 255).astype(np.uint8)
    return out
