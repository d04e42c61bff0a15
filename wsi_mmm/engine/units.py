"""The records that travel between the scheduler and an executor, and the Executor port.

A work unit is a few hundred bytes: no pixels, no secrets. The worker that runs it opens the slide itself.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any, Literal, Protocol

import numpy as np

from wsi_mmm.engine.events import Listener, SlideStatus
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.errors import ModelNotLoaded, WsiError
from wsi_mmm.tiles.grid import tile_xy
from wsi_mmm.tiles.listed import corners_of
from wsi_mmm.timing import StepTime
from wsi_mmm.types import F32, F64, I64, Grid, SlideInfo

Kind = Literal["plan", "extract", "forward", "interpret", "publish"]
UnitStatus = Literal["ok", "partial", "failed", "cached"]
BlockIndex = tuple[int, int]
"""Row and column of a block of tiles."""
Box = tuple[int, int, int, int]
"""Level-0 (x, y, width, height)."""


@dataclass(frozen=True, slots=True)
class SlideTask:
    """One slide to be done: where it is, what the user said of it, where its results go.

    ``error``: why it cannot be done, known from the start (a wrong row of a manifest). ``reader``: the name of the
    reader that opened the slide, known from the plan step on; empty before. ``scene``: the image of its file that the
    user chose. ``tiles``: the file that lists its tiles, None: those of the grid that hold tissue.
    """

    id: str
    uri: str
    output: str
    recipe: Recipe
    mpp: float | None = None
    mask: str | None = None
    error: str = ""
    reader: str = ""
    scene: int | None = None
    tiles: str | None = None

    @property
    def scratch(self) -> str:
        """Folder for parts and, without a cache, maps; removed once the slide is published."""
        return f"{self.output}/.work/{self.result_hash()}"

    def result_hash(self) -> str:
        """Hash of what the objects depend on: the recipe, the reader, and what the user said of this slide.

        The content of a mask file or a list of tiles is compared apart (slide.json keeps its hash): where it lies does
        not matter.
        """
        recipe, masked, listed = self.recipe.result_hash(self.reader), self.mask is not None, self.tiles is not None
        if self.mpp is None and not masked and self.scene is None and not listed:
            return recipe
        said = [recipe, self.mpp, masked, *([] if self.scene is None else [self.scene]), *(["tiles"] if listed else [])]
        return sha256(json.dumps(said).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """One slide, planned: its grid and the tiles ``index`` int64[n, 2] (row, column) that hold tissue.

    ``tissue`` float32[n]: share of each tile that is tissue. ``entry``: URI of the cache entry that holds its values.
    ``maps``: some task answers per pixel, so blocks are interpreted. ``places`` int64[n, 4]: where listed tiles lie
    (`wsi_mmm.tiles.listed`), None on a grid. ``tissue_px2``: level-0 px² of tissue in those tiles, of each of the
    slide's places (`outputs.places`).
    """

    slide: SlideTask
    info: SlideInfo
    grid: Grid
    index: I64
    tissue: F32
    entry: str
    halo: int
    stride: int
    mpp_effective: float
    maps: bool = True
    places: I64 | None = None
    tissue_px2: F64 = field(default_factory=lambda: np.zeros(1))

    def corners(self) -> I64:
        """Return level-0 (x, y) int64[n, 2] of the tiles."""
        return tile_xy(self.grid, self.index) if self.places is None else corners_of(self.grid, self.places)


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """The smallest piece of a run that is scheduled and resumed.

    ``block`` (row, column) of the block grid; ``tiles`` packs int32 (row, column) pairs; ``entry``: URI of the cache
    entry that holds its values. ``grid``: None until the slide is planned.
    """

    kind: Kind
    slide: SlideTask
    block: BlockIndex = (0, 0)
    tiles: bytes = b""
    grid: Grid | None = None
    entry: str = ""

    @property
    def name(self) -> str:
        """Unique within a run."""
        return unit_name(self.slide.id, self.kind, self.block)

    @property
    def planned_grid(self) -> Grid:
        """The grid, of a unit whose slide is planned."""
        assert self.grid is not None
        return self.grid

    def index(self) -> I64:
        """The tiles of this unit, int64[n, 2] (row, column)."""
        return np.frombuffer(self.tiles, np.int32).reshape(-1, 2).astype(np.int64)


def pack_tiles(index: I64) -> bytes:
    """Tiles int64[n, 2] as the bytes that a WorkUnit holds."""
    return index.astype(np.int32).tobytes()


def unit_name(slide: str, kind: Kind, block: BlockIndex) -> str:
    """The name of a unit within a run: ``slide/kind/row-column``."""
    return f"{slide}/{kind}/{block[0]}-{block[1]}"


# ---------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """Facts that every result has: which unit it is of, where that ran and what it took.

    ``worker``: host:pid; ``bytes_read``: by this process from this slide so far; ``times``: one per step.
    """

    kind: Kind
    slide: str
    block: BlockIndex = (0, 0)
    pid: int = 0
    worker: str = ""
    bytes_read: int = 0
    peak_rss_mb: float = 0.0
    times: tuple[StepTime, ...] = ()

    @property
    def name(self) -> str:
        """The name of the unit."""
        return unit_name(self.slide, self.kind, self.block)


@dataclass(frozen=True, slots=True)
class SlideSummary:
    """The parts of slide.json that reports show. ``cost``: the row of the run that did the slide, when that is kept."""

    status: SlideStatus
    tiles: int = 0
    objects: Mapping[str, int] = field(default_factory=dict)
    classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    mpp_effective: float | None = None
    reader: str | None = None
    answers: Mapping[str, str | float | None] | None = None
    cost: Mapping[str, Any] | None = None

    @property
    def object_count(self) -> int:
        """Objects of all tasks."""
        return sum(self.objects.values())

    @staticmethod
    def from_json(facts: Mapping[str, Any]) -> SlideSummary:
        """The summary of what slide.json holds."""
        found = {one.name: facts[one.name] for one in fields(SlideSummary) if one.name in facts}
        return SlideSummary(**{**found, "status": SlideStatus(facts.get("status", "done"))})


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A slide was planned; or an earlier run has published it (``published``), and there is no plan."""

    facts: UnitFacts
    plan: SlidePlan | None = None
    published: SlideSummary | None = None


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """Pixels were put into the shared cache."""

    facts: UnitFacts


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """A block went through the network, or an earlier run had done that (``cached``).

    ``failed``: tiles with pixels that cannot be read; ``encoder``: JSON of what the Runner chose; ``tile_cache``: what
    was measured and chosen for the slide's tiles, for people.
    """

    facts: UnitFacts
    tiles: int
    failed: tuple[Box, ...] = ()
    cached: bool = False
    device: str = ""
    encoder: str = ""
    tile_cache: str = ""


