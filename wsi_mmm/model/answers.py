"""The answers of a model for tiles, and what runs one, in whatever way. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from wsi_mmm.types import F32, U8


@dataclass(frozen=True, slots=True)
class RunOutput:
    """``features`` float32[n, D]; ``maps`` of pixel tasks uint8[n, C, h, w]; ``tables`` of tile tasks [n, K], uint8
    or float32."""

    features: F32
    maps: dict[str, U8]
    tables: dict[str, U8 | F32]


class TileRunner(Protocol):
    """A model on its device, callable from several threads at once: `runner.Runner`, `script_runner.ScriptRunner`."""

    @property
    def device(self) -> object:
        """The device, whose str is its name."""

    def begin(self, pixels: U8, tasks: Sequence[str] = ()) -> Any:
        """Begin to compute tiles uint8[n, s, s, 3] and return at once what `finish` takes."""

    def finish(self, pending: Any, count: int) -> RunOutput:
        """Wait for the answers of ``count`` tiles; raises what computing them raised."""

    def answer_bag(self, vectors: F32, tasks: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, F32]]:
        """The answers for one bag of vectors."""

    def describe(self) -> dict[str, Any]:
        """Return how it runs, for reports."""
