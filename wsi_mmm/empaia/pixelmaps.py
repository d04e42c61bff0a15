"""Pixelmaps: values per pixel of some levels of a slide, posted as a description and then tile by tile.

Tile (x, y) of a level covers its px [x * side, (x + 1) * side) and likewise y. Several channels lie one behind the
other (planar); whether the platform's own viewer reads them so is not published, so prefer one channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from wsi_mmm.empaia.rules import checked_id, checked_name, checked_text
from wsi_mmm.errors import OutputError

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
