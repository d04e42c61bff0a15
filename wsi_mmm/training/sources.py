"""What is learnt from: labelled nuclei images, and tiles of slides of known stain. Everything is held in memory."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_mmm.cache import through_cache
from wsi_mmm.errors import InputError, SlideDamaged
from wsi_mmm.slides import Slide, open_slide, store
from wsi_mmm.slides.base import Reader
from wsi_mmm.tiles.grid import make_grid
from wsi_mmm.tiles.stream import stream
from wsi_mmm.tiles.tissue import select_tiles, tissue_mask
from wsi_mmm.types import I32, I64, U8, Grid, Tiles

PINK, PALE, PURPLE = "pink", "pale", "purple"
MAX_FILE, MAX_PX = 64 << 20, 1 << 24  # of one picture in a zip: bytes unpacked, px


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """``pixels`` uint8[h, w, 3]; ``labels`` int32[h, w] instances, 0 background; ``radius`` median of nuclei, px."""

    name: str
    pixels: U8
    labels: I32
    radius: float
    look: str


@dataclass(frozen=True, slots=True)
class StainedTile:
    """``pixels`` uint8[s, s, 3] at the model's mpp; ``stain`` class index; ``held``: kept for evaluation."""

    slide: str
    pixels: U8
    stain: int
    held: bool


@dataclass(frozen=True, slots=True)
class SlideSource:
    """A slide and the stain of all its tissue; ``mpp`` overrides (or supplies) the slide's own."""

    path: str
    stain: str
    tiles: int
    mpp: float | None = None


def load_nuclei(path: str | Path) -> list[LabelledImage]:
    """Images of a zip with ``images/<id>.png`` and ``labels/<id>.png``. InputError if it is no such zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if "images/" in n and n.endswith(".png"))
            found = [_image(archive, name) for name in names]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no zip of images/<id>.png and labels/<id>.png: {error}") from error
    if not found:
        raise InputError(f"{path} holds no images/<id>.png")
    return found


def _image(archive: zipfile.ZipFile, name: str) -> LabelledImage:
    pixels = np.array(_picture(archive, name).convert("RGB"))
    labels = np.array(_picture(archive, name.replace("images/", "labels/"))).astype(np.int32)
    areas = np.bincount(labels.ravel())[1:]
    radius = float(np.median(np.sqrt(areas[areas > 0] / np.pi))) if areas.any() else 8.0
    return LabelledImage(Path(name).name, pixels, labels, radius, _look(pixels))


def _picture(archive: zipfile.ZipFile, name: str) -> Image.Image:
    """A picture that neither unpacks to nor claims more than one of its kind has; ValueError otherwise."""
    if archive.getinfo(name).file_size > MAX_FILE:
        raise ValueError(f"{name} unpacks to more than {MAX_FILE >> 20} MiB")
    picture = Image.open(io.BytesIO(archive.read(name)))
    if picture.width * picture.height > MAX_PX:
        raise ValueError(f"{name} has {picture.width} x {picture.height} px")
    return picture


def _look(pixels: U8) -> str:
    """Which of the three kinds of picture this is, by its mean colour."""
    red, _, blue = pixels.reshape(-1, 3).mean(axis=0)
    if red > blue:
        return PINK
    return PALE if blue - red <= 25.0 else PURPLE


def split(
    images: Sequence[LabelledImage], seed: int, every: int = 5
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """(training, held out): of every ``every`` images alike in look and radius one is held out, drawn by ``seed``."""
    rng = np.random.default_rng(seed)
    held: set[str] = set()
    for look in (PALE, PURPLE, PINK):
        alike = sorted((i for i in images if i.look == look), key=lambda i: (i.radius, i.name))
        for start in range(0, len(alike), every):
            some = alike[start : start + every]
            if len(some) >= 3:
                held.add(some[int(rng.integers(len(some)))].name)
    return [i for i in images if i.name not in held], [i for i in images if i.name in held]


def load_tiles(
    sources: Sequence[SlideSource], stains: Sequence[str], *, mpp: float, size: int, seed: int, cache: str | None = None
) -> list[StainedTile]:
    """Tissue tiles of ``size`` px at ``mpp``, drawn by ``seed``; held out are whole regions (every fourth square).

    Tiles are those of the grid that a run reads, by way of the tile cache under ``cache`` where that pays, as in a run.
    """
    found: list[StainedTile] = []
    for number, source in enumerate(sources):
        with open_slide(source.path, source.mpp) as slide:
            grid = make_grid(slide.info, mpp, tile=size, overlap=0)
            found += _tiles_of(slide, source, stains.index(source.stain), grid, [seed, number], cache)
    return found


def _tiles_of(
    slide: Slide, source: SlideSource, stain: int, grid: Grid, seed: Sequence[int], cache: str | None
) -> list[StainedTile]:
    rng = np.random.default_rng(seed)
    index = select_tiles(grid, tissue_mask(slide), 0.3)
    index = index[np.sort(rng.permutation(len(index))[: source.tiles])]
    squares = index // 6
    held = (squares[:, 0] * 3 + squares[:, 1] * 5 + int(rng.integers(4))) % 4 == 0
    pixels: dict[tuple[int, ...], U8] = {}
    for batch in stream(_reader_of(slide, grid, index, cache), grid, index):
        if batch.failed.any():
            x, y = batch.xy[batch.failed][0].tolist()
            raise SlideDamaged(f"{slide.info.uri}: the tile at level-0 px ({x}, {y}) cannot be decoded; copy it again")
        pixels |= zip(map(tuple, batch.index.tolist()), batch.pixels, strict=True)
    name = Path(source.path).name
    return [StainedTile(name, pixels[tuple(at)], stain, bool(h)) for at, h in zip(index.tolist(), held, strict=True)]


def _reader_of(slide: Slide, grid: Grid, index: I64, cache: str | None) -> Reader:
    if cache is None or not len(index):
        return slide.reader
    tiles = Tiles(index[:, ::-1] * grid.stride, grid.tile, grid.scale_x, grid.scale_y)
    name = f"{grid.scale_x:.9f}-{grid.scale_y:.9f}"  # as a run names it
    return through_cache(slide.reader, store.join(cache, slide.info.fingerprint, "pixels", name), tiles)
