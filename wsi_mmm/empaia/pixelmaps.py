"""Pixelmaps: values per pixel of some levels of a slide, posted as a description and then tile by tile; and the map of
how dense objects lie.

Tile (x, y) of a level covers its px [x * side, (x + 1) * side) and likewise y. Several channels lie one behind the
other (planar); whether the platform's own viewer reads them so is not published, so prefer one channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from wsi_mmm.empaia.rules import checked_id, checked_name, checked_text
from wsi_mmm.errors import OutputError
from wsi_mmm.types import F64, I64, Level, SlideInfo

ElementType = Literal[
    "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"
]  # fmt: skip
Classes = tuple[tuple[int, str], ...]
"""(channel or element value, class of the EAD)."""


@dataclass(frozen=True, slots=True)
class MapLevel:
    """A level of the slide that gets tiles. ``tiles`` (x0, y0, x1, y1): their range, both ends in it; None: unsaid."""

    level: int
    tiles: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.tiles or (0, 0, 0, 0)
        if self.level < 0 or not (0 <= x0 <= x1 and 0 <= y0 <= y1):
            raise OutputError(f"level {self.level} of a pixelmap has no such tiles: {self.tiles}")


@dataclass(frozen=True, slots=True)
class Pixelmap:
    """``side``: px of a square tile. ``limits``: least and greatest value; none for nominal ones.

    continuous: float elements; discrete: whole numbers; nominal: whole numbers that ``element_classes`` explains.
    ``neutral``: the value that says nothing (what lies beyond the data).
    """

    name: str
    kind: Literal["continuous", "discrete", "nominal"]
    element_type: ElementType
    wsi_id: str
    levels: tuple[MapLevel, ...]
    side: int = 256
    channels: int = 1
    limits: tuple[float, float] | None = None
    neutral: float | None = None
    element_classes: Classes = ()
    channel_classes: Classes = ()
    description: str | None = None

    def __post_init__(self) -> None:
        checked_name(self.name)
        checked_text(self.description)
        checked_id(self.wsi_id)
        wrong = next((text for text, holds in _map_rules(self) if not holds), None)
        if wrong is not None:
            raise OutputError(f"pixelmap '{self.name}': {wrong}")


def _map_rules(of: Pixelmap) -> list[tuple[str, bool]]:
    """(what must hold, whether it does)."""
    floats = of.element_type.startswith("float")
    low, high = of.limits or (0.0, 1.0)
    values = [*(of.limits or ()), *([] if of.neutral is None else [of.neutral])]
    values += [number for number, _ in of.element_classes]
    return [
        ("continuous ones have float elements, others whole numbers", floats == (of.kind == "continuous")),
        ("nominal ones have no limits, others need them", (of.limits is None) == (of.kind == "nominal")),
        ("the lower limit must lie below the upper", low < high),
        ("nominal ones need classes of their elements", bool(of.element_classes) or of.kind != "nominal"),
        ("continuous ones have no classes of elements", not (of.element_classes and of.kind == "continuous")),
        (f"values must be finite {of.element_type}", all(_fits_type(value, of.element_type) for value in values)),
        ("tiles have 256 to 2048 px", 256 <= of.side <= 2048),
        ("it needs a channel", of.channels >= 1),
        ("it needs levels, each once", len({level.level for level in of.levels}) == len(of.levels) > 0),
        (
            "a number has two classes",
            all(map(_has_no_duplicates, (of.element_classes, of.channel_classes))),
        ),
        ("a class stands for no channel", all(0 <= number < of.channels for number, _ in of.channel_classes)),
        ("a class has 1 to 100 characters", all(0 < len(c) <= 100 for _, c in of.element_classes + of.channel_classes)),
    ]


def _fits_type(value: float, element_type: ElementType) -> bool:
    if not math.isfinite(value):
        return False
    if element_type.startswith("float"):
        return abs(value) <= float(np.finfo(element_type).max)
    span = np.iinfo(element_type)
    return value == int(value) and span.min <= value <= span.max


def _has_no_duplicates(classes: Classes) -> bool:
    return len({number for number, _ in classes}) == len(classes)


def pixelmap_body(of: Pixelmap) -> dict[str, object]:
    """The fields of ``of`` that are its own (no type, no creator)."""
    number = float if of.kind == "continuous" else int
    low, high = of.limits or (None, None)
    return {
        "name": of.name,
        "description": of.description,
        "element_type": of.element_type,
        "min_value": None if low is None else number(low),
        "max_value": None if high is None else number(high),
        "neutral_value": None if of.neutral is None else number(of.neutral),
        "channel_count": of.channels,
        "tilesize": of.side,
        "levels": [_level_body(level) for level in of.levels],
        "element_class_mapping": _class_mapping(of.element_classes),
        "channel_class_mapping": _class_mapping(of.channel_classes),
        "reference_id": of.wsi_id,
        "reference_type": "wsi",
    }


def _level_body(level: MapLevel) -> dict[str, int]:
    names = ("position_min_x", "position_min_y", "position_max_x", "position_max_y")
    return {"slide_level": level.level, **dict(zip(names, level.tiles or (), strict=False))}


def _class_mapping(classes: Classes) -> list[dict[str, int | str]] | None:
    return [{"number_value": number, "class_value": value} for number, value in classes] or None


def tile_length(of: Pixelmap) -> int:
    """Bytes of one tile."""
    return of.side**2 * of.channels * np.dtype(of.element_type).itemsize


def tile_bytes(of: Pixelmap, values: npt.NDArray[np.floating | np.integer]) -> bytes:
    """One tile's bytes, little-endian: ``values`` [h, w] or [channels, h, w], padded with the neutral value.

    OutputError for values that are too many, not finite, beyond the limits, or would change by becoming elements.
    """
    planes = values[None] if values.ndim == 2 else values
    if planes.ndim != 3 or planes.shape[0] != of.channels or max(planes.shape[1:]) > of.side:
        raise OutputError(f"a tile of pixelmap '{of.name}' holds {of.channels} x {of.side} x {of.side} values at most")
    low, high = of.limits or (-math.inf, math.inf)
    if not (np.isfinite(planes).all() and (planes >= low).all() and (planes <= high).all()):
        raise OutputError(f"values of pixelmap '{of.name}' are not finite or lie outside {low:g} to {high:g}")
    full = np.full((of.channels, of.side, of.side), of.neutral or 0, np.dtype(of.element_type).newbyteorder("<"))
    with np.errstate(over="ignore", invalid="ignore"):
        full[:, : planes.shape[1], : planes.shape[2]] = planes
    if of.kind != "continuous" and not np.array_equal(full[:, : planes.shape[1], : planes.shape[2]], planes):
        raise OutputError(f"values of pixelmap '{of.name}' are no {of.element_type}")
    return full.tobytes()


# ------------------------------------------------------------------------------------------------ density

CELL = 100.0  # micrometres: side of a square
_SIDES = (256, 512, 1024)  # px of a tile: few tiles, each far below the 10 MB of a request

PixelBox = tuple[float, float, float, float]


@dataclass(slots=True)
class DensityGrid:
    """Counts of points on a grid of squares over a slide whose mpp is known."""

    info: SlideInfo
    counts: I64 = field(init=False)

    def __post_init__(self) -> None:
        across, down = self.cell
        size = math.ceil(self.info.height / down), math.ceil(self.info.width / across)
        self.counts = np.zeros(size, np.int64)

    @property
    def cell(self) -> tuple[float, float]:
        """Sides (x, y) of a square in level-0 px."""
        return CELL / (self.info.mpp_x or 1.0), CELL / (self.info.mpp_y or 1.0)

    def add(self, points: F64) -> None:
        """Count ``points`` float64[n, 2] (x, y) level-0 px."""
        at = (points / self.cell).astype(np.int64)
        rows, columns = self.counts.shape
        np.add.at(self.counts, (np.clip(at[:, 1], 0, rows - 1), np.clip(at[:, 0], 0, columns - 1)), 1)

    @property
    def highest(self) -> float:
        """Objects per square millimetre where they lie densest."""
        return float(self.counts.max()) * 1e6 / CELL**2

    def pixelmap(self, name: str, wsi_id: str, worked: Sequence[PixelBox]) -> Pixelmap:
        """The map, on the coarsest level with px finer than the squares; its tiles lie over ``worked`` and all objects.

        ``worked``: level-0 rectangles (x0, y0, x1, y1).
        """
        number = self._finest_level()
        level = self.info.levels[number]
        side = next((side for side in _SIDES if max(level.width, level.height) <= side), _SIDES[-1])
        x0, y0, x1, y1 = self._covered_box(worked)
        across, down = side * level.downsample_x, side * level.downsample_y
        last_x, last_y = (level.width - 1) // side, (level.height - 1) // side
        tiles = (
            min(last_x, int(x0 / across)), min(last_y, int(y0 / down)),
            min(last_x, math.ceil(x1 / across) - 1), min(last_y, math.ceil(y1 / down) - 1),
        )  # fmt: skip
        upper = max(1.0, math.ceil(self.highest))
        return Pixelmap(
            name, "continuous", "float32", wsi_id, (MapLevel(number, tiles),), side=side, limits=(0.0, upper),
            neutral=0.0, description=f"objects per square millimetre, in squares of {CELL:g} micrometres",
        )  # fmt: skip

    def tiles(self, of: Pixelmap) -> Iterator[tuple[tuple[int, int, int], F64]]:
        """((level, column, row), values float64[h, w]) of every tile; those at the edge are smaller."""
        found = of.levels[0]
        level = self.info.levels[found.level]
        x0, y0, x1, y1 = found.tiles or (0, 0, 0, 0)
        for row in range(y0, y1 + 1):
            down = self._cell_index(row * of.side, min(level.height, (row + 1) * of.side), level, axis=1)
            for column in range(x0, x1 + 1):
                across = self._cell_index(column * of.side, min(level.width, (column + 1) * of.side), level, axis=0)
                yield (found.level, column, row), np.float64(1e6 / CELL**2) * self.counts[np.ix_(down, across)]

    def _cell_index(self, start: int, stop: int, level: Level, *, axis: int) -> I64:
        """In which squares the px ``start`` to ``stop`` of a level have their middle."""
        downsample = (level.downsample_x, level.downsample_y)[axis]
        middle = (np.arange(start, stop) + 0.5) * downsample
        found: I64 = np.minimum((middle / self.cell[axis]).astype(np.int64), self.counts.shape[1 - axis] - 1)
        return found

    def _finest_level(self) -> int:
        fine = [
            i for i, one in enumerate(self.info.levels) if max(one.downsample_x, one.downsample_y) <= min(self.cell)
        ]
        return fine[-1] if fine else 0

    def _covered_box(self, worked: Sequence[PixelBox]) -> PixelBox:
        """The rectangle round what was worked on and what was found; never empty, inside the slide."""
        across, down = self.cell
        rows, columns = np.nonzero(self.counts)
        boxes = [*worked]
        if len(rows):
            low, high = (
                (columns.min() * across, rows.min() * down),
                ((columns.max() + 1) * across, (rows.max() + 1) * down),
            )
            boxes.append((*low, *high))
        if not boxes:
            return 0.0, 0.0, 1.0, 1.0
        x0, y0, x1, y1 = (pick(side) for pick, side in zip((min, min, max, max), zip(*boxes, strict=True), strict=True))
        return x0, y0, min(max(x1, x0 + 1.0), self.info.width), min(max(y1, y0 + 1.0), self.info.height)
