"""A Reader over a service that cuts regions out of a slide's levels: the EMPAIA WSI service, and the App API.

It is given addresses (`PictureRoutes`), a client (`ServiceClient`) and a rule for cutting levels (`PictureCuts`).
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
from wsi_mmm.slides.resample.scaled import Source, Window, pick, read_scaled, sources_of
from wsi_mmm.slides.resample.tiled import Key, NativeTiles, Tile, TileCache, Tiling, fill, needed_numbers, size_of
from wsi_mmm.slides.service.client import ServiceClient
from wsi_mmm.slides.service.cuts import GRID_CUTS, PictureCuts
from wsi_mmm.slides.service.info import parse_slide_info
from wsi_mmm.storage.ranges import Counter
from wsi_mmm.types import I64, U8, Block, Canvas, SlideInfo, Tiles

_MOST_PIXELS = 25_000_000  # of a picture: the limit of services
_EXACT_UNTIL = 4.5  # level-0 px per target px: as OpenSlide is read, see regions.py
_CACHE_BYTES = 256 << 20  # a row of pictures across a large slide: its neighbours below need it again
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_STRIP = 4096  # rows fetched at a time


@dataclass(frozen=True, slots=True)
class PictureRoutes:
    """Addresses of one slide's pictures. ``region`` has fields level, x, y, width, height; ``tile`` level, x, y."""

    region: str
    tile: str
    query: str

    def region_url(self, level: int, window: Window) -> str:
        """Return the address of a window of a level, in px of that level."""
        x, y, x1, y1 = window
        return f"{self.region.format(level=level, x=x, y=y, width=x1 - x, height=y1 - y)}?{self.query}"

    def tile_url(self, level: int, x: int, y: int) -> str:
        """Return the address of the native tile in column ``x``, row ``y``."""
        return f"{self.tile.format(level=level, x=x, y=y)}?{self.query}"


