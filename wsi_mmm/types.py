"""Frozen records that every room passes on. No I/O, no heavy imports.

Words: *level-0 px* are pixels of the full-resolution level in the uncropped OpenSlide frame;
*target px* are pixels of the grid at the recipe's mpp, anchored at level-0 (0, 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Level:
    """One pyramid level. ``downsample_x`` = level-0 width / this width, exactly (likewise y)."""

    width: int
    height: int
    downsample_x: float
    downsample_y: float
    tile_width: int
    tile_height: int


class _Later:
    """A text field that takes, in place of the text, what finds it: called when the text is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: object | None, owner: type | None = None) -> str:
        if instance is None:
            raise AttributeError(self._name)  # tells dataclass that the field has no default
        value = instance.__dict__[self._name]
        if callable(value):
            value = instance.__dict__[self._name] = value()
        return str(value)

    def __set__(self, instance: object, value: str | Callable[[], str]) -> None:
        instance.__dict__[self._name] = value


@dataclass(frozen=True)
class SlideInfo:
    """The facts of a slide, from its file (``mpp`` may be overridden by the user).

    ``fingerprint`` is hex of a hash of content samples: equal for equal bytes on any storage. Of a remote slide it is
    found when first asked for, while the slide is open (16 small requests); pickling asks for it.
    ``mpp_x``/``mpp_y``: micrometres per level-0 pixel, or None when the slide does not say.
    ``bounds_x``/``bounds_y``: offset of the scanned area as OpenSlide reports it (0 when none).
    """

    uri: str
    width: int
    height: int
    mpp_x: float | None
    mpp_y: float | None
    levels: tuple[Level, ...]
    vendor: str
    reader: str
    fingerprint: _Later = _Later()  # a str to those who read it
    objective: float | None = None
    bounds_x: int = 0
    bounds_y: int = 0
    properties: Mapping[str, str] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_fingerprint": self.fingerprint}


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of the target grid to be read.

    Output pixel ``k`` (``x <= k < x + width``) covers the level-0 interval
    ``[origin_x + k * scale_x, origin_x + (k + 1) * scale_x)``; likewise y. Because the interval is
    computed from the absolute integer ``k``, a pixel's value does not depend on the block it is read in.
    ``scale`` is level-0 px per target px (1.0: level 0 itself; below 1.0 is upsampling).
    """

    x: int
    y: int
    width: int
    height: int
    scale_x: float
    scale_y: float
    origin_x: int = 0
    origin_y: int = 0


@dataclass(frozen=True, slots=True)
class Tiles:
    """n square tiles of a target grid, to be read together.

    ``xy`` int64[n, 2]: target px (x, y) of their top-left corners; ``size``: their side in target px, ``overlap`` what
    they share with their neighbours in the grid. Target px are those of a `Block` with origin 0.
    """

    xy: I64
    size: int
    scale_x: float
    scale_y: float
    overlap: int = 0


@dataclass(frozen=True, slots=True)
class Canvas:
    """Pixels that a Reader returns: ``pixels`` uint8[height, width, 3] RGB, white outside the slide.

    ``failed`` int64[n, 4]: level-0 rectangles (x0, y0, x1, y1) that could not be decoded (white in ``pixels``).
    """

    pixels: U8
    failed: I64


@dataclass(frozen=True, slots=True)
class Grid:
    """The target grid of one slide: ``columns`` x ``rows`` tiles of ``tile`` target px, ``stride`` apart.

    ``width``/``height``: size of the slide in target px (the last tiles may reach beyond it: white).
    ``mpp`` is the requested one; ``mpp_effective`` = scale * slide mpp (they differ only by float rounding).
    ``listed``: digest of the list that says where the tiles are, not the grid (`wsi_mmm.tiles.listed`); else empty.
    """

    tile: int
    overlap: int
    columns: int
    rows: int
    width: int
    height: int
    scale_x: float
    scale_y: float
    mpp: float
    listed: str = ""

    @property
    def stride(self) -> int:
        """Target px between the left edges of neighbouring tiles."""
        return self.tile - self.overlap


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles on their way to the model.

    ``pixels`` uint8[n, tile, tile, 3]; ``xy`` int64[n, 2] level-0 px of the top-left corner (x, y);
    ``index`` int64[n, 2] (row, column) in the grid; ``failed`` bool[n]: some pixel of the tile could not be read.
    """

    pixels: U8
    xy: I64
    index: I64
    failed: Mask


@dataclass(frozen=True, slots=True)
class Objects:
    """n polygons of one task, as ragged arrays; nothing per object lives in Python.

    ``coords`` float64[m, 2] (x, y) level-0 px. Ring r is ``coords[ring_offsets[r]:ring_offsets[r + 1]]``, *not* closed
    (the first point is not repeated). Object i owns rings ``object_offsets[i]:object_offsets[i + 1]``: the first is the
    exterior, the others are holes. ``class_index`` int32[n]; ``anchor`` int64[n, 2] (y, x) in target px, unique
    within a task (within a class where masks may lie on each other): the pixel that owns the object and the key it is
    sorted by. ``measurements``: name -> float64[n].
    """

    task: str
    coords: F64
    ring_offsets: I64
    object_offsets: I64
    class_index: I32
    anchor: I64
    measurements: Mapping[str, F64] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.class_index)


REGION_KINDS = ("segment", "multisegment")
TILE_KINDS = ("classify", "multilabel", "regress", "survive")


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """The facts of a task that files need: its name, kind, class names, class colours (r, g, b), and its scope, if
    known."""

    name: str
    kind: str
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    scope: str = ""

    @property
    def draws_tiles(self) -> bool:
        """True if its objects are whole tiles, one each."""
        return self.scope in ("tile", "bag") or self.kind in TILE_KINDS

    @property
    def dissolves(self) -> bool:
        """True if its objects are regions, which seams cut and `outputs.merge` makes whole again."""
        return self.kind in REGION_KINDS
