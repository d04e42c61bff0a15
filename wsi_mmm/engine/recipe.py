"""The recipe: everything a result depends on, and what it does not."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from wsi_mmm.errors import RecipeError
from wsi_mmm.model.identity import RUNTIMES

RESULT_FORMAT = 3  # raised when the same recipe would give other objects or other files

_VALUES = ("model_hash", "tasks", "mpp", "tile", "overlap", "features", "runtime")
_SHOWN = (
    "model", "model_hash", "tasks", "mpp", "tile", "overlap", "tissue", "min_tissue", "features", "encoder",
    "save_maps", "bounds_offset", "gzip", "runtime", "regions", "overlay",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """How slides are turned into results.

    ``model``: name or path of a model, or of a bare encoder when ``encoder`` is true; ``model_hash`` identifies its
    weights. ``mpp`` micrometres per target px; ``tile``/``overlap`` target px; ``tissue``: "auto", "none" or a URI.
    ``regions``: URI of polygons (level-0 px) outside of which nothing is done, or None; see `outputs.inside`.
    ``overlay``: whether the picture for people is drawn, which reads the slide once more.
    The lower half changes speed and places only: results do not depend on it. ``user_cache``: folder, on the machine
    that works, of what is kept per user (``~`` is that machine's); None keeps nothing.
    """

    model: str
    model_hash: str
    tasks: tuple[str, ...]
    mpp: float
    tile: int
    overlap: int
    tissue: str = "auto"
    min_tissue: float = 0.02
    features: bool = True
    encoder: bool = False
    weights: str | None = None
    save_maps: bool = False
    bounds_offset: bool = False
    gzip: bool = True
    runtime: str = "eager"
    regions: str | None = None
    overlay: bool = True

    block_tiles: int = 4
    batch_size: int = 64
    device: str = "auto"
    threads: int | None = None
    cache: str | None = None
    cache_tiles: str = "auto"
    cache_quota: int | None = None
    user_cache: str | None = None
    reader: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise RecipeError(f"mpp must be a positive number of micrometres per pixel, not {self.mpp}")
        if self.tasks:
            self._check_maps()
        if self.tile < 16 or not 0 <= self.overlap < self.tile:
            sizes = f"tile size {self.tile} px and overlap {self.overlap} px"
            raise RecipeError(f"{sizes} do not fit: tiles have at least 16 px and overlap by less than themselves")
        if not 1 <= self.block_tiles <= 64:
            raise RecipeError(f"block_tiles must be between 1 and 64, not {self.block_tiles}")
        if self.batch_size < 1:
            raise RecipeError(f"batch size must be at least 1, not {self.batch_size}")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"threads must be at least 1, not {self.threads}")
        if self.cache_tiles not in ("auto", "on", "off"):
            raise RecipeError(f"cache_tiles is auto, on or off, not {self.cache_tiles!r}")
        if self.cache_tiles == "on" and self.cache is None:
            raise RecipeError("tiles can only be cached where there is a cache: name a folder with --cache")
        if not 0 <= self.min_tissue <= 1:
            raise RecipeError(f"min_tissue is a share between 0 and 1, not {self.min_tissue}")
        if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", self.device):
            raise RecipeError(f"there is no device {self.device!r}; choose auto, cpu, cuda or cuda:N")
        if self.runtime not in RUNTIMES:
            raise RecipeError(f"there is no runtime {self.runtime!r}; choose one of: {', '.join(RUNTIMES)}")

    def _check_maps(self) -> None:
        """Maps of neighbouring tiles must lie on one grid of map pixels (strides up to 8, encoders down to 32)."""
        if self.tile < 64 or self.tile % 32:
            raise RecipeError(f"tile size must be a multiple of 32 px of at least 64, not {self.tile}")
        if not 0 <= self.overlap <= self.tile // 2 or self.overlap % 8:
            raise RecipeError(f"overlap must be a multiple of 8 px and at most half a tile, not {self.overlap}")

    def forward_hash(self, kind: str, scale: tuple[float, float], reader: str = "") -> str:
        """Hash of what the network's values depend on.

        ``kind``: the kind of device ("cpu", "cuda"); ``scale``: level-0 px per target px (x, y), which a user who
        corrects a slide's mpp changes;
        ``reader``: the reader that opened the slide, because readers differ in the levels and scales they read.
        """
        facts = {"device": kind, "block_tiles": self.block_tiles, "scale": scale, "reader": reader}
        return self._hash(facts, _VALUES)

    def result_hash(self, reader: str = "") -> str:
        """Hash of what the published objects depend on; ``reader``: the reader that opened the slide."""
        tissue = self.tissue if self.tissue in ("auto", "none") else "file"  # its content is compared apart
        files = {"save_maps": self.save_maps, "gzip": self.gzip, "bounds": self.bounds_offset}
        place: dict[str, Any] = {"regions": "file"} if self.regions else {}
        place |= {} if self.overlay else {"overlay": False}
        return self._hash({"tissue": tissue, "reader": reader, **files, **place}, (*_VALUES, "min_tissue"))

    def _hash(self, extra: dict[str, Any], names: tuple[str, ...]) -> str:
        facts = {"format": RESULT_FORMAT, **extra, **{name: getattr(self, name) for name in names}}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def public(self) -> dict[str, Any]:
        """The recipe as a JSON object for reports."""
        return asdict(self)

    def published(self) -> dict[str, Any]:
        """The part of the recipe that a result depends on, for slide.json: nothing of time or place."""
        return {name: getattr(self, name) for name in _SHOWN}
