"""The direct TIFF reader: native tiles are fetched as bytes in merged ranges and decoded here.

Reads SVS, OME-TIFF and generic pyramidal TIFF from any storage. Pixels of JPEG slides equal OpenSlide's.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise, repeat

import numpy as np

from wsi_mmm.errors import NotASlide, SlideDamaged
from wsi_mmm.slides.base import Fetched, ReadStats
from wsi_mmm.slides.fingerprint import fingerprint_of
from wsi_mmm.slides.resample.cut import cut_tiles
from wsi_mmm.slides.resample.scaled import (
    WHITE,
    Source,
    Window,
    level0_rect,
    merge_failed,
    pick,
    read_scaled,
    read_source,
    sources_of,
)
from wsi_mmm.slides.resample.spacing import is_resized, unsettled_levels, with_spacing
from wsi_mmm.slides.resample.tiled import (
    CACHE_BYTES,
    Key,
    NativeTiles,
    Tile,
    TileCache,
    Tiling,
    fill,
    inner_numbers,
    needed_numbers,
    nested,
    own_numbers,
    size_of,
)
from wsi_mmm.slides.resample.weights import average_boxes
from wsi_mmm.slides.tiff.codecs import decoder, most_bytes, shrinks
from wsi_mmm.slides.tiff.directories import Directory, read_directories, table
from wsi_mmm.slides.tiff.metadata import TiffSlide, describe
from wsi_mmm.slides.tiff.planes import COMPRESSIONS, Plane
from wsi_mmm.slides.tiff.samples import UndecodableError
from wsi_mmm.slides.tiff.tables import fetch_tiles, table_tags, tile_lengths
from wsi_mmm.storage.ranges import Buffer
from wsi_mmm.storage.store import BufferedStore, ByteStore, redact
from wsi_mmm.types import I64, U8, Block, Canvas, SlideInfo, Tiles

_EXACT_JPEG, _EXACT = 16.0, 8.0  # level-0 px per target px up to which level 0 is read (see scaled.py)
_FETCH_BYTES = 32 << 20  # compressed bytes held at a time
_MOST_PIXELS = 1 << 40  # of level 0
_MOST_AVERAGED = 1 << 35  # px that a picture of the whole slide may take: 185,000 px each way without levels
_MOST_EMPTY = 1 << 32  # the same, where less than a thousandth is stored


class TiffReader:
    """Reader of one TIFF; thread-safe, decodes in the calling thread."""

    def __init__(
        self,
        store: ByteStore,
        directories: Sequence[Directory] | None = None,
        *,
        scene: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Read ``store``; ``directories``: those already parsed; ``scene``: the number of the image to read.

        Raises NotASlide, OptionError, SlideDamaged, StorageError.
        """
        name = redact(store.uri)
        slide = describe(store, directories or read_directories(store), name, scene)
        self._planes = slide.planes
        self._offsets, self._stored = _read_tables(store, slide.planes, name)
        self._counts = [tile_lengths(plane, counts) for plane, counts in zip(slide.planes, self._stored, strict=True)]
        self._decode = [decoder(plane) for plane in slide.planes]
        self._most = [most_bytes(plane) for plane in slide.planes]
        self._cache: TileCache[Key, Tile] = TileCache(cache_bytes)
        self._tilings: dict[tuple[float, float], Tiling] = {}
        self._decoded = 0
        self._lock = threading.Lock()
        self.info = _slide_info(store, slide)
        self._store = store.drop_buffers() if isinstance(store, BufferedStore) else store
        self.remote = store.remote
        self._sources = sources_of(slide.levels, shrinks(slide.planes[0]))
        self._unsettled = unsettled_levels(slide.levels, self._sources) if _may_be_resized(slide) else {}
        self._settling = threading.Lock()
        self._exact_until = _EXACT_JPEG if len(self._sources) > len(slide.levels) else _EXACT

    def read(self, block: Block) -> Canvas:
        """Return the block's pixels; tiles that cannot be decoded are white and listed. Raises StorageError."""
        return read_source(block, self._pick_source(block), self._fill_window)

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        """Bring the compressed native tiles under ``tiles`` (all of one scale) that are not in memory, decoded."""
        tiling = self._tiling_for(tiles[0])
        needed = np.unique(np.concatenate([needed_numbers(part, tiling) for part in tiles]))
        return self._fetch_numbers(tiling.source, needed.tolist())

    def _fetch_numbers(self, source: Source, numbers: Sequence[int]) -> Fetched:
        missing = [key[2] for key in self._cache.missing([(source.level, source.shrink, n) for n in numbers])]
        return Fetched(source.level, dict(zip(missing, self._compressed_bytes(source.level, missing), strict=True)))

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        """Write n tiles to ``out``, n arrays uint8[size, size, 3]; return the level-0 rectangles that failed (white).

        Tiles that are native ones are decoded where they shall lie; others are cut from a canvas. Raises StorageError.
        """
        tiling = self._tiling_for(tiles)
        whole = nested(tiles, tiling)
        failed = []
        for which, read in ((whole, self._decode_into), (~whole, self._resample_tiles)):
            at = np.flatnonzero(which)
            if len(at):
                some = replace(tiles, xy=tiles.xy[at])
                failed.append(read(some, [out[i] for i in at.tolist()], tiling, fetched))
        return merge_failed(failed)

    def stats(self) -> ReadStats:
        """Return the cumulative cost."""
        return ReadStats(self._store.counter.bytes_read, self._store.counter.requests, self._decoded)

    def close(self) -> None:
        """Close the store and forget the tiles."""
        self._store.close()
        self._cache.clear()

    def _tiling_for(self, tiles: Tiles) -> Tiling:
        """The tiling of the source that tiles of this scale are read from."""
        scale = tiles.scale_x, tiles.scale_y
        if scale not in self._tilings:
            block = Block(0, 0, tiles.size, tiles.size, *scale)
            self._tilings[scale] = self._tiling_of(self._pick_source(block))
        return self._tilings[scale]

    def _pick_source(self, block: Block) -> Source:
        """The source that a block is read from; levels that may be resized ones are compared with level 0 before."""
        while (source := pick(self._sources, block, self._exact_until)).level in self._unsettled:
            with self._settling:
                if source.level in self._unsettled:
                    self._settle_spacing(next(s for s in self._sources if s.level == source.level and s.shrink == 1))
        return source

    def _settle_spacing(self, source: Source) -> None:
        ratio = self._unsettled[source.level]
        if is_resized(source, ratio, self._sources[0], self._read_squares):
            self._sources = with_spacing(self._sources, {source.level: ratio})
        del self._unsettled[source.level]

    def _read_squares(self, source: Source, tiles: Tiles) -> list[Canvas]:
        """Read ``tiles`` one by one from ``source``; what they need is fetched together, unless it is very much."""
        tiling = self._tiling_of(source)
        numbers = needed_numbers(tiles, tiling)
        few = self._counts[source.level][numbers].sum(dtype=np.float64) <= _FETCH_BYTES
        load = partial(self._load_tiles, source, self._fetch_numbers(source, numbers.tolist()) if few else None)
        natives = NativeTiles(tiling, self._cache, load)

        def fetch(_: Source, window: Window, out: U8) -> I64:
            return fill(natives, window, out)

        blocks = [Block(x, y, tiles.size, tiles.size, tiles.scale_x, tiles.scale_y) for x, y in tiles.xy.tolist()]
        return [read_source(block, source, fetch) for block in blocks]

    def _tiling_of(self, source: Source) -> Tiling:
        plane = self._planes[source.level]
        return Tiling(source, plane.tile_width // source.shrink, plane.tile_height // source.shrink)

    def _fill_window(self, source: Source, window: Window, out: U8) -> I64:
        load = partial(self._load_tiles, source, None)
        return fill(NativeTiles(self._tiling_of(source), self._cache, load), window, out)

    def _resample_tiles(self, tiles: Tiles, out: Sequence[U8], tiling: Tiling, fetched: Fetched | None) -> I64:
        """Average native tiles into ``tiles``; by way of canvases where pixels are copied, or beyond the slide."""
        source, needed = tiling.source, needed_numbers(tiles, tiling)
        numbers, own = needed.tolist(), own_numbers(tiles, tiling, needed).tolist()
        load = partial(self._load_tiles, source, self._fetch_numbers(source, numbers) if fetched is None else fetched)
        natives = NativeTiles(tiling, self._cache, load, frozenset(numbers), frozenset(own))

        def read(block: Block) -> Canvas:
            return read_source(block, source, lambda _, window, canvas: fill(natives, window, canvas))

        return cut_tiles(read, tiles, out, natives)

    def _decode_into(self, tiles: Tiles, out: Sequence[U8], tiling: Tiling, fetched: Fetched | None) -> I64:
        """Decode nested tiles: native tiles of their size right where they belong, smaller ones beside each other."""
        source, numbers = tiling.source, inner_numbers(tiles, tiling)
        targets, scratch = list(out), list(out)
        if numbers.shape[1] > 1:
            targets = _native_parts(out, tiling)
            scratch = [np.empty((tiling.height, tiling.width, 3), np.uint8)] * len(targets)
        keys = [(source.level, source.shrink, number) for number in numbers.ravel().tolist()]
        failed: list[Window] = []
        for target, (key, tile, _) in zip(targets, self._load_tiles(source, fetched, keys, scratch), strict=True):
            if tile is not target:
                target[...] = tile if isinstance(tile, np.ndarray) else WHITE
            if isinstance(tile, str):
                failed.append(level0_rect(source, tiling.window(key[2])))
        return np.array(failed, np.int64).reshape(-1, 4)

    def _load_tiles(
        self, source: Source, fetched: Fetched | None, keys: Sequence[Key], scratch: U8 | list[U8] | None = None
    ) -> Iterator[tuple[Key, Tile, int]]:
        """Decode tiles in the order given, where possible to ``scratch``: one place for all, or one for each."""
        plane, decode, most = self._planes[source.level], self._decode[source.level], self._most[source.level]
        shrink, rows = source.shrink, plane.tile_height
        plain = plane.tiled and plane.width % shrink == 0 and plane.height % shrink == 0
        buffers = iter(scratch) if isinstance(scratch, list) else repeat(scratch)
        numbers = [key[2] for key in keys]
        counts = self._counts[source.level][numbers]
        for part in [slice(None)] if len(keys) * most <= _FETCH_BYTES else _fetch_parts(counts):
            data = self._compressed_bytes(source.level, numbers[part], fetched)
            with self._lock:
                self._decoded += len(data)
            for key, raw, length, buffer in zip(keys[part], data, counts[part].tolist(), buffers, strict=False):
                tile: Tile
                try:
                    if plain and 0 < length == len(raw) <= most:
                        tile = decode(raw, shrink, rows, buffer)
                    else:
                        tile = self._check_and_decode(source, key[2], raw, buffer)
                except UndecodableError as error:
                    tile = self._decode_unpadded(source, key[2], raw, str(error))
                yield key, tile, size_of(tile)

    def _compressed_bytes(self, level: int, numbers: Sequence[int], fetched: Fetched | None = None) -> list[Buffer]:
        """The compressed bytes of native tiles in the order given, fetching what ``fetched`` lacks."""
        known = fetched.data if fetched is not None and fetched.level == level else {}
        missing = [n for n in numbers if n not in known] if known else list(numbers)
        if not missing:
            return [known[n] for n in numbers]
        found = fetch_tiles(self._store, self._planes[level], self._offsets[level], self._stored[level], missing)
        if len(missing) == len(numbers):
            return found
        late = dict(zip(missing, found, strict=True))
        return [late[n] if n in late else known[n] for n in numbers]

    def _check_and_decode(self, source: Source, number: int, data: Buffer, out: U8 | None = None) -> Tile:
        length = int(self._counts[source.level][number])
        if length == 0:
            return self._left_out_tile(source, number)
        if length > self._most[source.level]:
            return f"it claims {length} bytes"
        if len(data) < length:
            return "the file ends inside the tile"
        return self._decode_clipped(source, number, data, out)

    def _left_out_tile(self, source: Source, number: int) -> Tile:
        """Return what stands for a tile the file leaves out: blank on level 0, else made from finer levels."""
        finer = [s for s in self._sources if s.level < source.level]
        if not finer:
            return None
        tiling, scales = self._tiling_of(source), (source.downsample_x, source.downsample_y)
        row, column = divmod(number, tiling.columns)
        block = Block(column * tiling.width, row * tiling.height, tiling.width, tiling.height, *scales)
        canvas = read_scaled(block, finer, self._fill_window)
        return "a finer tile under it cannot be decoded" if len(canvas.failed) else canvas.pixels

    def _decode_clipped(self, source: Source, number: int, data: Buffer, out: U8 | None) -> U8:
        plane, decode = self._planes[source.level], self._decode[source.level]
        if plane.tiled and source.shrink == 1:
            return decode(data, 1, plane.tile_height, out)
        row, column = divmod(number, plane.columns)
        width = min(plane.tile_width, plane.width - column * plane.tile_width)
        height = min(plane.tile_height, plane.height - row * plane.tile_height)
        if source.shrink == 1 or (width % source.shrink == 0 and height % source.shrink == 0):
            return decode(data, source.shrink, plane.stored_rows(number), out)
        # The last pixels would mix the slide with the padding beyond its edge, which may hold anything.
        full = np.array(decode(data, 1, plane.stored_rows(number)))
        full[height:], full[:, width:] = WHITE, WHITE
        return average_boxes(full, source.shrink)

    def _decode_unpadded(self, source: Source, number: int, data: Buffer, error: str) -> Tile:
        """Decode an edge tile of which only what lies on the slide is stored; ``error`` where it is none."""
        plane = self._planes[source.level]
        row, column = divmod(number, plane.columns)
        width = min(plane.tile_width, plane.width - column * plane.tile_width)
        height = min(plane.tile_height, plane.height - row * plane.tile_height)
        full = np.full((plane.tile_height, plane.tile_width, 3), WHITE, np.uint8)
        sizes = [(plane.tile_width, height), (width, plane.tile_height), (width, height)] if plane.tiled else []
        for size in dict.fromkeys(sizes):
            if size == (plane.tile_width, plane.tile_height):
                continue
            with suppress(UndecodableError):
                cut = replace(plane, tile_width=size[0], tile_height=size[1], tiled=True, cut=True)
                full[: size[1], : size[0]] = decoder(cut)(data, 1, size[1])
                return full if source.shrink == 1 else average_boxes(full, source.shrink)
        return error


def _may_be_resized(slide: TiffSlide) -> bool:
    """Aperio and PerkinElmer average squares; strips are whole rows of level 0, too much to compare with."""
    return slide.planes[0].tiled and slide.vendor in ("generic-tiff", "ome")


def _native_parts(out: Sequence[U8], tiling: Tiling) -> list[U8]:
    """The parts of the tiles that native tiles fill, row-major in each."""
    height, width = tiling.height, tiling.width
    return [
        tile[y : y + height, x : x + width]
        for tile in out
        for y in range(0, tile.shape[0], height)
        for x in range(0, tile.shape[1], width)
    ]


def _fetch_parts(counts: I64) -> Iterator[slice]:
    """Cut tiles of so many compressed bytes into runs of about _FETCH_BYTES (one tile at least)."""
    cuts = [0, *(np.flatnonzero(np.diff(np.cumsum(counts) // _FETCH_BYTES)) + 1).tolist(), len(counts)]
    yield from (slice(a, b) for a, b in pairwise(cuts) if b > a)


def _read_tables(store: ByteStore, planes: Sequence[Plane], name: str) -> tuple[list[I64], list[I64]]:
    """Return offsets and byte counts of the native tiles per level, fetched together."""
    tags = [tag for p in planes for tag in table_tags(p)]
    directories = [p.directory for p in planes for _ in range(2)]
    if any(tag not in d.entries for tag, d in zip(tags, directories, strict=True)):
        raise SlideDamaged(f"{name} is damaged: a table of tiles is missing; copy it again")
    tables = table(store, directories, tags)
    offsets, counts = tables[0::2], tables[1::2]
    for plane, some, other in zip(planes, offsets, counts, strict=True):
        needed = plane.columns * plane.rows * plane.parts
        if not len(some) == len(other) == needed or (other < 0).any() or (some < 0).any():
            raise SlideDamaged(f"{name} is damaged: {len(some)} tiles where {needed} are needed")
    _check_extent(planes, counts, name)
    return offsets, counts


def _check_extent(planes: Sequence[Plane], counts: Sequence[I64], name: str) -> None:
    """Raise NotASlide for sizes that nobody could read through; what a level leaves out is read from finer ones."""
    area = averaged = float(planes[0].width * planes[0].height)
    for plane, lengths in zip(planes[1:], counts[1:], strict=True):
        left_out = float(np.mean(lengths == 0))
        averaged = plane.width * plane.height * (1 - left_out) + averaged * left_out
    most = _MOST_AVERAGED if np.count_nonzero(counts[0]) * 1000 >= len(counts[0]) else _MOST_EMPTY
    if area > _MOST_PIXELS or averaged > most:
        raise NotASlide(
            f"{name} claims {planes[0].width} x {planes[0].height} px, and a picture of the whole would read "
            f"{averaged:.3g} of them; at most {_MOST_PIXELS} and {most} px are read: convert it to a pyramidal TIFF"
        )


def _slide_info(store: ByteStore, slide: TiffSlide) -> SlideInfo:
    top = slide.planes[0]
    properties = dict(slide.properties) | {"tiff.compression": COMPRESSIONS[top.compression]}
    if top.bits == 16 and top.white < 65535:
        used = f"{top.white.bit_length()} of 16 bits per sample are used"
        properties["tiff.bits"] = used
        warnings.warn(f"{redact(store.uri)}: {used}, by its brightest tiles: {top.white} is white", stacklevel=4)
    if not top.tiled:
        cost = (
            f"stored in strips of {top.tile_width} x {top.tile_height} px, not in tiles: "
            "every region reads whole rows; convert it to a tiled pyramidal TIFF"
        )
        properties["wsi_mmm.cost"] = cost
        warnings.warn(f"{redact(store.uri)} is {cost}", stacklevel=4)
    return SlideInfo(
        uri=redact(store.uri), width=top.width, height=top.height,
        mpp_x=slide.mpp[0] if slide.mpp else None, mpp_y=slide.mpp[1] if slide.mpp else None,
        levels=slide.levels, vendor=slide.vendor, reader="tiff", fingerprint=fingerprint_of(store, slide.scene),
        objective=slide.objective, properties=properties,
    )  # fmt: skip
