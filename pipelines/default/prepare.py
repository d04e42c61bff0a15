"""Make the training data of the default model: folders of pictures, divided into train and val.

    python pipelines/default/prepare.py --data FOLDER --out data/default

FOLDER holds ``nuclei/dsb2018_stained_nuclei.zip`` (images/<id>.png, labels/<id>.png) and ``slides/`` with the files of
slides.csv beside this script. Below ``--out`` come, each with train/ and val/:

nuclei/       the labelled images as they are, and scaled so that a median nucleus measures 7 px in radius
recoloured/   training images with colours of H&E and textures of tissue, some with a slide's edge
background/   tiles of slides in which px without hematoxylin are known to be no nucleus; and empty pictures
stain/        tiles by stain; some of IHC and Giemsa are made of H&E tiles, "other" is made by program

The same data give the same files. Of every five images alike in look and size one is held out; of slides whole squares.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import stains  # beside this script
import torch
from PIL import Image
from torch import Generator, Tensor

from wsi_mmm.errors import InputError, SlideDamaged, WsiError
from wsi_mmm.slides import open_slide
from wsi_mmm.tiles.grid import make_grid
from wsi_mmm.tiles.stream import stream
from wsi_mmm.tiles.tissue import select_tiles, tissue_mask
from wsi_mmm.training import augment
from wsi_mmm.types import I32, U8

SEED = 11
MPP, TILE = 0.5, 320
RADIUS = 7.0  # px of a median nucleus at MPP
SMALLEST, LARGEST = 0.17, 1.7  # scales beyond these show nothing that could be learnt
RECOLOURED = 4  # pictures made of each training image at each scale
EDGES = 0.25  # share of these that lie at the edge of a slide
OTHERS = {"val": 60, "train": 900}
EMPTY = 60  # pictures of glass and ink
MAX_FILE, MAX_PX = 64 << 20, 1 << 24  # of one picture in the zip: bytes unpacked, px


@dataclass(frozen=True, slots=True)
class Labelled:
    """``pixels`` uint8[h, w, 3]; ``labels`` int32[h, w], 0 background; ``radius`` of the median nucleus, px."""

    name: str
    pixels: U8
    labels: I32
    radius: float

    @property
    def look(self) -> str:
        """Which of the three kinds of picture this is, by its mean colour."""
        red, _, blue = self.pixels.reshape(-1, 3).mean(axis=0)
        if red > blue:
            return "pink"
        return "pale" if blue - red <= 25.0 else "purple"


@dataclass(frozen=True, slots=True)
class Tile:
    """``pixels`` uint8[320, 320, 3] at 0.5 um/px of a slide of this stain."""

    name: str
    pixels: U8
    stain: str
    part: str


# ---------------------------------------------------------------- nuclei


def labelled_images(path: Path) -> list[Labelled]:
    """The images of the zip. InputError if it is no such zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if "images/" in n and n.endswith(".png"))
            found = [_labelled(archive, name) for name in names]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no zip of images/<id>.png and labels/<id>.png: {error}") from error
    if not found:
        raise InputError(f"{path} holds no images/<id>.png")
    return found


def _opened(archive: zipfile.ZipFile, name: str) -> Image.Image:
    """A picture of the archive, whose size was looked at."""
    if archive.getinfo(name).file_size > MAX_FILE:
        raise ValueError(f"{name} unpacks to more than {MAX_FILE >> 20} MiB")
    picture = Image.open(io.BytesIO(archive.read(name)))
    if picture.width * picture.height > MAX_PX:
        raise ValueError(f"{name} has {picture.width} x {picture.height} px")
    return picture


def _labelled(archive: zipfile.ZipFile, name: str) -> Labelled:
    pixels = np.array(_opened(archive, name).convert("RGB"))
    labels = np.array(_opened(archive, name.replace("images/", "labels/"))).astype(np.int32)
    areas = np.bincount(labels.ravel())[1:]
    radius = float(np.median(np.sqrt(areas[areas > 0] / np.pi))) if areas.any() else RADIUS
    return Labelled(Path(name).stem, pixels, labels, radius)


