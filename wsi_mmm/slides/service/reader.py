"""A Reader over a service that cuts regions out of a slide's levels: the EMPAIA WSI service, and the App API.

How addresses look (`Routes`), who asks (`Client`) and which pictures are asked for (`Cuts`) are given.
"""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import blake2b

import numpy as np
import simplejpeg
from PIL import Image

from wsi_mmm.errors import StorageError
from wsi_mmm.slides.base import Fetched, ReadStats
from wsi_mmm.slides.region_reader import over_white
from wsi_mmm.slides.resample.cut import cut_tiles
from wsi_mmm.slides.resample.direct import needed_numbers
from wsi_mmm.slides.resample.scaled import Source, Window, pick, read_scaled, sources_of
from wsi_mmm.slides.resample.tile_cache import TileCache
from wsi_mmm.slides.resample.tiled import EVERYTHING, Key, Tile, Tiling, Want, fill, size_of
from wsi_mmm.slides.service.client import Client
from wsi_mmm.slides.service.cuts import Cuts, GridCuts
from wsi_mmm.slides.service.info import info_of
from wsi_mmm.storage.ranges import Counter
from wsi_mmm.types import I64, U8, Block, Canvas, SlideInfo, Tiles

_MOST_PIXELS = 25_000_000  # of a picture: what services allow
_EXACT_UNTIL = 4.5  # level-0 px per target px: as OpenSlide is read, see regions.py
_CACHE_BYTES = 256 << 20  # a row of pictures across a large slide: its neighbours below need it again
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_STRIP = 4096  # rows fetched side by side


@dataclass(frozen=True, slots=True)
class Routes:
    """Addresses of one slide's pictures. ``region`` has fields level, x, y, width, height; ``tile`` level, x, y."""

    region: str
    tile: str
    query: str

    def region_url(self, level: int, window: Window) -> str:
        """Where a window of a level is, in px of that level."""
        x, y, x1, y1 = window
        return f"{self.region.format(level=level, x=x, y=y, width=x1 - x, height=y1 - y)}?{self.query}"

    def tile_url(self, level: int, x: int, y: int) -> str:
        """Where the native tile in column ``x``, row ``y`` is."""
        return f"{self.tile.format(level=level, x=x, y=y)}?{self.query}"


