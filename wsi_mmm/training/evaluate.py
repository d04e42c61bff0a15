"""Held-out figures, found as `run` finds objects: padded tiles, Runner, quantised maps, the task's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.runner import Quantise, Runner
from wsi_mmm.tasks import Task
from wsi_mmm.training.sources import LabelledImage, StainedTile
from wsi_mmm.types import U8


def nuclei_figures(
    model: MultiTaskModel, tasks: Mapping[str, Task], images: Sequence[LabelledImage]
) -> tuple[dict[str, float], dict[str, float]]:
    """(figures over all images, F1 of each). Images up to the tile size are padded white to it, as at slide edges."""
    task, runner = tasks["nuclei"], Runner(model, "cpu", quantise=_quantise(tasks))
    pixels = np.stack([_padded(image.pixels, model.card.tile_size) for image in images])
    maps = runner.run(pixels, ["nuclei"]).maps["nuclei"]
    runner.close()
    pairs = [
        (image.labels, _cropped(m, image.labels.shape, task.stride)) for image, m in zip(images, maps, strict=True)
    ]
    single = {image.name: task.metrics([pair])["f1"] for image, pair in zip(images, pairs, strict=True)}
    return task.metrics(pairs), single


def stain_figures(model: MultiTaskModel, tasks: Mapping[str, Task], tiles: Sequence[StainedTile]) -> dict[str, float]:
    """Figures of the stain task over tiles of one size."""
    runner = Runner(model, "cpu", quantise=_quantise(tasks))
    found = runner.run(np.stack([tile.pixels for tile in tiles]), ["stain"]).tables["stain"]
    runner.close()
    return tasks["stain"].metrics([(tile.stain, row) for tile, row in zip(tiles, found, strict=True)])


def _quantise(tasks: Mapping[str, Task]) -> dict[str, Quantise]:
    return {name: task.quantise for name, task in tasks.items()}


def _padded(pixels: U8, size: int) -> U8:
    out = np.full((size, size, 3), 255, np.uint8)
    out[: pixels.shape[0], : pixels.shape[1]] = pixels[:size, :size]
    return out


def _cropped(maps: U8, shape: tuple[int, ...], stride: int) -> U8:
    return maps[:, : -(-shape[0] // stride), : -(-shape[1] // stride)]
