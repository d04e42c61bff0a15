"""The native tiles of a plane: their places in the file, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from wsi_mmm.slides.tiff.codecs import most_bytes
from wsi_mmm.slides.tiff.directories import table
from wsi_mmm.slides.tiff.planes import Plane
from wsi_mmm.slides.tiff.samples import join_parts
from wsi_mmm.storage.ranges import Buffer
from wsi_mmm.storage.store import ByteStore
from wsi_mmm.types import I64


def table_tags(plane: Plane) -> tuple[int, int]:
    """Return the tags of the tables of offsets and byte counts."""
    return (324, 325) if plane.tiled else (273, 279)


def tile_lengths(plane: Plane, counts: I64) -> I64:
    """Return the bytes of each native tile as ``fetch_tiles`` gives it; 0: left out of the file."""
    if plane.parts == 1:
        return counts
    parts = counts.reshape(plane.parts, -1)
    return np.where(parts.any(axis=0), (parts + 4).sum(axis=0), 0)


def fetch_tiles(store: ByteStore, plane: Plane, offsets: I64, counts: I64, numbers: Sequence[int]) -> list[Buffer]:
    """Return the stored bytes of native tiles, those of one per sample joined. Raises StorageError.

    ``offsets``, ``counts``: the tables as they are stored. A length that cannot be is not fetched: a small file may
    claim terabytes.
    """
    stored = list(numbers)
    if plane.parts > 1:
        stored = [part * plane.columns * plane.rows + n for n in numbers for part in range(plane.parts)]
    claimed = counts[stored]
    found = store.get_ranges(np.stack([offsets[stored], np.where(claimed <= most_bytes(plane), claimed, 0)], axis=1))
    if plane.parts == 1:
        return found
    return [join_parts(found[at : at + plane.parts]) for at in range(0, len(found), plane.parts)]


def tile_fetcher(store: ByteStore, plane: Plane) -> Callable[[Sequence[int]], dict[int, Buffer]] | None:
    """Return a function from numbers of native tiles to their bytes, without those left out; None without tables."""
    tags = table_tags(plane)
    if any(tag not in plane.directory.entries for tag in tags):
        return None
    offsets, counts = table(store, [plane.directory] * 2, tags)
    if len(offsets) != len(counts) or len(counts) != plane.columns * plane.rows * plane.parts:
        return None
    lengths, most = tile_lengths(plane, counts), most_bytes(plane)

    def fetch(numbers: Sequence[int]) -> dict[int, Buffer]:
        there = [n for n in numbers if 0 < lengths[n] <= most]
        return dict(zip(there, fetch_tiles(store, plane, offsets, counts, there), strict=True)) if there else {}

    return fetch
