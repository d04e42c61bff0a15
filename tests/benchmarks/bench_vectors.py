"""Are the vectors of `embed` those of a plain script? On a slide of your own: make bench-vectors ARGS="SLIDE".

The plain script (`plain_vectors.py`) reads the same tiles with OpenSlide, resizes with PIL, computes with timm, and
knows nothing of wsi_mmm. Made-up weights: a ViT-S/16, a reduced network of UNI's kind whose tiles of 256 px are resized
to 224, a ResNet50. At the slide's own resolution the pixels must be equal: cosine >= 0.99999. At 0.5 mpp the region of
level 0 is resized by each of PIL's antialiasing filters, and the least cosine of all must be >= 0.999. ``other tile``:
the least cosine of two tiles in sequence, what a cosine of these weights means. Exit code 1: a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import timm
import torch
from safetensors.torch import save_file

import wsi_mmm
from wsi_mmm.outputs.exports import read_features

PLAIN = Path(__file__).with_name("plain_vectors.py")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
FILTERS = ("BOX", "BILINEAR", "BICUBIC", "LANCZOS")


@dataclass(frozen=True)
class Network:
    """An encoder with made-up weights, and how its tiles are read."""

    name: str
    architecture: str
    tile_px: int
    pooling: str
    input_px: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)


NETWORKS = (
    Network("ViT-S/16, 224 px", "vit_small_patch16_224", 224, "cls"),
    Network("as UNI, 256 to 224 px", "vit_large_patch16_224", 256, "cls", 224,
            {"img_size": 224, "init_values": 1e-5, "depth": 4, "embed_dim": 256, "num_heads": 4}),
    Network("ResNet50, 256 px", "resnet50", 256, "native"),
)  # fmt: skip


def tissue_window(path: str, tile: float, count: int) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 (level-0 px) of a block of about ``count`` tiles of ``tile`` px where there is most colour."""
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
        picture = np.asarray(slide.get_thumbnail((1024, 1024)).convert("HSV"))[..., 1].astype(float)
    scale = width / picture.shape[1]
    side = max(1.0, tile * np.sqrt(count) / scale)
    sums = np.pad(picture, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    k = min(round(side), *picture.shape)
    window = sums[k:, k:] - sums[:-k, k:] - sums[k:, :-k] + sums[:-k, :-k]
    top, left = np.unravel_index(np.argmax(window), window.shape)
    x0, y0 = (np.ceil(v * scale / tile) * tile for v in (left, top))
    columns = max(1, min(int(np.sqrt(count)), int((width - x0) // tile)))
    rows = max(1, min(-(-count // columns), int((height - y0) // tile)))
    return x0 + 2, y0 + 2, x0 + columns * tile - 2, y0 + rows * tile - 2


def lively(key: str, value: torch.Tensor) -> torch.Tensor:
    """Weights of which the vector depends on the pixels: fresh ViTs hardly look at them."""
    if key.endswith(".gamma"):
        return torch.rand_like(value) + 0.5
    if value.ndim < 2 or not value.is_floating_point():
        return value.contiguous()
    return torch.randn_like(value) * value[0].numel() ** -0.5


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each row."""
    one, other = one.astype(float), other.astype(float)
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def compare(path: str, network: Network, mpp: float, count: int, folder: Path) -> bool:
    """Embed and compare; print the line. Return whether the bar holds."""
    with openslide.OpenSlide(path) as slide:
        own = float(slide.properties["openslide.mpp-x"]), float(slide.properties["openslide.mpp-y"])
    native = mpp == own[0] == own[1]
    torch.manual_seed(0)
    weights = folder / "model.safetensors"
    state = timm.create_model(network.architecture, num_classes=0, **network.arguments).state_dict()
    save_file({key: lively(key, value) for key, value in state.items()}, weights)
    x0, y0, x1, y1 = tissue_window(path, network.tile_px * mpp / own[0], count)
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    (folder / "tissue.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    report = wsi_mmm.embed(
        path, network.architecture, output=folder / "out", weights=str(weights), encoder_args=network.arguments,
        mean=IMAGENET[0], std=IMAGENET[1], pool=network.pooling, input_size=network.input_px or None, mpp=mpp,
        tile_size=network.tile_px, tissue=str(folder / "tissue.geojson"), device="cpu", force=True,
    )  # fmt: skip
    if report.exit_code:
        raise SystemExit(f"error: {report.slides[0].error}")
    [features] = (folder / "out").glob("*/features.zarr")
    found = read_features(str(features))
    coords, ours = found.coords[:count], found.vectors[:count]
    width, height = network.tile_px * mpp / own[0], network.tile_px * mpp / own[1]
    places = np.rint(coords / (width, height)) * (width, height)  # before their positions were rounded to pixels
    if np.abs(places - coords).max() > 0.51:
        raise SystemExit("error: the tiles are not on a grid that begins at (0, 0)")
    np.save(folder / "tiles.npy", np.column_stack([places, np.full(len(places), width), np.full(len(places), height)]))
    job = {
        "slide": path, "tiles": str(folder / "tiles.npy"), "tile_px": network.tile_px, "input_px": network.input_px,
        "architecture": network.architecture, "arguments": network.arguments, "weights": str(weights),
        "mean": IMAGENET[0], "std": IMAGENET[1], "pooling": network.pooling,
        "filters": FILTERS[:1] if native else FILTERS,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", str(PLAIN), str(folder / "job.json"), str(folder / "plain.npz")]
    subprocess.run(command, check=True, env=bare, cwd=folder)
    plain = np.load(folder / "plain.npz")
    least = {name: cosines(ours, plain[name]) for name in job["filters"]}
    control = cosines(ours[1:], ours[:-1]).min()
    bar = 0.99999 if native else 0.999
    words = "  ".join(f"{name} {values.min():.7f}" for name, values in least.items())
    good = all(values.min() >= bar for values in least.values())
    print(f"{network.name:22} {mpp:7.4f} mpp {len(ours):4} tiles  min cosine: {words}  "
          f"other tile {control:.4f}  bar {bar}: {'holds' if good else 'MISSED'}", flush=True)  # fmt: skip
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--tiles", type=int, default=200)
    parser.add_argument("--mpp", type=float, default=0.5, help="the resolution beside the slide's own")
    parser.add_argument("--only", default="", help="part of the name of an encoder")
    given = parser.parse_args()
    with openslide.OpenSlide(given.slide) as slide:
        native = float(slide.properties["openslide.mpp-x"])
    good = True
    for network in NETWORKS:
        for mpp in (native, given.mpp) if given.only in network.name else ():
            with tempfile.TemporaryDirectory() as folder:
                good &= compare(str(Path(given.slide).absolute()), network, mpp, given.tiles, Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
