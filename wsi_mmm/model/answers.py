"""The answers of a model for tiles, however it is run. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_mmm.types import F32, U8


@dataclass(frozen=True, slots=True)
class RunOutput:
    """``features`` float32[n, D]; ``maps`` of pixel tasks uint8[n, C, h, w]; ``tables`` of tile tasks [n, K], uint8
    or float32."""

    features: F32
    maps: dict[str, U8]
    tables: dict[str, U8 | F32]
