"""The direct TIFF reader: native tiles are fetched as bytes in merged ranges and decoded here.

Reads SVS, OME-TIFF and generic pyramidal TIFF from any storage. Pixels of JPEG slides equal OpenSlide's.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from wsi_mmm.errors import SlideDamaged
from wsi_mmm.slides.base import ReadStats
from wsi_mmm.slides.fingerprint import fingerprint
from wsi_mmm.slides.scaled import WHITE, Source, Window, read_scaled, sources_of
from wsi_mmm.slides.store import ByteStore, redact
from wsi_mmm.slides.tiff_codecs import UndecodableError, decoder, most_bytes, shrinks
from wsi_mmm.slides.tiff_ifd import Directory, read_directories, table
from wsi_mmm.slides.tiff_meta import COMPRESSIONS, Plane, TiffSlide, describe
from wsi_mmm.slides.tile_cache import TileCache
from wsi_mmm.slides.tiled import CACHE_BYTES, Key, Tile, Tiling, fill, size_of
from wsi_mmm.types import I64, U8, Block, Canvas, SlideInfo

_EXACT_JPEG, _EXACT = 16.0, 8.0  # level-0 px per target px up to which level 0 is read (see scaled.py)
_FETCH_BYTES = 32 << 20  # compressed bytes held at a time


class TiffReader:
    """Reader of one TIFF; thread-safe, decodes in the calling thread."""

    def __init__(
        self, store: ByteStore, directories: Sequence[Directory] | None = None, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """Read ``store``; ``directories``: those already parsed. Raises NotASlide, SlideDamaged, StorageError."""
        name = redact(store.uri)
        slide = describe(directories or read_directories(store), name)
        self._store = store
        self._planes = slide.planes
        self._offsets, self._counts = _tables(store, slide.planes, name)
        self._decode = [decoder(plane) for plane in slide.planes]
        self._cache: TileCache[Key, Tile] = TileCache(cache_bytes)
        self._decoded = 0
        self._lock = threading.Lock()
        self.info = _info(store, slide)
        self._sources = sources_of(slide.levels, shrinks(slide.planes[0]))
        self._exact_until = _EXACT_JPEG if len(self._sources) > len(slide.levels) else _EXACT

    def read(self, block: Block) -> Canvas:
        """Return the block's pixels; tiles that cannot be decoded are white and listed. Raises StorageError."""
        return read_scaled(block, self._sources, self._fetch, self._exact_until)

    def stats(self) -> ReadStats:
        """Return the cumulative cost."""
        return ReadStats(self._store.counter.bytes_read, self._store.counter.requests, self._decoded)

    def close(self) -> None:
        """Close the store and forget the tiles."""
        self._store.close()
        self._cache.clear()

    def _fetch(self, source: Source, window: Window) -> tuple[U8, I64]:
        plane = self._planes[source.level]
        tiling = Tiling(source, plane.tile_width // source.shrink, plane.tile_height // source.shrink)
        return fill(self.info, tiling, window, cache=self._cache, load=partial(self._load, source))

    def _load(self, source: Source, keys: Sequence[Key]) -> Iterator[tuple[Key, Tile, int]]:
        offsets, counts = self._offsets[source.level], self._counts[source.level]
        most = most_bytes(self._planes[source.level])
        for group in _groups(keys, counts):
            lengths = [int(counts[number]) for _, _, number in group]
            # A length that cannot be is not fetched: a small file may claim terabytes.
            ranges = [(int(offsets[k[2]]), n if n <= most else 0) for k, n in zip(group, lengths, strict=True)]
            for key, length, data in zip(group, lengths, self._store.get_ranges(ranges), strict=True):
                tile = self._tile(source, key[2], data, length)
                yield key, tile, size_of(tile)

    def _tile(self, source: Source, number: int, data: bytes, length: int) -> Tile:
        if length == 0:
            return self._left_out(source, number)
        if length > most_bytes(self._planes[source.level]):
            return f"it claims {length} bytes"
        if len(data) < length:
            return "the file ends inside the tile"
        try:
            tile = self._decoded_tile(source, number, data)
        except UndecodableError as error:
            return str(error)
        with self._lock:
            self._decoded += 1
        return tile

    def _left_out(self, source: Source, number: int) -> Tile:
        """Return what stands for a tile the file leaves out: blank on level 0, else made from finer levels."""
        finer = [s for s in self._sources if s.level < source.level]
        if not finer:
            return None
        plane = self._planes[source.level]
        row, column = divmod(number, plane.columns)
        width, height = plane.tile_width // source.shrink, plane.tile_height // source.shrink
        scales = source.downsample_x, source.downsample_y
        canvas = read_scaled(Block(column * width, row * height, width, height, *scales), finer, self._fetch)
        return "a finer tile under it cannot be decoded" if len(canvas.failed) else canvas.pixels

    def _decoded_tile(self, source: Source, number: int, data: bytes) -> U8:
        plane, decode = self._planes[source.level], self._decode[source.level]
        row, column = divmod(number, plane.columns)
        width = min(plane.tile_width, plane.width - column * plane.tile_width)
        height = min(plane.tile_height, plane.height - row * plane.tile_height)
        if source.shrink == 1 or (width % source.shrink == 0 and height % source.shrink == 0):
            return decode(data, source.shrink, plane.tile_height if plane.tiled else height)
        # The last pixels would mix the slide with the padding beyond its edge, which may hold anything.
        full = decode(data, 1, plane.tile_height if plane.tiled else height)
        full[height:], full[:, width:] = WHITE, WHITE
        return _shrunk(full, source.shrink)


def _shrunk(pixels: U8, factor: int) -> U8:
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    boxes = pixels.reshape(height, factor, width, factor, 3)
    total: npt.NDArray[np.uint32] = boxes.sum(axis=(1, 3), dtype=np.uint32)
    mean: U8 = ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)
    return mean


def _groups(keys: Sequence[Key], counts: I64) -> Iterator[list[Key]]:
    """Cut into runs of at most _FETCH_BYTES compressed bytes (one tile at least)."""
    group: list[Key] = []
    size = 0
    for key in keys:
        length = int(counts[key[2]])
        if group and size + length > _FETCH_BYTES:
            yield group
            group, size = [], 0
        group.append(key)
        size += length
    if group:
        yield group


def _tables(store: ByteStore, planes: Sequence[Plane], name: str) -> tuple[list[I64], list[I64]]:
    """Return offsets and byte counts of the native tiles per level, fetched together."""
    tags = [pair for p in planes for pair in ((324, 325) if p.tiled else (273, 279))]
    directories = [p.directory for p in planes for _ in range(2)]
    if any(tag not in d.entries for tag, d in zip(tags, directories, strict=True)):
        raise SlideDamaged(f"{name} is damaged: a table of tiles is missing; copy it again")
    tables = table(store, directories, tags)
    offsets, counts = tables[0::2], tables[1::2]
    for plane, some, other in zip(planes, offsets, counts, strict=True):
        if not len(some) == len(other) == plane.columns * plane.rows or (other < 0).any() or (some < 0).any():
            raise SlideDamaged(f"{name} is damaged: {len(some)} tiles where {plane.columns * plane.rows} are needed")
    return offsets, counts


def _info(store: ByteStore, slide: TiffSlide) -> SlideInfo:
    top = slide.planes[0]
    properties = dict(slide.properties) | {"tiff.compression": COMPRESSIONS[top.compression]}
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
        levels=slide.levels, vendor=slide.vendor, reader="tiff", fingerprint=fingerprint(store),
        objective=slide.objective, properties=properties,
    )  # fmt: skip
