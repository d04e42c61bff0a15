"""Vectors of tiles as a reader of the papers would compute them: OpenSlide, PIL, timm, torch. Nothing of ours in it.

    python plain_vectors.py JOB.json OUTPUT.npz

JOB: slide; tiles, a .npy float64[n, 4] of x, y, width, height in level-0 px; tile_px; input_px; architecture,
arguments; weights, a safetensors file; mean, std; pooling, cls or native; filters, of PIL, for tiles that are not as
wide at level 0. Writes float32[n, D] for each filter.
"""

import json
import math
import sys

import numpy as np
import openslide
import timm
import torch
from PIL import Image
from safetensors.torch import load_file


def read_tile(slide, box, tile_px, resampling):
    """A tile of level 0, resized to ``tile_px`` unless it is as wide already; its place may lie between pixels."""
    x, y, width, height = box
    left, top = math.floor(x) - 8, math.floor(y) - 8
    size = (math.ceil(width) + 18, math.ceil(height) + 18)
    region = slide.read_region((left, top), 0, size).convert("RGB")
    inner = (x - left, y - top, x - left + width, y - top + height)
    if (width, height) == (tile_px, tile_px) and x == int(x) and y == int(y):
        return region.crop(tuple(int(v) for v in inner))
    return region.resize((tile_px, tile_px), resampling, box=inner)


def main():
    path, output = sys.argv[1:]
    with open(path) as file:
        job = json.load(file)
    network = timm.create_model(job["architecture"], num_classes=0, **job["arguments"]).eval()
    network.load_state_dict(load_file(job["weights"]), strict=True)
    mean, std = (torch.tensor(job[name]).view(3, 1, 1) for name in ("mean", "std"))
    slide, found = openslide.OpenSlide(job["slide"]), {}
    for name in job["filters"]:
        vectors = []
        for box in np.load(job["tiles"]):
            tile = read_tile(slide, box, job["tile_px"], Image.Resampling[name])
            if job["input_px"]:
                tile = tile.resize((job["input_px"], job["input_px"]), Image.Resampling.BICUBIC)
            pixels = (torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 255 - mean) / std
            with torch.inference_mode():
                if job["pooling"] == "cls":
                    vectors.append(network.forward_features(pixels[None])[0, 0].numpy())
                else:
                    vectors.append(network(pixels[None])[0].numpy())
        found[name] = np.stack(vectors)
    np.savez(output, **found)


if __name__ == "__main__":
    main()
