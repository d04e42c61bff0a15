"""Slides of an EMPAIA job, over the App API v3: ``empaia://JOB_ID/INPUT_KEY``, INPUT_KEY being an input of type wsi.

``?image_format=jpeg`` (and ``image_quality=90``) asks for smaller, lossy pictures; else PNG. EMPAIA_APP_API and
EMPAIA_TOKEN are read here, where the slide is opened: on a cluster each worker has them of its own environment, and
EMPAIA_JOB_ID must name the same job there.

Lossless pictures are cut to what tiles need, in whole native tiles, and as large as may be: their pixels do not depend
on where a picture begins. Those of JPEGs do, so these are asked for on a fixed grid (see `service_reader`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from wsi_mmm.errors import RecipeError, SlideDamaged, StorageError
from wsi_mmm.slides.ranges import Counter
from wsi_mmm.slides.scaled import Source, Window
from wsi_mmm.slides.service_http import Client, client
from wsi_mmm.slides.service_info import parsed
from wsi_mmm.slides.service_reader import Routes, ServiceReader, decoded, most_bytes, picture_sides
from wsi_mmm.slides.store_objects import timeout
from wsi_mmm.slides.tiled import Key, Tile, Tiling, size_of
from wsi_mmm.slides.uris import redact

SCHEME = "empaia"
_TIMEOUT = 300.0  # seconds: what the platform itself waits for a picture
_MOST_INPUT = 1 << 20  # bytes of a slide's description
_PICTURES = {
    (): {"image_format": "png"},
    (("image_format", "png"),): {"image_format": "png"},
    (("image_format", "jpeg"),): {"image_format": "jpeg", "image_quality": "90"},
}
_CELL = 256  # px: of what is kept in memory; what is asked for is a rectangle of such
_LARGEST = 4 << 20  # px of a rectangle: a block of tiles is a few of them, which are under way side by side
_SIDE_BY_SIDE = 8  # rectangles held at a time
_MIDDLE = 256  # px of the picture by which a large level is known
_ADVICE = "the job's token is not valid (any more); start the job again"


@dataclass(frozen=True, slots=True)
class _Place:
    """A slide of a job: ``base`` is what every address of the job begins with."""

    name: str
    base: str
    key: str
    query: str


def open_app_slide(uri: str) -> ServiceReader:
    """Open a slide of the job that this process works for. RecipeError, SlideNotFound, SlideDamaged, StorageError."""
    place = _place(uri, os.environ)
    parts = urlsplit(place.base)
    asker = client(f"{parts.scheme}://{parts.netloc}", _token(os.environ), timeout(otherwise=_TIMEOUT), _ADVICE)
    said = _described(place, asker)
    kind = ServiceReader if "image_format=jpeg" in place.query else AppReader
    return kind(said, _routes(place, said), asker, uri=place.name)


def _place(uri: str, env: Mapping[str, str]) -> _Place:
    name, parts = redact(uri), urlsplit(uri)
    job, key = parts.netloc, parts.path.strip("/")
    query = _PICTURES.get(tuple(parse_qsl(parts.query)))
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,50}", job) or not key or "/" in key or query is None:
        raise RecipeError(f"{name} names no slide of a job; give empaia://JOB_ID/INPUT_KEY[?image_format=jpeg]")
    if env.get("EMPAIA_JOB_ID", "").strip() != job:
        raise RecipeError(f"{name}: EMPAIA_JOB_ID of this process is not that job; start workers for each job")
    api = env.get("EMPAIA_APP_API", "").strip().rstrip("/")
    if not re.fullmatch(r"https?://[^@{}\s?#]+", api):
        raise RecipeError("EMPAIA_APP_API is no http(s) address without a login")
    return _Place(name, f"{api}/v3/{job}", quote(key, safe=""), urlencode(query))


def _token(env: Mapping[str, str]) -> str:
    token = env.get("EMPAIA_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise RecipeError("EMPAIA_TOKEN is not set, or holds characters that no token has")
    return token


def _described(place: _Place, asker: Client) -> Mapping[str, Any]:
    """The input of type wsi."""
    url = f"{place.base}/inputs/{place.key}"
    said = parsed(asker.get_many([url], [_MOST_INPUT], name=place.name, counter=Counter())[0])
    if not isinstance(said, Mapping):
        raise StorageError(f"{place.name}: the App API's answer is no description of a slide")
    if not isinstance(said.get("id"), str) or not said["id"]:
        raise SlideDamaged(f"{place.name}: the App API describes a slide without an id")
    return said


def _routes(place: _Place, said: Mapping[str, Any]) -> Routes:
    slide = quote(said["id"], safe="")
    region = f"{place.base}/regions/{slide}/level/{{level}}/start/{{x}}/{{y}}/size/{{width}}/{{height}}"
    return Routes(region, f"{place.base}/tiles/{slide}/level/{{level}}/position/{{x}}/{{y}}", place.query)


# ------------------------------------------------------------------------------------------------ pictures


class AppReader(ServiceReader):
    """Reader of lossless pictures: what lies under the tiles of a block comes in few rectangles, and nothing else."""

    def _tiling(self, source: Source) -> Tiling:
        level = self.info.levels[source.level]
        if picture_sides(level) == (level.width, level.height):
            return super()._tiling(source)
        return Tiling(source, _cell(level.tile_width), _cell(level.tile_height))

    def _mark_side(self) -> int:
        """Little of a level that is large: it is asked for once more when it is read."""
        coarsest = self.info.levels[-1]
        one = picture_sides(coarsest) == (coarsest.width, coarsest.height)
        return super()._mark_side() if one else _MIDDLE

    def _load(
        self, tiling: Tiling, known: Mapping[int, bytes | memoryview], keys: Sequence[Key], *, keep: bool = True
    ) -> Iterator[tuple[Key, Tile, int]]:
        here = [key for key in keys if key[2] in known]
        yield from super()._load(tiling, known, here, keep=keep)
        late = rectangles([key[2] for key in keys if key[2] not in known], tiling, _LARGEST)
        for start in range(0, len(late), _SIDE_BY_SIDE):
            group = late[start : start + _SIDE_BY_SIDE]
            windows = [_around(tiling, numbers) for numbers in group]
            urls = [self._routes.region_url(tiling.source.level, window) for window in windows]
            most = max(most_bytes(x1 - x0, y1 - y0) for x0, y0, x1, y1 in windows)
            for numbers, window, data in zip(group, windows, self._get(urls, most), strict=True):
                yield from self._cells(tiling, numbers, window, data)

    def _cells(
        self, tiling: Tiling, numbers: Sequence[int], window: Window, data: bytes
    ) -> Iterator[tuple[Key, Tile, int]]:
        """The cells of a picture, each with memory of its own."""
        left, top, right, bottom = window
        found = decoded(data, right - left, bottom - top, name=self._name)
        for number in numbers:
            key = tiling.source.level, tiling.source.shrink, number
            x0, y0, x1, y1 = tiling.window(key)
            tile = found if isinstance(found, str) else found[y0 - top : y1 - top, x0 - left : x1 - left].copy()
            yield key, tile, size_of(tile)
        with self._lock:
            self._decoded += len(numbers)


def _cell(native: int) -> int:
    return native * max(1, _CELL // native) if 16 <= native <= 4 * _CELL else _CELL


def _around(tiling: Tiling, numbers: Sequence[int]) -> Window:
    """The rectangle of the cells ``numbers``, which fill it, row-major."""
    first, last = (tiling.window((tiling.source.level, tiling.source.shrink, numbers[i])) for i in (0, -1))
    return first[0], first[1], last[2], last[3]


def rectangles(numbers: Sequence[int], tiling: Tiling, most: int) -> list[list[int]]:
    """Cut cells of ``tiling`` into rectangles of at most ``most`` px (one cell at least), each row-major."""
    found: list[list[int]] = []
    growing: dict[tuple[int, int], list[int]] = {}  # by first and last column
    row_before = -1
    for row, runs in _runs(sorted(numbers), tiling, most).items():
        if row != row_before + 1:
            growing.clear()
        grown: dict[tuple[int, int], list[int]] = {}
        for first, last in runs:
            cells = [row * tiling.columns + column for column in range(first, last + 1)]
            above = growing.get((first, last))
            if above is not None and (len(above) + len(cells)) * tiling.width * tiling.height <= most:
                above += cells
                grown[first, last] = above
            else:
                grown[first, last] = cells
                found.append(cells)
        growing, row_before = grown, row
    return found


def _runs(numbers: Sequence[int], tiling: Tiling, most: int) -> dict[int, list[tuple[int, int]]]:
    """By row, the first and last column of cells side by side, none longer than ``most`` px allow."""
    longest = max(1, most // (tiling.width * tiling.height))
    found: dict[int, list[tuple[int, int]]] = {}
    for number in numbers:
        row, column = divmod(number, tiling.columns)
        runs = found.setdefault(row, [])
        if runs and runs[-1][1] == column - 1 and column - runs[-1][0] < longest:
            runs[-1] = runs[-1][0], column
        else:
            runs.append((column, column))
    return found
