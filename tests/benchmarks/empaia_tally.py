"""What an app asked a platform for and posted to it, and how little would have done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import shapely
from aiohttp import web

from helpers.empaia_platform import MOST_PIXELS, FakePlatform
from wsi_mmm.types import F64, I64, Level

MEGAPIXEL = 1 << 20  # px of a picture of the least: the same however large the app's pictures are
NEAR = 5.0  # level-0 px between centroids of what is the same object, drawn otherwise
Corners = Sequence[Sequence[int]]


class Window(NamedTuple):
    """Px of a level."""

    x: int
    y: int
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """How many."""
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was given: which, in which format, and its bytes."""

    level: int
    window: Window
    format: str
    size: int


@dataclass(frozen=True, slots=True)
class Post:
    """What one request posted: of which output, what it is, and its bytes."""

    output: str
    kind: str
    size: int


@dataclass
class MeasuredPlatform(FakePlatform):
    """A platform that writes down every picture and every post. ``forgets``: items of collections are not kept."""

    pictures: list[Picture] = field(default_factory=list)
    posted: list[Post] = field(default_factory=list)
    forgets: bool = False

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        answer: web.StreamResponse = await super()._guard(request, handler)
        at = request.match_info
        if "l" in at and answer.status == 200:
            self.pictures.append(self._given(request, len(answer.body)))  # type: ignore[attr-defined]
        elif request.path.endswith(("/items", "/data")) or "/outputs/" in request.path:
            key = at.get("key") or next(key for key, one in self.outputs.items() if one["id"] == at["id"])
            self.posted.append(Post(key, kind_of(self.outputs[key]), request.content_length or 0))
            if self.forgets and request.path.endswith("/items"):
                self.items[at["id"]].clear()
        return answer

    def _given(self, request: web.Request, size: int) -> Picture:
        at = {name: int(value) for name, value in request.match_info.items() if name != "id"}
        kind = request.query.get("image_format", "jpeg")
        if "w" in at:
            return Picture(at["l"], Window(at["x"], at["y"], at["w"], at["h"]), kind, size)
        top = self.slides[request.match_info["id"]].info.levels[0]
        place = Window(at["x"] * top.tile_width, at["y"] * top.tile_height, top.tile_width, top.tile_height)
        return Picture(at["l"], place, kind, size)


def kind_of(output: dict[str, Any]) -> str:
    """Objects, classes, primitives or pixelmap."""
    name = output.get("item_type", output["type"])
    if name.endswith("pixelmap"):
        return "pixelmap"
    return {"polygon": "objects", "class": "classes"}.get(name, "primitives")


# ------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True, slots=True)
class Asked:
    """Calls, bytes and px of some pictures. ``again``: calls for a picture that had been given before."""

    calls: int
    size: int
    pixels: int
    again: int


def asked(pictures: Sequence[Picture]) -> Asked:
    """The sum of these pictures."""
    distinct = {(one.level, one.window) for one in pictures}
    return Asked(
        len(pictures),
        sum(one.size for one in pictures),
        sum(one.window.pixels for one in pictures),
        len(pictures) - len(distinct),
    )


def level_read(pictures: Sequence[Picture]) -> int:
    """The level of which most px were asked for."""
    pixels: Counter[int] = Counter()
    for one in pictures:
        pixels[one.level] += one.window.pixels
    return pixels.most_common(1)[0][0]


def on_level(boxes: F64 | I64, level: Level) -> I64:
    """Level-0 boxes [n, 4] (x0, y0, x1, y1) as whole px of ``level``, cut to it: int64[n, 4]."""
    down = np.array([level.downsample_x, level.downsample_y])
    low, high = np.floor(boxes[:, :2] / down + 1e-6), np.ceil(boxes[:, 2:] / down - 1e-6)
    most = np.array([level.width, level.height])
    return np.concatenate([np.clip(low, 0, most), np.clip(high, 0, most)], axis=1).astype(np.int64)