def held_out(images: Sequence[Labelled], seed: int = SEED, every: int = 5) -> set[str]:
    """Names of one image of every ``every`` that are alike in look and radius."""
    rng = np.random.default_rng(seed)
    held: set[str] = set()
    for look in ("pale", "purple", "pink"):
        alike = sorted((i for i in images if i.look == look), key=lambda i: (i.radius, i.name + ".png"))
        for start in range(0, len(alike), every):
            some = alike[start : start + every]
            if len(some) >= 3:
                held.add(some[int(rng.integers(len(some)))].name)
    return held


def scaled(image: Labelled, factor: float) -> Labelled:
    """The image ``factor`` times as large."""
    size = tuple(max(1, round(side * factor)) for side in image.pixels.shape[1::-1])
    how = Image.Resampling.BOX if factor < 1 else Image.Resampling.BILINEAR
    pixels = np.asarray(Image.fromarray(image.pixels).resize(size, how))
    labels = np.asarray(Image.fromarray(image.labels).resize(size, Image.Resampling.NEAREST))
    return Labelled(image.name, pixels, labels.astype(np.int32), image.radius * factor)


def recoloured(image: Labelled, g: Generator) -> Labelled:
    """The image with new colours; on a drawn share of them a side lies beyond the slide: white, and no nucleus."""
    height, width = image.labels.shape
    beside = ((0, max(height, width) - height), (0, max(height, width) - width))  # mirrored: textures are square
    square = np.pad(image.pixels, (*beside, (0, 0)), mode="symmetric")
    mask = torch.from_numpy(np.pad(image.labels > 0, beside, mode="symmetric").astype(np.float32))[None, None]
    pixels = np.ascontiguousarray(_u8(augment.restain(_float(square), mask, g))[:height, :width])
    labels = image.labels.copy()
    chance, share, side = torch.rand(3, generator=g).tolist()
    if chance < EDGES:
        turned, known = (np.rot90(a, int(side * 4)) for a in (pixels, labels))  # views: painted in place
        rows = int(0.6 * share * len(turned))
        turned[:rows], known[:rows] = 255, 0
    return Labelled(image.name, pixels, labels, image.radius)


def write_nuclei(images: Sequence[Labelled], out: Path) -> set[str]:
    """Folders nuclei and recoloured; returns what is held out."""
    held, g = held_out(images), Generator().manual_seed(SEED)
    for image in images:
        part = "val" if image.name in held else "train"
        _save(out / "nuclei", f"{part}/{image.name}.png", image.pixels, image.labels)
        if part == "val":
            continue
        fitting = scaled(image, min(max(RADIUS / image.radius, SMALLEST), LARGEST))
        _save(out / "nuclei", f"{part}/{image.name}-fit.png", fitting.pixels, fitting.labels)
        for kind, base in (("own", image), ("fit", fitting)):
            for number in range(RECOLOURED):
                made = recoloured(base, g)
                _save(out / "recoloured", f"{part}/{image.name}-{kind}{number}.png", made.pixels, made.labels)
    return held


# ---------------------------------------------------------------- slides