class ServiceReader:
    """Reader of one slide of a service; thread-safe."""

    def __init__(self, said: object, routes: Routes, client: Client, *, uri: str, cuts: Cuts | None = None) -> None:
        """``said``: the service's description of the slide; ``uri``: how it may be shown; ``cuts``: into which pictures
        its levels are cut (None: `GridCuts`). Raises SlideDamaged."""
        self._routes, self._client, self._name = routes, client, uri
        self._cuts = cuts or GridCuts()
        self.info: SlideInfo = info_of(said, uri=uri, mark=cache(self._mark))
        # Only small pictures are worth bringing well ahead: a run of lossless ones is hundreds of megabytes.
        self.remote = "image_format=jpeg" in routes.query
        self._sources = tuple(replace(source, step=_STRIP) for source in sources_of(self.info.levels))
        self._cache: TileCache[Key, Tile] = TileCache(_CACHE_BYTES)
        self._counter = Counter()
        self._decoded = 0
        self._closed = False
        self._lock = threading.Lock()

    def read(self, block: Block) -> Canvas:
        """Return the block's pixels; pictures that cannot be decoded are white and listed. Raises StorageError."""
        return read_scaled(block, self._sources, self._fill, _EXACT_UNTIL)

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        """Bring the pictures under ``tiles`` (all of one scale) that are not in memory. Raises StorageError."""
        source = self._source(tiles[0])
        tiling = self._tiling(source)
        numbers = np.unique(np.concatenate([needed_numbers(part, tiling) for part in tiles]))
        missing = self._cache.missing([(source.level, source.shrink, n) for n in numbers.tolist()])
        wanted = [key[2] for key in missing]
        pictures = self._bytes(tiling, [[number] for number in wanted])
        return Fetched(source.level, dict(zip(wanted, pictures, strict=True)))

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        """Write n tiles to ``out``; return the level-0 rectangles that failed (white). Raises StorageError."""
        tiling = self._tiling(self._source(tiles))
        want = Want(frozenset(needed_numbers(tiles, tiling).tolist()))
        fetch = partial(self._fill, want=want, fetched=fetched)
        return cut_tiles(lambda block: read_scaled(block, self._sources, fetch, _EXACT_UNTIL), tiles, out)

    def stats(self) -> ReadStats:
        """Return the bytes and requests of pictures, and how many were decoded."""
        return ReadStats(self._counter.bytes_read, self._counter.requests, self._decoded)

    def close(self) -> None:
        """Forget the pictures and refuse further reading; connections belong to the service."""
        self._closed = True
        self._cache.clear()

    def _source(self, tiles: Tiles) -> Source:
        block = Block(0, 0, tiles.size, tiles.size, tiles.scale_x, tiles.scale_y)
        return pick(self._sources, block, _EXACT_UNTIL)

    def _tiling(self, source: Source) -> Tiling:
        return Tiling(source, *self._cuts.sides(self.info.levels[source.level]))

    def _fill(
        self, source: Source, window: Window, out: U8, *, want: Want = EVERYTHING, fetched: Fetched | None = None
    ) -> I64:
        tiling = self._tiling(source)
        known = fetched.data if fetched is not None and fetched.level == source.level else {}
        load = partial(self._load, tiling, known)
        return fill(self.info, tiling, window, out, cache=self._cache, load=load, want=want)

    def _load(
        self, tiling: Tiling, known: Mapping[int, bytes | memoryview], keys: Sequence[Key], *, keep: bool = True
    ) -> Iterator[tuple[Key, Tile, int]]:
        for key in keys:
            if key[2] in known:
                tile = self._picture(tiling, [key[2]], bytes(known[key[2]]))
                yield key, tile, size_of(tile)
        late = self._cuts.pictures([key[2] for key in keys if key[2] not in known], tiling)
        for start in range(0, len(late), self._cuts.held):
            some = late[start : start + self._cuts.held]
            for numbers, data in zip(some, self._bytes(tiling, some), strict=True):
                yield from self._cells(tiling, numbers, self._picture(tiling, numbers, data))
        with self._lock:
            self._decoded += len(keys)

    def _cells(self, tiling: Tiling, numbers: Sequence[int], picture: Tile) -> Iterator[tuple[Key, Tile, int]]:
        """The cells of a picture, each with memory of its own."""
        left, top, _, _ = _around(tiling, numbers)
        for number in numbers:
            key = tiling.source.level, tiling.source.shrink, number
            tile = picture
            if isinstance(picture, np.ndarray) and len(numbers) > 1:
                x0, y0, x1, y1 = tiling.window(key)
                tile = picture[y0 - top : y1 - top, x0 - left : x1 - left].copy()
            yield key, tile, size_of(tile)

    def _picture(self, tiling: Tiling, numbers: Sequence[int], data: bytes) -> Tile:
        """The picture of cells that fill it."""
        x0, y0, x1, y1 = _around(tiling, numbers)
        whole = (tiling.width, tiling.height) if self._by_tile(tiling) else (x1 - x0, y1 - y0)
        found = decoded(data, *whole, name=self._name)
        # A native tile at the edge comes padded.
        return found if isinstance(found, str) else found[: y1 - y0, : x1 - x0]

    def _by_tile(self, tiling: Tiling) -> bool:
        """Whether a picture is one native tile: services have those at hand."""
        level = self.info.levels[tiling.source.level]
        return self._cuts.by_tile and (tiling.width, tiling.height) == (level.tile_width, level.tile_height)

    def _url(self, tiling: Tiling, numbers: Sequence[int]) -> str:
        level = tiling.source.level
        if self._by_tile(tiling):
            row, column = divmod(numbers[0], tiling.columns)
            return self._routes.tile_url(level, column, row)
        return self._routes.region_url(level, _around(tiling, numbers))

    def _bytes(self, tiling: Tiling, pictures: Sequence[Sequence[int]]) -> list[bytes]:
        """The encoded pictures, each of cells that fill it."""
        if not pictures:
            return []
        most = max(most_bytes(tiling.width * len(numbers), tiling.height) for numbers in pictures)
        return self._get([self._url(tiling, numbers) for numbers in pictures], most)

    def _get(self, urls: Sequence[str], most: int) -> list[bytes]:
        if self._closed:
            raise StorageError(f"{self._name} was closed; open it again")
        return self._client.get_many(urls, [most] * len(urls), name=self._name, counter=self._counter)

    def _mark(self) -> str:
        """Return the fingerprint: of id, levels, how pictures are asked for, and one on the coarsest level."""
        level, number = self.info.levels[-1], len(self.info.levels) - 1
        side = self._cuts.mark_side(level)
        left, top = max(0, level.width // 2 - side // 2), max(0, level.height // 2 - side // 2)
        window = (left, top, min(left + side, level.width), min(top + side, level.height))
        width, height = window[2] - left, window[3] - top
        (data,) = self._get([self._routes.region_url(number, window)], most_bytes(width, height))
        pixels = decoded(data, width, height, name=self._name)
        seen = pixels.encode() if isinstance(pixels, str) else pixels.tobytes()
        identity = (self.info.properties.get("id"), self.info.levels, self._routes.query)
        return blake2b(repr(identity).encode() + seen, digest_size=16).hexdigest()


def _around(tiling: Tiling, numbers: Sequence[int]) -> Window:
    """The rectangle of the cells ``numbers``, which fill it, row-major."""
    first, last = (tiling.window((tiling.source.level, tiling.source.shrink, numbers[i])) for i in (0, -1))
    return first[0], first[1], last[2], last[3]


def most_bytes(width: int, height: int) -> int:
    """Return the bytes that a picture can have: no more than as many plain RGBA pixels."""
    if width * height > _MOST_PIXELS:
        raise StorageError(f"a picture of {width} x {height} px is more than services give")
    return width * height * 4 + height + (256 << 10)


def decoded(data: bytes, width: int, height: int, *, name: str) -> U8 | str:
    """Return uint8[height, width, 3], transparent as white, or why a picture is damaged.

    Raises StorageError for what is no PNG or JPEG of that size: nothing larger is ever decoded.
    """
    decode = _decode_png if data.startswith(_PNG) else _decode_jpeg if data.startswith(_JPEG) else None
    if decode is None:
        raise StorageError(f"{name}: the service answered with what is no PNG or JPEG; is it a WSI service?")
    try:
        return decode(data, (width, height))
    except _OtherSizeError as error:
        raise StorageError(f"{name}: asked for {width} x {height} px, the service sent {error}") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        return f"the picture is damaged ({type(error).__name__})"


class _OtherSizeError(Exception):
    """The picture has another size."""


def _decode_png(data: bytes, size: tuple[int, int]) -> U8:
    _check(struct.unpack(">II", data[16:24]), size)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        if "A" in picture.getbands() or "transparency" in picture.info:
            return over_white(np.asarray(picture.convert("RGBA")))
        return np.asarray(picture.convert("RGB"))


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> U8:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    _check((width, height), size)
    pixels: U8 = simplejpeg.decode_jpeg(data, "RGB")
    return pixels


def _check(found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if tuple(found) != wanted:
        raise _OtherSizeError(f"{found[0]} x {found[1]}")