def covered(boxes: I64, most: int = MOST_PIXELS) -> list[Window]:
    """Rectangles that hold every px of ``boxes`` int64[n, 4] (x0, y0, x1, y1) once, each of at most ``most`` px."""
    xs, ys = np.unique(boxes[:, ::2]), np.unique(boxes[:, 1::2])
    inside = np.zeros((len(ys), len(xs)), bool)  # nothing begins at the last edges
    for x0, y0, x1, y1 in boxes:
        inside[np.searchsorted(ys, y0) : np.searchsorted(ys, y1), np.searchsorted(xs, x0) : np.searchsorted(xs, x1)] = 1
    done: list[tuple[tuple[int, int], int, int]] = []
    growing: dict[tuple[int, int], int] = {}  # where the runs (x0, x1) of this row began
    for row, y in enumerate(ys.tolist()):
        edges = np.flatnonzero(np.diff(inside[row].astype(np.int8), prepend=0))
        runs = [(int(xs[start]), int(xs[stop])) for start, stop in edges.reshape(-1, 2)]
        done += [(run, growing.pop(run), y) for run in [run for run in growing if run not in runs]]
        for run in runs:
            growing.setdefault(run, y)
    return [piece for (x0, x1), y0, y1 in done for piece in _cut(Window(x0, y0, x1 - x0, y1 - y0), most)]


def _cut(window: Window, most: int) -> list[Window]:
    x, y, width, height = window
    step = max(1, most // width)
    return [Window(x, top, width, min(step, y + height - top)) for top in range(y, y + height, step)]


@dataclass(frozen=True, slots=True)
class Least:
    """The least for the tissue: every px under a tile of the run once, a megapixel a call.

    ``fewest``: calls, if each were as large as the platform allows.
    """

    calls: int
    size: int
    pixels: int
    fewest: int


def least(windows: Sequence[Window], sizes: Sequence[int]) -> Least:
    """``windows`` hold every px once; ``sizes``: bytes of their pictures."""
    pixels = sum(one.pixels for one in windows)
    return Least(math.ceil(pixels / MEGAPIXEL), sum(sizes), pixels, math.ceil(pixels / MOST_PIXELS))


# ------------------------------------------------------------------------------------------------ posts


def by_kind(posted: Sequence[Post]) -> dict[str, tuple[int, int]]:
    """(calls, bytes) by kind of output."""
    found: dict[str, tuple[int, int]] = {}
    for one in posted:
        calls, size = found.get(one.kind, (0, 0))
        found[one.kind] = calls + 1, size + one.size
    return dict(sorted(found.items()))


def of_nuclei(posted: Sequence[Post]) -> list[Post]:
    """Posts of nuclei, of their classes and of their confidences, those of empty collections among them."""
    return [one for one in posted if one.output in ("nuclei_objects", "nuclei_classes", "nuclei_confidences")]


def requests_for(count: int, posted: Sequence[Post], objects: int, *, items: int, body: int) -> int:
    """How many requests ``count`` nuclei would need, if each has as many bytes as those ``objects`` that were posted.

    ``items``, ``body``: objects and bytes of a request at most.
    """
    sizes: Counter[str] = Counter()
    for one in of_nuclei(posted):
        sizes[one.output] += one.size
    return sum(1 + max(math.ceil(count / items), math.ceil(count * size / objects / body)) for size in sizes.values())


# ------------------------------------------------------------------------------------------------ parity


@dataclass(frozen=True, slots=True)
class Parity:
    """Objects of the app and of the command line. ``moved``: of those that differ, such as have a near counterpart."""

    app: int
    cli: int
    alike: int
    moved: int
    in_order: bool

    @property
    def holds(self) -> bool:
        """Whether all agree."""
        return self.app == self.cli == self.alike


def parity(app: Sequence[Corners], cli: Sequence[Corners]) -> Parity:
    """Compare polygons in whole level-0 px; equal ones count as often as both sides have them."""
    mine, theirs = (Counter(tuple(map(tuple, one)) for one in some) for some in (app, cli))
    alike = (mine & theirs).total()
    lonely = [shapely.centroid(shapely.Polygon(one)) for one in (mine - theirs).elements()]
    others = [shapely.centroid(shapely.Polygon(one)) for one in (theirs - mine).elements()]
    moved = len(shapely.STRtree(others).query_nearest(lonely, max_distance=NEAR, all_matches=False)[0])
    return Parity(len(app), len(cli), alike, moved, list(map(list, app)) == list(map(list, cli)))