def tiles_of(row: dict[str, str], folder: Path, number: int) -> Iterator[Tile]:
    """Drawn tissue tiles of a slide; whole squares of 6 x 6 tiles are held out, every fourth."""
    with open_slide(str(folder / row["file"]), float(row["mpp"]) if row["mpp"] else None) as slide:
        grid = make_grid(slide.info, MPP, tile=TILE, overlap=0)
        rng = np.random.default_rng([SEED, number])
        index = select_tiles(grid, tissue_mask(slide), 0.3)
        index = index[np.sort(rng.permutation(len(index))[: int(row["tiles"])])]
        turn = int(rng.integers(4))
        for batch in stream(slide.reader, grid, index):
            for at, pixels, failed in zip(batch.index.tolist(), batch.pixels, batch.failed, strict=True):
                if failed:
                    raise SlideDamaged(f"{slide.info.uri}: a tile cannot be decoded; copy the slide again")
                held = (at[0] // 6 * 3 + at[1] // 6 * 5 + turn) % 4 == 0
                name = f"{row['slide']}-{at[0]}-{at[1]}"
                yield Tile(name, np.array(pixels), row["stain"], "val" if held else "train")


def write_tiles(tiles: Sequence[Tile], out: Path) -> None:
    """Folders stain and background."""
    g = Generator().manual_seed(SEED + 1)
    for tile in tiles:
        _save(out / "stain", f"{tile.part}/{tile.stain}/{tile.name}.png", tile.pixels)
        if tile.part == "train" and tile.stain in ("H&E", "IHC"):
            known = stains.surely_background(_float(tile.pixels)[0]).numpy()
            _save(out / "background", f"train/{tile.name}.png", tile.pixels, np.where(known, 0, -1).astype(np.int8))
    learnt = [tile for tile in tiles if tile.part == "train"]
    he = [tile for tile in learnt if tile.stain == "H&E"]
    for stain, change in (("IHC", stains.as_ihc), ("Giemsa", stains.as_giemsa)):
        for number in range(round(0.67 * sum(tile.stain == stain for tile in learnt))):  # 40 % of the class
            tile = he[int(torch.randint(0, len(he), (1,), generator=g))]
            _save(out / "stain", f"train/{stain}/made-{number}.png", _u8(change(_float(tile.pixels), g)))
    for place, (part, count) in enumerate(OTHERS.items()):
        some, own = [tile for tile in tiles if tile.part == part], Generator().manual_seed(SEED + 2 + place)
        for number in range(count):
            tile = some[int(torch.randint(0, len(some), (1,), generator=own))]
            made, _ = stains.odd_picture(_float(tile.pixels)[0], own)
            _save(out / "stain", f"{part}/other/{number}.png", _u8(made[None]))
    _write_empty(learnt, out, g)


def _write_empty(tiles: Sequence[Tile], out: Path, g: Generator) -> None:
    """Pictures of glass and ink, which surely show no nuclei."""
    count = 0
    while count < EMPTY:
        tile = tiles[int(torch.randint(0, len(tiles), (1,), generator=g))]
        made, empty = stains.odd_picture(_float(tile.pixels)[0], g)
        if empty:
            _save(out / "background", f"train/empty-{count}.png", _u8(made[None]), np.zeros((TILE, TILE), np.int8))
            count += 1


# ---------------------------------------------------------------- files


def _float(pixels: U8) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(2, 0, 1)[None]


def _u8(x: Tensor) -> U8:
    return np.ascontiguousarray((x[0].clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy())


def _save(root: Path, name: str, pixels: U8, labels: np.ndarray | None = None) -> None:
    """``pixels`` as a picture (below images/ where there are labels), ``labels`` below labels/."""
    path = root / ("images" if labels is not None else "") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)
    if labels is None:
        return
    place = root / "labels" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if labels.dtype == np.int8:  # -1: nothing is known there
        np.save(place.with_suffix(".npy"), labels)
    else:
        Image.fromarray(labels.astype(np.uint16)).save(place, compress_level=1)


def main() -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with nuclei/ and slides/")
    parser.add_argument("--out", type=Path, default=Path("data/default"), help="where the folders are made")
    args = parser.parse_args()
    try:
        held = write_nuclei(labelled_images(args.data / "nuclei/dsb2018_stained_nuclei.zip"), args.out)
        with Path(__file__).with_name("slides.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        tiles = [tile for n, row in enumerate(rows) for tile in tiles_of(row, args.data / "slides", n)]
        write_tiles(tiles, args.out)
    except (WsiError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(held)} images and {sum(tile.part == 'val' for tile in tiles)} tiles are held out; data in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
