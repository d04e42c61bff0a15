"""The records that travel between the street and an executor, and the Executor port.

A work is a few hundred bytes: no pixels, no secrets. Whoever performs it opens the slide itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, Protocol

import numpy as np

from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.timing import Lap
from wsi_mmm.types import I64, Grid

Kind = Literal["plan", "extract", "forward", "interpret", "publish"]
Placement = Literal["beside", "pool"]
Status = Literal["ok", "partial", "failed", "cached"]


@dataclass(frozen=True, slots=True)
class SlideTask:
    """One slide to be done: where it is, what the user said of it, where its results go.

    ``error``: why it cannot be done, known from the start (a wrong row of a manifest). ``reader``: the name of the
    reader that opened the slide, known from the plan step on; empty before.
    """

    id: str
    uri: str
    output: str
    recipe: Recipe
    mpp: float | None = None
    mask: str | None = None
    error: str = ""
    reader: str = ""

    @property
    def scratch(self) -> str:
        """Folder for parts and, without a cache, maps; gone once the slide is published."""
        return f"{self.output}/.work/{self.result_hash()}"

    def result_hash(self) -> str:
        """Hash of what the objects depend on: the recipe, the reader, and what the user said of this slide.

        What a mask file holds is compared apart (slide.json keeps its hash): where it lies does not matter.
        """
        recipe, masked = self.recipe.result_hash(self.reader), self.mask is not None
        if self.mpp is None and not masked:
            return recipe
        return sha256(json.dumps([recipe, self.mpp, masked]).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """One thing to do. ``block`` (row, column) of the block grid; ``tiles`` packs int32 (row, column) pairs."""

    kind: Kind
    slide: SlideTask
    block: tuple[int, int] = (0, 0)
    tiles: bytes = b""
    grid: Grid | None = None
    entry: str = ""

    @property
    def name(self) -> str:
        """Unique within a run."""
        return f"{self.slide.id}/{self.kind}/{self.block[0]}-{self.block[1]}"

    def index(self) -> I64:
        """The tiles of this work, int64[n, 2] (row, column)."""
        return np.frombuffer(self.tiles, np.int32).reshape(-1, 2).astype(np.int64)


def pack(index: I64) -> bytes:
    """Tiles int64[n, 2] as the bytes that a Work carries."""
    return index.astype(np.int32).tobytes()


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What came of a work. ``failed``: level-0 (x, y, width, height) of tiles with unreadable pixels.

    ``busy``: (start, end) epoch seconds in which the model ran; ``bytes_read`` is cumulative for (pid, slide).
    ``encoder``: JSON of what the Runner chose. ``laps``: where the time of the threads of ``worker`` (host:pid) went.
    """

    kind: Kind
    slide: str
    block: tuple[int, int]
    status: Status
    error: str = ""
    tiles: int = 0
    failed: tuple[tuple[int, int, int, int], ...] = ()
    objects: int = 0
    busy: tuple[tuple[float, float], ...] = ()
    pid: int = 0
    bytes_read: int = 0
    cache_hits: int = 0
    peak_rss_mb: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    device: str = ""
    encoder: str = ""
    payload: Any = None
    laps: tuple[Lap, ...] = ()
    worker: str = ""

    @property
    def name(self) -> str:
        """That of the work."""
        return f"{self.slide}/{self.kind}/{self.block[0]}-{self.block[1]}"


class Executor(Protocol):
    """Performs works in any order, each at least once. The serial executor is the specification."""

    def room(self, kind: Kind) -> int:
        """How many more works of this kind may be started now."""

    def start(self, unit: WorkUnit) -> None:
        """Begin a work; returns at once."""

    def wait(self, timeout: float) -> UnitResult | None:
        """The next finished work's receipt, or None after ``timeout`` seconds. A failed work is a receipt too."""

    def close(self, *, cancel: bool = False) -> None:
        """Let go of threads, processes and open slides; with ``cancel``, drop what has not begun."""
