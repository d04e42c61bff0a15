"""Native JPEG tiles to the model's tiles, on its device: decoded, pasted side by side, averaged, cut.

On CUDA nvJPEG decodes, by way of torchvision; on a CPU torchvision's own decoder does, through the same code, and gives
libjpeg-turbo's pixels. The averages are exact integers: equal native pixels give the reader's tiles to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.types import I64, U8, Averages, Encoded, Patch

TOGETHER = 128  # native tiles decoded at a time
BAND_PIXELS = 1 << 21  # px of a canvas' width times rows that are averaged at a time
WHITE = 255
_RGB = 3  # torchvision.io.ImageReadMode.RGB

Codec = Callable[[list[Tensor]], list[Tensor]]  # streams uint8[bytes] -> uint8[3, h, w]; RuntimeError


@dataclass(frozen=True, slots=True)
class Decoded:
    """``pixels`` uint8[n, size, size, 3] on the device; ``failed`` int64[f, 4]: level-0 rectangles left white."""

    pixels: Tensor
    failed: I64


class DeviceDecoder:
    """Decodes on one device; callable from several threads. What it returns is complete: no stream is to be waited for.

    ``codec``: what decodes there (None: torchvision). Raises ModelError when there is none.
    """

    def __init__(self, device: torch.device, codec: Codec | None = None) -> None:
        self.device = device
        self._codec = codec or torchvision_codec(device)
        self._rescue = torchvision_codec(torch.device("cpu"))
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def decode(self, encoded: Encoded) -> Decoded:
        """Make the tiles. Raises ModelError when the device decodes nothing of what the CPU can."""
        with torch.inference_mode(), self._beside():
            pixels = self._white(encoded.count, encoded.size, encoded.size)
            failed: set[int] = set()
            for patch in encoded.patches:
                failed |= self._fill(pixels, patch, encoded)
        if self._side is not None:
            self._side.synchronize()
        return Decoded(pixels, encoded.boxes[sorted(failed)])

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _white(self, *shape: int) -> Tensor:
        return torch.full((*shape, 3), WHITE, dtype=torch.uint8, device=self.device)

    def _fill(self, out: Tensor, patch: Patch, encoded: Encoded) -> set[int]:
        """Write the tiles of a patch; return which native tiles could not be decoded."""
        canvas, failed = self._canvas(patch, encoded)
        picture = canvas if patch.axes is None else averaged(canvas, *patch.axes)
        size = encoded.size
        for tile, (y, x) in zip(patch.tiles.tolist(), patch.corner.tolist(), strict=True):
            out[tile] = picture[y : y + size, x : x + size]
        return failed

    def _canvas(self, patch: Patch, encoded: Encoded) -> tuple[Tensor, set[int]]:
        """Native tiles beside each other, uint8[down * height, across * width, 3], white where there is no slide."""
        height, width = encoded.height, encoded.width
        canvas = self._white(patch.down * height, patch.across * width)
        cells = canvas.view(patch.down, height, patch.across, width, 3).transpose(1, 2)
        failed: set[int] = set()
        for first in range(0, len(patch.native), TOGETHER):
            which = patch.native[first : first + TOGETHER].tolist()
            tiles = self._natives([encoded.natives[i] for i in which], (3, height, width))
            good = [n for n, tile in enumerate(tiles) if tile is not None]
            failed |= {which[n] for n, tile in enumerate(tiles) if tile is None}
            if good:
                stacked = torch.stack([tile for tile in tiles if tile is not None]).permute(0, 2, 3, 1)
                row, column = torch.from_numpy(patch.cell[first : first + TOGETHER][good].T.copy()).to(self.device)
                cells[row, column] = stacked
        canvas[patch.edge[0] :] = WHITE  # native tiles are whole, the slide may end within them
        canvas[:, patch.edge[1] :] = WHITE
        return canvas, failed

    def _natives(self, natives: Sequence[bytes | U8], shape: tuple[int, int, int]) -> list[Tensor | None]:
        """uint8[3, height, width] of each; None where it cannot be decoded to that shape."""
        streams = [native for native in natives if isinstance(native, bytes)]
        decoded = iter(self._decoded(streams) if streams else ())
        tiles = [
            next(decoded) if isinstance(native, bytes) else torch.from_numpy(native).permute(2, 0, 1)
            for native in natives
        ]
        return [None if tile is None or tile.shape != shape else tile.to(self.device) for tile in tiles]

    def _decoded(self, streams: Sequence[bytes]) -> list[Tensor | None]:
        """All at once; when that fails each alone, by the CPU what the device refuses."""
        inputs = [torch.frombuffer(bytearray(stream), dtype=torch.uint8) for stream in streams]
        whole = _tried(self._codec, inputs)
        if whole is not None:
            return list(whole)
        alone = [_tried(self._codec, [one]) for one in inputs]
        rescued = [None if found else _tried(self._rescue, [one]) for found, one in zip(alone, inputs, strict=True)]
        if not any(alone) and any(rescued):
            raise ModelError(f"{self.device} decodes none of {len(inputs)} JPEG tiles; run with --decode cpu")
        found = [one or other for one, other in zip(alone, rescued, strict=True)]
        return [one[0] if one else None for one in found]


def _tried(codec: Codec, inputs: list[Tensor]) -> list[Tensor] | None:
    """The tiles, or None when one of them is refused."""
    try:
        return codec(inputs)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def torchvision_codec(device: torch.device) -> Codec:
    """Return torchvision's decoder for a device. ModelError when this installation has none.

    Its operators are called, not its Python function, which since 0.29 warns of its end each time.
    """
    try:
        import torchvision.io  # noqa: F401  (registers the operators)

        ops = torch.ops.image
        many, one = ops.decode_jpegs_cuda, ops.decode_jpeg
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ModelError("this torchvision decodes no JPEG; install one that does, or run with --decode cpu") from error
    if device.type == "cuda":
        return lambda inputs: list(many(inputs, _RGB, device))
    return lambda inputs: [one(stream, _RGB, False) for stream in inputs]


def ability(device: torch.device) -> str:
    """Whether a device decodes a small JPEG, in words for people; never raises."""
    try:
        codec = torchvision_codec(device)
        stream = torch.ops.image.encode_jpeg(torch.full((3, 64, 64), 200, dtype=torch.uint8), 90)
        found = codec([stream])[0]
    except (ModelError, RuntimeError) as error:
        return f"decodes no JPEG ({str(error).splitlines()[0]})"
    right = found.shape == (3, 64, 64) and bool((found.to(torch.int32) - 200).abs().max() <= 2)
    return "decodes JPEG" if right else "decodes JPEG wrongly: use --decode cpu"


def averaged(canvas: Tensor, rows: Averages, columns: Averages) -> Tensor:
    """Average uint8[H, W, 3] to uint8[rows, columns, 3]: down, across, rounded once; exact integers below 2^24."""
    device = canvas.device
    first_y, weight_y = _on(rows, canvas.shape[0], device)
    first_x, weight_x = _on(columns, canvas.shape[1], device)
    out = torch.empty((len(first_y), len(first_x), 3), dtype=torch.uint8, device=device)
    step = max(1, BAND_PIXELS // canvas.shape[1])
    for r in range(0, len(out), step):
        sums = _summed(canvas, 0, first_y[r : r + step], weight_y[r : r + step, :, None, None])
        total = _summed(sums, 1, first_x, weight_x[:, :, None])
        out[r : r + step] = total.add_(1 << 15).bitwise_right_shift_(16)
    return out


def _on(axis: Averages, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source px int64[n, taps], those beyond ``size`` (of weight 0) moved within, and weights int32[n, taps]."""
    index = np.minimum(axis.first[:, None] + np.arange(axis.weight.shape[1]), size - 1)
    return torch.from_numpy(index).to(device), torch.from_numpy(axis.weight).to(device)


def _summed(source: Tensor, along: int, index: Tensor, weight: Tensor) -> Tensor:
    """Sum over t of ``weight[:, t]`` times the lines ``index[:, t]`` of ``source`` along an axis, int32."""
    total = source.index_select(along, index[:, 0]).to(torch.int32) * weight[:, 0]
    for t in range(1, index.shape[1]):
        total += source.index_select(along, index[:, t]).to(torch.int32) * weight[:, t]
    return total
