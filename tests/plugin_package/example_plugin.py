"""A plug-in of wsi_mmm: one small extension of each kind. docs/extending.md explains them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from wsi_mmm.annotations import AnnotationFormat, Shape, Shapes
from wsi_mmm.errors import AnnotationError, NotASlide
from wsi_mmm.model.registry import EncoderPlugin
from wsi_mmm.slides.base import ReaderPlugin
from wsi_mmm.slides.fingerprint import fingerprint
from wsi_mmm.slides.region_reader import RegionReader
from wsi_mmm.storage.store import local_path, open_store
from wsi_mmm.types import Level, SlideInfo, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_mmm.engine.run import RunRequest
    from wsi_mmm.engine.units import Executor
    from wsi_mmm.model.encoder import PyramidEncoder
    from wsi_mmm.model.heads import HeadSpec

# ---------------------------------------------------------------- a reader


def open_npy(uri: str) -> RegionReader:
    """Open an array uint8[height, width, 3] of a local .npy file as a slide without pyramid and without mpp."""
    store = open_store(uri)
    try:
        mark = fingerprint(store)
    finally:
        store.close()
    pixels = np.load(local_path(uri), mmap_mode="r", allow_pickle=False)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise NotASlide(f"{uri} is {pixels.dtype}{list(pixels.shape)}; give uint8[height, width, 3]")
    height, width, _ = pixels.shape
    info = SlideInfo(
        uri=uri, width=width, height=height, mpp_x=None, mpp_y=None,
        levels=(Level(width, height, downsample_x=1.0, downsample_y=1.0, tile_width=256, tile_height=256),),
        vendor="npy", reader="npy", fingerprint=mark,
    )  # fmt: skip

    def read_region(level: int, window: tuple[int, int, int, int]) -> Any:
        x0, y0, x1, y1 = window
        return np.array(pixels[y0:y1, x0:x1])

    return RegionReader(info, read_region, lambda: None)


npy_reader = ReaderPlugin(open_npy, lambda uri, head: head.startswith(b"\x93NUMPY"), (".npy",))

# ---------------------------------------------------------------- a task


@dataclass(frozen=True)
class DarkPixels:
    """Counts the pixels of a tile whose mean of R, G and B is under ``below``; nothing is learnt."""

    info: TaskInfo
    below: float = 100.0
    scope: str = "tile"
    stride: int = 1
    halo: int = 0
    channels: int = 1
    heads: ClassVar[Mapping[str, str]] = {"tile": "pixels"}

    @classmethod
    def from_params(cls, info: TaskInfo, params: Mapping[str, float], scope: str) -> Self:
        """Parameter ``below``, 0 to 255."""
        return cls(info, **params)

    def head(self, spec: HeadSpec) -> nn.Module:
        """RGB float[n, 3, h, w] in [0, 1] -> counts float[n, 1]."""
        from torch import nn

        below = self.below

        class Count(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return ((x * 255).round().mean(1) < below).sum((1, 2))[:, None].float()

        return Count()

    def target(self, value: Any) -> Tensor:
        """A count, for training data that has it."""
        import torch

        return torch.tensor([float(value)])

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Zero: there is nothing to learn."""
        return (logits * 0.0).sum()

    def quantise(self, logits: Tensor) -> Tensor:
        """The counts themselves."""
        return logits

    def metrics(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Mean absolute error of the counts."""
        errors = [abs(float(value) - float(found[0])) for value, found in pairs]
        return {"mae": float(np.mean(errors))} if errors else {}

    def interpret(self, window: Any, view: Any) -> Any:
        """Tile tasks draw no objects of their own."""
        raise TypeError("dark-pixels predicts per tile; use table()")

    def table(self, values: Any) -> Mapping[str, Any]:
        """One column of tiles.parquet, named by the task."""
        return {self.info.name: values[:, 0]}


# ---------------------------------------------------------------- an encoder


def build_averages(weights: Path | None) -> PyramidEncoder:
    """Average colours at strides 4 and 8: maps for decoders, and no weights."""
    from torch import nn
    from torch.nn import functional

    from wsi_mmm.model.encoder import PyramidEncoder

    class Averages(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [functional.avg_pool2d(x, side) for side in (4, 8)]

    return PyramidEncoder(Averages(), (3, 3), (4, 8))


two_strides = EncoderPlugin(
    {
        "name": "two-strides",
        "title": "Average colours",
        "licence": "CC0-1.0",
        "commercial": "yes",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "dimension": 3,
    },
    build_averages,
)


# ---------------------------------------------------------------- an executor


def one_thread(request: RunRequest) -> Executor:
    """``--scheduler one-thread://``: the serial executor, as an executor of a plug-in."""
    from wsi_mmm.engine.executors.serial import SerialExecutor

    return SerialExecutor()


# ---------------------------------------------------------------- an annotation format


def parse_boxes(data: bytes, name: str, values: Sequence[str]) -> Shapes:
    """Lines "boxes" and then "CLASS X0 Y0 X1 Y1" in level-0 px."""
    from shapely.geometry import box

    try:
        rows = [line.split() for line in data.decode().splitlines()[1:]]
        items = tuple(Shape(box(*map(float, corners)), label, (np.nan,) * len(values)) for label, *corners in rows)
    except (ValueError, TypeError) as error:
        raise AnnotationError(f"{name}: a line is not 'CLASS X0 Y0 X1 Y1' ({error}): correct it") from error
    return Shapes(items)


boxes = AnnotationFormat(lambda name, data: data.startswith(b"boxes\n"), parse_boxes)