class ServiceReader:
    """Reader of one slide of a service; thread-safe."""

    def __init__(
        self, said: object, routes: PictureRoutes, client: ServiceClient, *, uri: str, cuts: PictureCuts = GRID_CUTS
    ) -> None:
        """``said``: the service's description of the slide; ``uri``: how it may be shown; ``cuts``: the rule for
        cutting levels into pictures. Raises SlideDamaged."""
        self._routes, self._client, self._name = routes, client, uri
        self._cuts = cuts
        self.info: SlideInfo = parse_slide_info(said, uri=uri, fingerprint=cache(self._compute_fingerprint))
        # Only small pictures are worth prefetching: many lossless ones are hundreds of megabytes.
        self.remote = "image_format=jpeg" in routes.query
        self._sources = tuple(replace(source, step=_STRIP) for source in sources_of(self.info.levels))
        self._cache: TileCache[Key, Tile] = TileCache(_CACHE_BYTES)
        self._counter = Counter()
        self._decoded = 0
        self._closed = False
        self._lock = threading.Lock()

    def read(self, block: Block) -> Canvas:
        """Return the block's pixels; pictures that cannot be decoded are white and listed. Raises StorageError."""
        return read_scaled(block, self._sources, self._fill_window, _EXACT_UNTIL)

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        """Fetch the pictures under ``tiles`` (all of one scale) that are not in memory. Raises StorageError."""
        source = self._source_for(tiles[0])
        tiling = self._tiling_of(source)
        numbers = np.unique(np.concatenate([needed_numbers(part, tiling) for part in tiles]))
        missing = self._cache.missing([(source.level, source.shrink, n) for n in numbers.tolist()])
        wanted = [key[2] for key in missing]
        pictures = self._fetch_pictures(tiling, [[number] for number in wanted])
        return Fetched(source.level, dict(zip(wanted, pictures, strict=True)))

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        """Write n tiles to ``out``; return the level-0 rectangles that failed (white). Raises StorageError."""
        tiling = self._tiling_of(self._source_for(tiles))
        only = frozenset(needed_numbers(tiles, tiling).tolist())
        fetch = partial(self._fill_window, only=only, fetched=fetched)
        return cut_tiles(lambda block: read_scaled(block, self._sources, fetch, _EXACT_UNTIL), tiles, out)

    def stats(self) -> ReadStats:
        """Return the bytes and requests of pictures, and how many were decoded."""
        return ReadStats(self._counter.bytes_read, self._counter.requests, self._decoded)

    def close(self) -> None:
        """Drop the cache and refuse further reading; connections are shared by all slides of the service."""
        self._closed = True
        self._cache.clear()

    def _source_for(self, tiles: Tiles) -> Source:
        block = Block(0, 0, tiles.size, tiles.size, tiles.scale_x, tiles.scale_y)
        return pick(self._sources, block, _EXACT_UNTIL)

    def _tiling_of(self, source: Source) -> Tiling:
        return Tiling(source, *self._cuts.sides(self.info.levels[source.level]))

    def _fill_window(
        self, source: Source, window: Window, out: U8, *, only: frozenset[int] | None = None,
        fetched: Fetched | None = None,
    ) -> I64:  # fmt: skip
        tiling = self._tiling_of(source)
        known = fetched.data if fetched is not None and fetched.level == source.level else {}
        load = partial(self._load_cells, tiling, known)
        return fill(NativeTiles(tiling, self._cache, load, only), window, out)

    def _load_cells(
        self, tiling: Tiling, known: Mapping[int, bytes | memoryview], keys: Sequence[Key], scratch: U8 | None = None
    ) -> Iterator[tuple[Key, Tile, int]]:
        for key in keys:
            if key[2] in known:
                tile = self._decode_cells(tiling, [key[2]], bytes(known[key[2]]))
                yield key, tile, size_of(tile)
        late = self._cuts.pictures([key[2] for key in keys if key[2] not in known], tiling)
        for start in range(0, len(late), self._cuts.held):
            some = late[start : start + self._cuts.held]
            for numbers, data in zip(some, self._fetch_pictures(tiling, some), strict=True):
                yield from self._cut_cells(tiling, numbers, self._decode_cells(tiling, numbers, data))
        with self._lock:
            self._decoded += len(keys)

    def _cut_cells(self, tiling: Tiling, numbers: Sequence[int], picture: Tile) -> Iterator[tuple[Key, Tile, int]]:
        """Yield the cells of a picture, each with memory of its own."""
        left, top, _, _ = _enclosing_window(tiling, numbers)
        for number in numbers:
            key = tiling.source.level, tiling.source.shrink, number
            tile = picture
            if isinstance(picture, np.ndarray) and len(numbers) > 1:
                x0, y0, x1, y1 = tiling.window(number)
                tile = picture[y0 - top : y1 - top, x0 - left : x1 - left].copy()
            yield key, tile, size_of(tile)

    def _decode_cells(self, tiling: Tiling, numbers: Sequence[int], data: bytes) -> Tile:
        """Return the decoded picture that the cells ``numbers`` fill, or why it is damaged."""
        x0, y0, x1, y1 = _enclosing_window(tiling, numbers)
        whole = (tiling.width, tiling.height) if self._by_tile(tiling) else (x1 - x0, y1 - y0)
        found = decode_picture(data, *whole, name=self._name)
        # A native tile at the edge comes padded.
        return found if isinstance(found, str) else found[: y1 - y0, : x1 - x0]

    def _by_tile(self, tiling: Tiling) -> bool:
        """Tell whether a picture is one native tile, which services serve fastest."""
        level = self.info.levels[tiling.source.level]
        return not self._cuts.merged and (tiling.width, tiling.height) == (level.tile_width, level.tile_height)

    def _picture_url(self, tiling: Tiling, numbers: Sequence[int]) -> str:
        level = tiling.source.level
        if self._by_tile(tiling):
            row, column = divmod(numbers[0], tiling.columns)
            return self._routes.tile_url(level, column, row)
        return self._routes.region_url(level, _enclosing_window(tiling, numbers))

    def _fetch_pictures(self, tiling: Tiling, pictures: Sequence[Sequence[int]]) -> list[bytes]:
        """Fetch the encoded pictures, each given by the cells that fill it."""
        if not pictures:
            return []
        most = max(max_picture_bytes(tiling.width * len(numbers), tiling.height) for numbers in pictures)
        return self._fetch_urls([self._picture_url(tiling, numbers) for numbers in pictures], most)

    def _fetch_urls(self, urls: Sequence[str], most: int) -> list[bytes]:
        if self._closed:
            raise StorageError(f"{self._name} was closed; open it again")
        return self._client.get_many(urls, [most] * len(urls), name=self._name, counter=self._counter)

    def _compute_fingerprint(self) -> str:
        """Return the fingerprint: of id, levels, query, and a picture of the coarsest level."""
        level, number = self.info.levels[-1], len(self.info.levels) - 1
        side = self._cuts.fingerprint_side(level)
        left, top = max(0, level.width // 2 - side // 2), max(0, level.height // 2 - side // 2)
        window = (left, top, min(left + side, level.width), min(top + side, level.height))
        width, height = window[2] - left, window[3] - top
        (data,) = self._fetch_urls([self._routes.region_url(number, window)], max_picture_bytes(width, height))
        pixels = decode_picture(data, width, height, name=self._name)
        seen = pixels.encode() if isinstance(pixels, str) else pixels.tobytes()
        identity = (self.info.properties.get("id"), self.info.levels, self._routes.query)
        return blake2b(repr(identity).encode() + seen, digest_size=16).hexdigest()


def _enclosing_window(tiling: Tiling, numbers: Sequence[int]) -> Window:
    """Return the rectangle that the cells ``numbers``, row-major, fill."""
    first, last = (tiling.window(numbers[i]) for i in (0, -1))
    return first[0], first[1], last[2], last[3]


def max_picture_bytes(width: int, height: int) -> int:
    """Return the largest size of an encoded picture in bytes: that of plain RGBA pixels."""
    if width * height > _MOST_PIXELS:
        raise StorageError(f"a picture of {width} x {height} px is more than services give")
    return width * height * 4 + height + (256 << 10)


def decode_picture(data: bytes, width: int, height: int, *, name: str) -> U8 | str:
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
    _check_sides(struct.unpack(">II", data[16:24]), size)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        if "A" in picture.getbands() or "transparency" in picture.info:
            return over_white(np.asarray(picture.convert("RGBA")))
        return np.asarray(picture.convert("RGB"))


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> U8:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    _check_sides((width, height), size)
    pixels: U8 = simplejpeg.decode_jpeg(data, "RGB")
    return pixels


def _check_sides(found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if tuple(found) != wanted:
        raise _OtherSizeError(f"{found[0]} x {found[1]}")
