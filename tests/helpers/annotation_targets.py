"""Tiny data on disk and the configuration of a training on it, for tests of the faces of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from shapely.geometry import mapping

SIZE = 32
ENCODER = {"name": "resnet18d", "args": {"channels": [8, 8, 16, 16]}}
DECODER = {"bottleneck": 8, "widths": [8, 8, 8, 8]}
MODEL = {"name": "tiny", "tile_size": SIZE, "overlap": 0, "encoder": ENCODER, "decoder": DECODER}
TINT = {"dark": (70, 50, 120), "pale": (230, 200, 220)}


def tissue_task(name: str = "tissue", **more: Any) -> dict[str, Any]:
    """Dark against pale."""
    return {"name": name, "kind": "classify", "classes": list(TINT), **more}


def disc_task(name: str = "disc") -> dict[str, Any]:
    """Where the dark disc is."""
    return {"name": name, "kind": "segment", "classes": ["background", "disc"]}


def patches(folder: Path, patients: int = 4, each: int = 2, size: int = SIZE) -> dict[str, Any]:
    """``<class>/p<n>-<k>.png`` of every patient; the data entry."""
    rng = np.random.default_rng(0)
    for name, colour in TINT.items():
        for number in range(patients * each):
            pixels = np.array(colour) + rng.integers(-15, 16, (size, size, 3))
            save(folder / name / f"p{number % patients}-{number}.png", pixels)
    return {
        "name": "patches", "kind": "class-folders", "task": "tissue", "path": str(folder),
        "group": "/(p[0-9]+)-", "batch": 4,
    }  # fmt: skip


def discs(folder: Path, patients: int = 4, each: int = 2, size: int = SIZE) -> dict[str, Any]:
    """Pictures of a dark disc and their masks (255: unknown, along the rim of the picture); the data entry."""
    y, x = np.mgrid[:size, :size]
    rng = np.random.default_rng(1)
    for number in range(patients * each):
        middle = rng.uniform(size * 0.3, size * 0.7, 2)
        inside = (y - middle[0]) ** 2 + (x - middle[1]) ** 2 < (size / 5) ** 2
        pixels = np.where(inside[..., None], TINT["dark"], TINT["pale"]) + rng.integers(-15, 16, (size, size, 3))
        mask = inside.astype(np.uint8)
        mask[0] = 255
        save(folder / "images" / f"p{number % patients}-{number}.png", pixels)
        save(folder / "masks" / f"p{number % patients}-{number}.png", mask)
    return {
        "name": "discs", "kind": "image-masks", "task": "disc", "images": str(folder / "images"),
        "masks": str(folder / "masks"), "group": "(p[0-9]+)-", "batch": 4,
    }  # fmt: skip


def joint(folder: Path, **more: Any) -> dict[str, Any]:
    """Two tasks, two data sets that share their patients, three steps."""
    return {
        "out": str(folder / "run"), "steps": 3, "threads": 0, "device": "cpu", "model": MODEL,
        "task": [tissue_task(), disc_task()],
        "data": [patches(folder / "patches"), discs(folder / "discs")],
        "split": {"val": 0.25, "test": 0.25}, "tracking": {"tensorboard": False},
        **more,
    }  # fmt: skip


def save(path: Path, values: np.ndarray) -> None:
    """A picture of uint8 values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(path)


def geojson(path: Path, shapes: Sequence[tuple[str, Any]]) -> str:
    """QuPath's objects of (class, shape); its path."""
    features = [
        {"type": "Feature", "geometry": mapping(shape), "properties": {"classification": {"name": name}}}
        for name, shape in shapes
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)