@dataclass(frozen=True, slots=True)
class InterpretResult:
    """The objects of a block were written to its part file."""

    facts: UnitFacts
    objects: int = 0


@dataclass(frozen=True, slots=True)
class PublishResult:
    """The files of a slide were written."""

    facts: UnitFacts
    summary: SlideSummary


@dataclass(frozen=True, slots=True)
class Failure:
    """A unit raised. ``error``: one line; ``traceback``: only for faults that are not the user's. ``of_model``: the
    model cannot be loaded, so that no slide can be done."""

    facts: UnitFacts
    error: str
    traceback: str = ""
    of_model: bool = False


UnitResult = PlanResult | ExtractResult | ForwardResult | InterpretResult | PublishResult | Failure


def result_status(result: UnitResult) -> UnitStatus:
    """The outcome of a unit in one word, for logs and metrics."""
    match result:
        case Failure():
            return "failed"
        case ForwardResult(cached=True):
            return "cached"
        case PlanResult(published=SlideSummary()):
            return "cached"
        case ForwardResult(failed=failed) if failed:
            return "partial"
        case _:
            return "ok"


def failure_of(unit: WorkUnit, error: BaseException) -> Failure:
    """The result of a unit that raised. Our own errors explain themselves; others come with their traceback."""
    known = isinstance(error, WsiError)
    text = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
    detail = "" if known else "".join(traceback.format_exception(error))
    facts = UnitFacts(unit.kind, unit.slide.id, unit.block, os.getpid())
    return Failure(facts, text, detail, isinstance(error, ModelNotLoaded))


# ---------------------------------------------------------------- the port

Watch = Callable[[WorkUnit | UnitResult], None]
"""Called with every unit that is started and with every result, in the thread that drives the run."""

Announce = Callable[[str, int, threading.Event], AbstractContextManager[Listener]]
"""Given a run's output, its number of slides and its stop event: a context in which other jobs on the same workers see
the run, share the workers with it and may stop it. It gives a listener that must hear the run's events."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Facts about an executor that a run needs to know.

    ``many_workers``: slides are shared by many workers, so the largest are best started first; ``warnings``: workers
    that cannot be used; ``announce``: None where nobody else shares the workers.
    """

    many_workers: bool = False
    dashboard: str = ""
    warnings: tuple[str, ...] = ()
    announce: Announce | None = None


class Executor(Protocol):
    """Runs units in any order, each at least once. `SerialExecutor` is the specification."""

    @property
    def capabilities(self) -> Capabilities:
        """The facts about this executor; they do not change."""

    def room(self, kind: Kind) -> int:
        """How many more units of this kind may be started now."""

    def start(self, unit: WorkUnit) -> None:
        """Begin a unit."""

    def wait(self, timeout: float) -> UnitResult | None:
        """The next result, or None after ``timeout`` seconds. A unit that raised gives a Failure."""

    def close(self, *, cancel: bool = False) -> None:
        """Release threads, processes and open slides; with ``cancel``, drop units that have not begun."""
