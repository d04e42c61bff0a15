"""The Reader port, and the Slide a user holds.

A reader turns a :class:`~wsi_mmm.types.Block` of a target grid into pixels. It is thread-safe: several threads call
``read`` at once, and no native tile is decoded twice at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, runtime_checkable

from wsi_mmm.errors import MppUnknown, OptionError, SlideDamaged
from wsi_mmm.types import I64, U8, Block, Canvas, SlideInfo, Tiles

_MAX_REGION = 1 << 30
PLAUSIBLE_MPP = (0.01, 100.0)
COARSEST_BY_TAGS = 10.0
"""Micrometres per px; resolution tags of 72, 300 or 600 dpi are what image writers put there by habit."""
NO_MPP = "wsi_mmm.no_mpp"
"""The property that holds why a slide has no resolution, such as a resolution of print in its tags."""
OPEN_WITH_MPP = "open it with open_slide(uri, mpp=0.25), micrometres per pixel"


@dataclass(frozen=True, slots=True)
class ReadStats:
    """The cumulative cost of a reader: bytes and requests of storage, native tiles decoded."""

    bytes_read: int = 0
    requests: int = 0
    tiles_decoded: int = 0


class Reader(Protocol):
    """Pixels of one slide. ``read`` never raises for a native tile that cannot be decoded: it is white and listed."""

    @property
    def info(self) -> SlideInfo:
        """Size, levels, resolution and fingerprint; constant."""

    def read(self, block: Block) -> Canvas:
        """Return the block's pixels. Raises StorageError when bytes cannot be fetched."""

    def stats(self) -> ReadStats:
        """Return the cumulative cost."""

    def close(self) -> None:
        """Let go of files and connections; reading afterwards is an error."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Compressed native tiles of a level, by number: what ``fetch`` brought, for ``read_tiles`` to decode."""

    level: int
    data: Mapping[int, bytes | memoryview]


NOTHING_FETCHED = Fetched(0, {})


@runtime_checkable
class TileReader(Reader, Protocol):
    """A Reader that can bring bytes ahead of their use and decode straight into tiles.

    ``remote``: fetching waits for a network, so it pays to fetch well ahead and much at a time.
    """

    @property
    def remote(self) -> bool:
        """True when fetching waits for a network."""

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        """Bring what these tiles (all of one scale) need, in merged ranges; decode nothing. Raises StorageError."""

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        """Write n tiles to ``out``, arrays uint8[size, size, 3], as ``read`` would give them; white beyond the slide.

        Return int64[m, 4], the level-0 rectangles that could not be decoded (white). What is not in ``fetched`` is
        fetched. Raises StorageError.
        """


@dataclass(frozen=True, slots=True)
class ReaderPlugin:
    """A reader that an installed package offers under the entry points ``wsi_mmm.readers``.

    ``open_reader(uri)`` opens a slide; ``recognises(uri, head)`` says whether the file is of its format, from the URI
    and the first 132 bytes; ``suffixes`` (lower case, with the dot) are those by which files in a folder count as
    slides."""

    open_reader: Callable[[str], Reader]
    recognises: Callable[[str, bytes], bool]
    suffixes: tuple[str, ...] = ()


class Slide:
    """A slide: a Reader with the resolution that holds (its own, or the one the user gave)."""

    def __init__(self, reader: Reader, mpp: float | None = None) -> None:
        self.reader = reader
        self.info = reader.info if mpp is None else _with_mpp(reader.info, float(mpp))

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of files and connections."""
        self.reader.close()

    def scale(self, mpp: float, fix: str = OPEN_WITH_MPP) -> tuple[float, float]:
        """Return level-0 px per target px at ``mpp``, (x, y). Raises MppUnknown, which ends in ``fix``, OptionError."""
        check_mpp(mpp)
        mpp_x, mpp_y = require_mpp(self.info, fix)
        return mpp / mpp_x, mpp / mpp_y

    def read_region(self, x0: int, y0: int, width: int, height: int, mpp: float | None = None) -> U8:
        """Return uint8[height, width, 3]: ``width`` x ``height`` px at ``mpp`` (None: level 0) from level-0 (x0, y0).

        White outside the slide. Raises SlideDamaged when a native tile in it cannot be decoded.
        """
        scale_x, scale_y = (1.0, 1.0) if mpp is None else self.scale(mpp)
        if width <= 0 or height <= 0 or width * height > _MAX_REGION:
            raise OptionError(f"a region of {width} x {height} px cannot be read; give 1 to {_MAX_REGION} px")
        canvas = self.reader.read(Block(0, 0, width, height, scale_x, scale_y, int(x0), int(y0)))
        if len(canvas.failed):
            x, y, x1, y1 = canvas.failed[0].tolist()
            raise SlideDamaged(
                f"{self.info.uri}: {len(canvas.failed)} native tile(s) cannot be decoded, "
                f"the first at level-0 px ({x}, {y}) to ({x1}, {y1})"
            )
        return canvas.pixels

    def thumbnail(self, max_size: int) -> U8:
        """Return the whole slide as uint8[h, w, 3], its longer side ``max_size`` px; damaged tiles are white."""
        if max_size <= 0:
            raise OptionError(f"a thumbnail of {max_size} px cannot be made; give a size of at least 1")
        scale = max(max(self.info.width, self.info.height) / max_size, 1.0)
        width = max(1, round(self.info.width / scale))
        height = max(1, round(self.info.height / scale))
        block = Block(0, 0, width, height, self.info.width / width, self.info.height / height)
        return self.reader.read(block).pixels


def _with_mpp(info: SlideInfo, mpp: float) -> SlideInfo:
    # The fingerprint is passed on as what finds it: it may not be known yet, and costs requests.
    return replace(info, mpp_x=mpp, mpp_y=mpp, fingerprint=lambda: info.fingerprint)


def require_mpp(info: SlideInfo, fix: str = OPEN_WITH_MPP) -> tuple[float, float]:
    """Return micrometres per level-0 px, (x, y). Raises MppUnknown: why there are none, and ``fix``."""
    if info.mpp_x is None or info.mpp_y is None:
        why = info.properties.get(NO_MPP)
        raise MppUnknown(f"{info.uri} does not say its resolution{f' ({why})' if why else ''}; {fix}")
    return info.mpp_x, info.mpp_y


def print_resolution(mpp: float) -> str:
    """Return the words for tags whose pixel would measure ``mpp``: too large for a slide, usual for printing."""
    return f"its tags say {25400 / mpp:.0f} dpi, a resolution of print"


def check_mpp(mpp: float) -> None:
    """Raise OptionError unless ``mpp`` is a finite number above 0."""
    if not math.isfinite(mpp) or mpp <= 0:
        raise OptionError(f"mpp must be a number above 0 (micrometres per pixel), not {mpp}")
