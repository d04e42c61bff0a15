"""Pixels of a slide at one scale, kept in Zarr: a Reader that reads what it has, and keeps what it reads.

``<uri>/pixels`` is a Zarr array uint8[height, width, 3] of the target grid in shards of 1,024 px. A shard is read from
the inner reader when first touched, and anew when it is gone or damaged; it is put whole (temp + rename, or one PUT),
and every writer of a shard writes the same pixels. So several threads, processes and machines may share the cache, and
any of them may remove a shard at any time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec

from wsi_mmm.cache.entry import ensure_array
from wsi_mmm.cache.inventory import Quota
from wsi_mmm.cache.shard import CHUNK, CODEC, LEVEL, SHARD, SIDE, DamagedShardError, open_shard, pack, unpack
from wsi_mmm.errors import NotFound
from wsi_mmm.slides.base import NOTHING_FETCHED, Fetched, Reader, ReadStats, TileReader
from wsi_mmm.slides.resample.cut import cut_tiles, fill_tiles
from wsi_mmm.slides.resample.scaled import merge_failed
from wsi_mmm.storage import store as storage
from wsi_mmm.types import I64, U8, Block, Canvas, SlideInfo, Tiles

ShardKey = tuple[int, int]  # row and column of a shard
WantedChunks = Sequence[tuple[int, U8]]  # number of a chunk in its shard, where its pixels shall lie

_LOCKS = 64


def pixels_uri(cache: str, info: SlideInfo, scale_x: float, scale_y: float) -> str:
    """Return the folder of a slide's cached pixels at a scale; each reader has its own, because pixels differ."""
    return storage.join(cache, info.fingerprint, "pixels", f"{info.reader}-{scale_x:.9f}-{scale_y:.9f}")


