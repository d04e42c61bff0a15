"""Where a slide's JPEG tiles are decoded: by the readers' threads, or on the model's device. Chosen once per slide.

The choice is part of what names a slide's values, for the pixels differ: a device averages level 0 where the reader
lets its codec decode to a half, and nvJPEG is another decoder than libjpeg-turbo.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.errors import ModelError
from wsi_mmm.model.identity import device_kind
from wsi_mmm.slides.base import EncodedReader, Reader
from wsi_mmm.tiles.grid import any_overlap, tile_boxes
from wsi_mmm.types import U8, Batch, EncodedBatch, Grid, Tiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wsi_mmm.model.device_decode import DeviceDecoder

FASTER = 1.2
"""By how much the device must beat the readers' threads: its pixels are other ones, and it has a model to run."""

SAMPLE = 64  # tiles
READERS = 2  # threads that read, as in `local.LocalExecutor`

_lock = threading.Lock()
_decoders: dict[str, DeviceDecoder] = {}


@dataclass(frozen=True, slots=True)
class Choice:
    """Where tiles are decoded, and why, in words for reports."""

    on: Literal["cpu", "device"] = "cpu"
    words: str = "decoded on the CPU, where the model runs"


@dataclass(frozen=True, slots=True)
class Rates:
    """Tiles a second of the readers' threads alone, and of them and the device, which only look and decode."""

    cpu: float
    device: float


Measure = Callable[[EncodedReader, Tiles], Rates]


def choose(recipe: Recipe, reader: Reader, tiles: Tiles, measure: Measure | None = None) -> Choice:
    """Where the native tiles under ``tiles`` of a slide shall be decoded.

    "auto" measures on CUDA only, and takes the device where that is clearly faster. What the device's decoder is not
    trusted with stays on the CPU, whatever is asked for. Raises StorageError.
    """
    if recipe.decode == "cpu":
        return Choice(words="decoded on the CPU, as asked for")
    if recipe.decode == "auto" and device_kind(recipe.device) != "cuda":
        return Choice()
    why = _obstacle(recipe, reader, tiles)
    if why:
        return Choice(words=f"decoded on the CPU: {why}")
    if recipe.decode == "device":
        return Choice("device", f"decoded on the model's device ({device_kind(recipe.device)}), as asked for")
    assert isinstance(reader, EncodedReader)
    try:
        return judged((measure or _measured(recipe))(reader, tiles))
    except ModelError as error:
        return Choice(words=f"decoded on the CPU: {error}")


def judged(rates: Rates) -> Choice:
    """The rule of "auto"."""
    on: Literal["cpu", "device"] = "device" if rates.device >= FASTER * rates.cpu else "cpu"
    where = {"device": "the model's device", "cpu": "the CPU"}[on]
    return Choice(on, f"decoded on {where}: {rates.cpu:.0f} tiles/s by the CPU, {rates.device:.0f} with the device")


def _obstacle(recipe: Recipe, reader: Reader, tiles: Tiles) -> str:
    if not len(tiles.xy):
        return "no tiles"
    if recipe.cache_tiles == "on":
        return "its tiles are cached"
    if not isinstance(reader, EncodedReader):
        return f"the reader {reader.info.reader!r} does not hand over compressed tiles"
    return reader.obstacle(tiles)


def decoder_on(device: torch.device) -> DeviceDecoder:
    """The decoder of a device, made once per process. Raises ModelError where there is none."""
    from wsi_mmm.model.device_decode import DeviceDecoder

    with _lock:
        if str(device) not in _decoders:
            _decoders[str(device)] = DeviceDecoder(device)
        return _decoders[str(device)]


def decoded(batch: Batch | EncodedBatch, grid: Grid, device: torch.device) -> tuple[Batch, U8 | Tensor]:
    """A batch as its failures are known in the end, and its pixels uint8[n, tile, tile, 3], on the device perhaps.

    The batch of pixels on a device carries none itself.
    """
    if isinstance(batch, Batch):
        return batch, batch.pixels
    found = decoder_on(device).decode(batch.encoded)
    failed = batch.failed | any_overlap(tile_boxes(grid, batch.index), found.failed)
    return Batch(np.empty((0, grid.tile, grid.tile, 3), np.uint8), batch.xy, batch.index, failed), found.pixels


# ---------------------------------------------------------------- measuring


def _measured(recipe: Recipe) -> Measure:
    from wsi_mmm.model.runner import pick_device

    decoder = decoder_on(pick_device(recipe.device))
    return lambda reader, tiles: measure(reader, tiles, decoder)


def measure(reader: EncodedReader, tiles: Tiles, decoder: DeviceDecoder) -> Rates:
    """Read the slide's first tiles both ways; fetching costs both the same and is done before."""
    sample = _first(tiles)
    fetched = reader.fetch([sample])
    parts = [replace(sample, xy=xy) for xy in np.array_split(sample.xy, READERS) if len(xy)]

    def read(part: Tiles) -> None:
        reader.read_tiles(part, list(np.empty((len(part.xy), part.size, part.size, 3), np.uint8)), fetched)

    def look(part: Tiles) -> Any:
        return reader.read_encoded(part, fetched)

    with ThreadPoolExecutor(READERS, "wsi-mmm-measure") as pool:
        for part in parts:  # imports, compiled code and the decoder's own memory are no cost of tiles
            read(replace(part, xy=part.xy[:1]))
            decoder.decode(look(replace(part, xy=part.xy[:1])))
        cpu, _ = _timed(lambda: list(pool.map(read, parts)))
        looking, encoded = _timed(lambda: list(pool.map(look, parts)))
        decoding, _ = _timed(lambda: [decoder.decode(one) for one in encoded])
    return Rates(len(sample.xy) / cpu, len(sample.xy) / max(looking, decoding))  # the two go on side by side


def _first(tiles: Tiles) -> Tiles:
    """Tiles that lie near the first of them, as those of a block do."""
    far = np.abs(tiles.xy - tiles.xy[0]).max(axis=1)
    return replace(tiles, xy=tiles.xy[np.sort(np.argsort(far, kind="stable")[:SAMPLE])])


def _timed(unit: Callable[[], Sequence[Any]]) -> tuple[float, Sequence[Any]]:
    begin = time.perf_counter()
    found = unit()
    return max(time.perf_counter() - begin, 1e-9), found