@dataclass(slots=True)
class CachedReader:
    """A Reader whose pixels at one scale rest at ``uri``: what was read once is not fetched or decoded again.

    Blocks with another origin or scale go to the inner reader. ``hits``, ``filled``: shards read from the cache and
    from the slide by this reader.
    """

    inner: Reader
    uri: str
    scale_x: float
    scale_y: float
    quota: Quota | None = None
    info: SlideInfo = field(init=False)
    hits: int = 0
    filled: int = 0
    _shape: tuple[int, int] = field(init=False)
    _touched: set[ShardKey] = field(default_factory=set)
    _claimed: set[ShardKey] = field(default_factory=set)
    _listed: set[str] | None = None
    _ensured: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _filling: list[threading.Lock] = field(default_factory=lambda: [threading.Lock() for _ in range(_LOCKS)])

    def __post_init__(self) -> None:
        self.info = self.inner.info
        height, width = np.ceil(self.info.height / self.scale_y), np.ceil(self.info.width / self.scale_x)
        self._shape = max(1, int(height)), max(1, int(width))

    # ------------------------------------------------------------ reading

    @property
    def remote(self) -> bool:
        """Return whether filling waits for a network."""
        return isinstance(self.inner, TileReader) and self.inner.remote

    def read(self, block: Block) -> Canvas:
        """As the inner reader's ``read``, byte for byte."""
        if (block.scale_x, block.scale_y, block.origin_x, block.origin_y) != (self.scale_x, self.scale_y, 0, 0):
            return self.inner.read(block)
        pixels = np.full((block.height, block.width, 3), 255, np.uint8)
        top, left = max(0, block.y), max(0, block.x)
        bottom, right = min(self._shape[0], block.y + block.height), min(self._shape[1], block.x + block.width)
        failed = [
            self._paste_shard((y, x), pixels, block)
            for y in range(top // SHARD, -(-bottom // SHARD))
            for x in range(left // SHARD, -(-right // SHARD))
        ]
        return Canvas(pixels, _failures_under(merge_failed(failed), block))

    def fetch(self, tiles: Sequence[Tiles]) -> Fetched:
        """Bring what the shards under ``tiles`` need that are not in and that nobody here has asked for yet."""
        if not isinstance(self.inner, TileReader):
            return NOTHING_FETCHED
        if any(not self._same_scale(some) for some in tiles):
            return self.inner.fetch(tiles)
        under = {key for some in tiles for key in self._shards_under(some)}
        with self._lock:
            keys = sorted(under - self._claimed)
            self._claimed.update(keys)
        keys = self._absent_shards(keys)
        return self.inner.fetch([self._shard_tile(key) for key in keys]) if keys else NOTHING_FETCHED

    def read_tiles(self, tiles: Tiles, out: Sequence[U8], fetched: Fetched | None = None) -> I64:
        """Write the tiles to ``out``, as ``read`` would give them; return the level-0 rectangles that failed."""
        if not self._same_scale(tiles):
            return fill_tiles(self.inner, tiles, out, fetched)
        whole = all(one.flags.c_contiguous for one in out)
        if tiles.size != CHUNK or not whole or (tiles.xy % CHUNK).any() or (tiles.xy < 0).any():
            if fetched is not None and len(fetched.data):  # fill shards while the bytes for them are at hand
                for key in sorted(self._shards_under(tiles)):
                    self._read_shard(key, (), fetched)
            return cut_tiles(self.read, tiles, out)
        by_shard = self._by_shard(tiles, out)
        return merge_failed([self._read_shard(key, wanted, fetched) for key, wanted in by_shard.items()])

    def stats(self) -> ReadStats:
        """Return the cost of the inner reader."""
        return self.inner.stats()

    def close(self) -> None:
        """Close the inner reader."""
        self.inner.close()

    def stored_under(self, tiles: Tiles) -> set[ShardKey]:
        """The shards under ``tiles`` that are in."""
        return {key for key in self._shards_under(tiles) if storage.exists(self._shard_uri(key))}

    def fill(self, keys: Iterable[ShardKey]) -> None:
        """Bring shards in that are not; the bytes for all of them are fetched together."""
        keys = self._absent_shards(sorted(keys))
        fetched = None
        if keys and isinstance(self.inner, TileReader):
            fetched = self.inner.fetch([self._shard_tile(key) for key in keys])
        for key in keys:
            self._read_shard(key, (), fetched)

    def drop(self, keys: Iterable[ShardKey]) -> None:
        """Remove shards."""
        for key in keys:
            storage.delete(self._shard_uri(key))

    # ------------------------------------------------------------ shards

    def _same_scale(self, tiles: Tiles) -> bool:
        return (tiles.scale_x, tiles.scale_y) == (self.scale_x, self.scale_y)

    def _shards_under(self, tiles: Tiles) -> set[ShardKey]:
        """The shards that tiles touch."""
        low = np.maximum(tiles.xy, 0) // SHARD
        high = np.minimum(tiles.xy + tiles.size, [self._shape[1], self._shape[0]])
        high = -(-high // SHARD)
        spans = zip(low.tolist(), high.tolist(), strict=True)
        return {(y, x) for (x0, y0), (x1, y1) in spans for y in range(y0, y1) for x in range(x0, x1)}

    def _by_shard(self, tiles: Tiles, out: Sequence[U8]) -> dict[ShardKey, list[tuple[int, U8]]]:
        """Tiles that are chunks, by the shard they lie in; those beyond the slide are made white."""
        found: dict[ShardKey, list[tuple[int, U8]]] = {}
        for (x, y), target in zip((tiles.xy // CHUNK).tolist(), out, strict=True):
            if y * CHUNK >= self._shape[0] or x * CHUNK >= self._shape[1]:
                target[...] = 255
            else:
                found.setdefault((y // SIDE, x // SIDE), []).append((y % SIDE * SIDE + x % SIDE, target))
        return found

    def _paste_shard(self, key: ShardKey, pixels: U8, block: Block) -> I64:
        """Copy what shard ``key`` has of the block to its canvas."""
        wanted: list[tuple[int, U8]] = []
        places: list[tuple[U8, U8]] = []
        for number in range(SIDE * SIDE):
            top, left = (CHUNK * (SIDE * k + n) for k, n in zip(key, divmod(number, SIDE), strict=True))
            y0, y1 = max(top, block.y), min(top + CHUNK, block.y + block.height)
            x0, x1 = max(left, block.x), min(left + CHUNK, block.x + block.width)
            if y0 < y1 and x0 < x1:
                chunk = np.empty((CHUNK, CHUNK, 3), np.uint8)
                wanted.append((number, chunk))
                target = pixels[y0 - block.y : y1 - block.y, x0 - block.x : x1 - block.x]
                places.append((target, chunk[y0 - top : y1 - top, x0 - left : x1 - left]))
        failed = self._read_shard(key, wanted)
        for target, part in places:
            target[...] = part
        return failed

    def _read_shard(self, key: ShardKey, wanted: WantedChunks, fetched: Fetched | None = None) -> I64:
        """Write chunks of a shard to their places, from the cache or from the slide; return what failed."""
        failed = self._read_stored(key, wanted)
        if failed is not None:
            return failed
        with self._filling[hash(key) % _LOCKS]:
            failed = self._read_stored(key, wanted)  # another thread may have been here in the meantime
            if failed is not None:
                return failed
            pixels, failed = self._fill_shard(key, fetched)
        for number, target in wanted:
            y, x = (CHUNK * n for n in divmod(number, SIDE))
            target[...] = pixels[y : y + CHUNK, x : x + CHUNK]
        return failed

    def _read_stored(self, key: ShardKey, wanted: WantedChunks) -> I64 | None:
        """Write chunks from the cache and return what failed; None when the shard is not in, or damaged."""
        place = self._shard_uri(key)
        try:
            failed, chunks = open_shard(place, [number for number, _ in wanted])
            for data, (_, target) in zip(chunks, wanted, strict=True):
                unpack(data, target)
        except (NotFound, DamagedShardError):  # what it is made from is still there
            return None
        with self._lock:
            self.hits += 1
            known = key in self._touched
            self._touched.add(key)
        if not known:
            _mark_used(place)
        return failed

    def _fill_shard(self, key: ShardKey, fetched: Fetched | None) -> tuple[U8, I64]:
        """Read a shard from the slide and put it in; its pixels uint8[1024, 1024, 3] and what failed."""
        pixels = np.empty((SHARD, SHARD, 3), np.uint8)
        failed = fill_tiles(self.inner, self._shard_tile(key), [pixels], fetched)
        self._ensure_pixels()
        inside = self._shape[0] - key[0] * SHARD, self._shape[1] - key[1] * SHARD
        data = pack(pixels, inside, failed)
        storage.write_bytes(self._shard_uri(key), data)
        with self._lock:
            self.filled += 1
            self._touched.add(key)
        if self.quota is not None:
            self.quota.wrote(len(data))
        return pixels, failed

    def _shard_tile(self, key: ShardKey) -> Tiles:
        return Tiles(np.array([[key[1] * SHARD, key[0] * SHARD]], np.int64), SHARD, self.scale_x, self.scale_y)

    def _absent_shards(self, keys: list[ShardKey]) -> list[ShardKey]:
        """Return the ``keys`` that are not in; a bucket is asked once, for all."""
        if storage.is_local(self.uri):
            return [key for key in keys if not storage.exists(self._shard_uri(key))]
        with self._lock:
            if self._listed is None:
                self._listed = set(storage.list_uris(storage.join(self.uri, "pixels", "c")))
        return [key for key in keys if self._shard_uri(key) not in self._listed]

    def _shard_uri(self, key: ShardKey) -> str:
        return storage.join(self.uri, "pixels", f"c/{key[0]}/{key[1]}/0")

    def _ensure_pixels(self) -> None:
        """The array's description, so that any Zarr library can read what lies here. Once per reader."""
        if self._ensured:
            return
        ensure_array(
            self.uri,
            "pixels",
            shape=(*self._shape, 3),
            chunks=(CHUNK, CHUNK, 3),
            shards=(SHARD, SHARD, 3),
            dtype="uint8",
            fill_value=255,
            compressors=[BloscCodec(cname=CODEC, clevel=LEVEL, shuffle="noshuffle"), Crc32cCodec()],
        )
        self._ensured = True


def _mark_used(uri: str) -> None:
    """Say that a shard was used: those used least recently go first when the cache is full."""
    if storage.is_local(uri):
        path = storage.local_path(uri)
        with suppress(FileNotFoundError, PermissionError):  # removed by another process meanwhile, or read only
            os.utime(path, (time.time(), path.stat().st_mtime))


def _failures_under(rects: I64, block: Block) -> I64:
    left, right = block.x * block.scale_x, (block.x + block.width) * block.scale_x
    top, bottom = block.y * block.scale_y, (block.y + block.height) * block.scale_y
    keep = (rects[:, 0] < right) & (rects[:, 2] > left) & (rects[:, 1] < bottom) & (rects[:, 3] > top)
    return rects[keep]
